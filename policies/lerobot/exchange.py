"""Conversion of checkpoints between Bascule's and LeRobot's formats, with identical outputs in both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lerobot.configs import PreTrainedConfig

from policies.lerobot.modeling_bascule import BasculePolicy, wrap
from policies.lerobot.processor_bascule import make_bascule_pre_post_processors
from vla.core.disk import writing
from vla.model.model import VLA


def to_lerobot(checkpoint: Path, out: Path, *, member: str | None = None) -> Path:
    """Write a checkpoint of ours as a folder that `--policy.path` takes; LoRA adapters are merged.

    `member`: the robot to control, for a policy trained for several robots.
    """
    vla = VLA.load(checkpoint, member=member)
    if vla.pool is not None:
        raise ValueError("LeRobot's policy cannot keep a modulator for an episode: serve the checkpoint (`vla serve`)")
    policy = wrap(vla)
    with writing(out, "this policy", policy.state_dict()):
        policy.save_pretrained(out)
        for pipeline in make_bascule_pre_post_processors(policy.config):
            pipeline.save_pretrained(out)
    return out


def from_lerobot(folder: Path, out: Path) -> Path:
    """Write a policy that LeRobot trained (its `pretrained_model` folder) as a checkpoint of ours."""
    if (Path(folder) / "adapter_config.json").is_file():
        policy = _with_adapters(folder)
    else:
        policy = BasculePolicy.from_pretrained(folder, config=_on_cpu(folder))
    steps = policy.config.n_action_steps
    policy.vla.config = replace(policy.vla.config, n_action_steps=steps)
    policy.vla.save(out)
    return out


def _with_adapters(folder: Path) -> BasculePolicy:
    """Load the output of `lerobot-train --peft...`: merge its adapters into the base policy they refer to."""
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not Path(base).is_dir():
        raise ValueError(f"{folder} holds adapters of the policy in {base}, which is not there")
    adapted = PeftModel.from_pretrained(BasculePolicy.from_pretrained(base, config=_on_cpu(base)), folder)
    return adapted.merge_and_unload()


def _on_cpu(folder: str | Path) -> PreTrainedConfig:
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    return config
