"""Frozen numbers of training: 50 steps of imitation, then three updates of online RL alone and beside a teacher.

A change of the code's shape must not change what is learnt. `python tests/golden/test_frozen_training.py` writes the
file anew; a change of it must say why. On the processor that wrote it the parameters are compared bit for bit (their
hash), elsewhere their norms, within what another processor may differ by.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from envs import make_vec
from envs.demos.record import record
from rl.configs.run import RunnerConfig
from rl.recipes import RECIPES as RL_RECIPES
from rl.rollout.step_collector import successes
from rl.runner import Runner
from rl.teacher import train_teacher
from vla.core.types import Policy, VecEnv
from vla.data.lerobot_dataset import load_dataset
from vla.model.model import VLA
from vla.runtime.distributed import Team
from vla.training.recipes import RECIPES
from vla.training.train import build_vla, train

GOLDEN = Path(__file__).with_name("frozen_training.json")
_ENVS = 8


def facts(folder: Path) -> dict[str, Any]:
    """The fingerprint of the policy after every stage, by the stage's name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dataset = record("tabletop-pick", 4, folder / "demos", num_workers=1)
        demos = load_dataset(dataset)
        recipe = RECIPES["tabletop"]()
        every_layer = replace(recipe.model.bridge, taps=None)
        model = replace(recipe.model, backbone="tiny-goals", bridge=every_layer)  # whose numbers they are
        recipe = replace(recipe, steps=50, model=model)
        model = build_vla(recipe, demos)
        train(recipe, model, demos, folder / "imitation")
        found = {"imitation": _fingerprint(model)}
        for name in ("tabletop-pick", "tabletop-pick-guided"):
            env = make_vec("tabletop-pick", _ENVS, num_workers=1)
            try:
                config = _brief(RL_RECIPES[name]())
                needed = demos if config.guide is not None else None
                runner = Runner(VLA.load(folder / "imitation"), env, config, folder / name, demos=needed)
                with patch.object(train_teacher, "successes", _one_round):
                    runner.run()
                found[name] = _fingerprint(runner.model)
            finally:
                env.close()
    finally:
        torch.set_num_threads(threads)
    return found


def _one_round(policy: Policy, env: VecEnv, rounds: list[list[int]], team: Team) -> int:
    """The teacher's successes in the first of the rounds: playing it changes no parameter, and the rest takes long."""
    return successes(policy, env, rounds[:1], team)


def _brief(config: RunnerConfig) -> RunnerConfig:
    """Three updates of the recipe, without a wall clock."""
    guide = config.guide
    if guide is not None:
        practice = guide.practice and replace(guide.practice, env_steps=1, decisions_per_update=2)
        guide = replace(guide, teacher=replace(guide.teacher, steps=10), practice=practice, steps=2)
    return replace(
        config, num_envs=_ENVS, decisions_per_update=2, max_updates=3, max_seconds=None, eval_every=100,
        calibrate_scales=(), guide=guide,
    )  # fmt: skip


def _fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Hash of all parameters, and the norm of each that is trained by part of the model."""
    digest, norms = hashlib.sha256(), {}
    for name, value in sorted(model.state_dict().items()):
        digest.update(value.detach().contiguous().cpu().numpy().tobytes())
        part = ".".join(name.split(".")[:2])
        if not name.startswith("backbone."):
            norms[part] = norms.get(part, 0.0) + float(value.detach().double().square().sum())
    return {"sha256": digest.hexdigest(), "norms": {part: round(total**0.5, 6) for part, total in norms.items()}}


def processor() -> str:
    """Name, family, model and stepping of this machine's processor."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    first = dict(map(str.strip, line.split(":", 1)) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return " ".join(first.get(key, "?") for key in ("model name", "cpu family", "model", "stepping"))


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    return facts(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("stage", ("imitation", "tabletop-pick", "tabletop-pick-guided"))
def test_training_is_what_it_was(stage, now):
    frozen = json.loads(GOLDEN.read_text())
    before, after = frozen["stages"][stage], now[stage]
    assert after["norms"] == pytest.approx(before["norms"], rel=2e-3)
    if frozen["processor"] == processor() and frozen["torch"] == torch.__version__:
        assert after["sha256"] == before["sha256"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        result = {"processor": processor(), "torch": torch.__version__, "stages": facts(Path(scratch))}
    if "--print" in sys.argv:
        print(json.dumps(result, indent=1))
    else:
        GOLDEN.write_text(json.dumps(result, indent=1) + "\n")
