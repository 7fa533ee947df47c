"""Checkpoints between `vla train` / `vla rl` and LeRobot's tools, either way, the same function in both."""

from __future__ import annotations

from pathlib import Path

from lerobot.configs import PreTrainedConfig

from policies.lerobot.modeling_bascule import BasculePolicy, wrap
from policies.lerobot.processor_bascule import make_bascule_pre_post_processors
from vla.config import load_json
from vla.model import VLA


def to_lerobot(checkpoint: Path, out: Path) -> Path:
    """Write a checkpoint of ours as a folder that `--policy.path` takes; LoRA adapters are merged."""
    policy = wrap(VLA.load(checkpoint))
    policy.save_pretrained(out)
    for pipeline in make_bascule_pre_post_processors(policy.config):
        pipeline.save_pretrained(out)
    return out


def from_lerobot(folder: Path, out: Path) -> Path:
    """Write a policy that LeRobot trained (its `pretrained_model` folder) as a checkpoint of ours."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    BasculePolicy.from_pretrained(folder, config=config).vla.save(out)
    return out


def is_lerobot(folder: Path) -> bool:
    """Whether a folder holds a bascule policy in LeRobot's format. ValueError when it holds no config.json."""
    return load_json(Path(folder) / "config.json").get("type") == "bascule"
