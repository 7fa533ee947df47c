"""`vla experiment xyz`: does a policy that reads places in the robot's frame work with cameras that stand elsewhere?

Demonstrations show the table from a few azimuths drawn at random, the evaluation from azimuths between them. The
control is the same policy told that its cameras are turned by 20 degrees: it must fail. May import every package.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes
from bascule.experiments.spatial.azimuths import HELD_OUT, trained_azimuths
from bascule.experiments.spatial.calibration import WRONG_DEG, Miscalibrated
from vla.core.config import lookup
from vla.core.types import Observation, Policy
from vla.model.config import DEFAULT_BACKBONE, VLAConfig, XYZConfig


@dataclass(frozen=True)
class XYZArm:
    """How a policy is trained and in which rooms it is evaluated."""

    xyz: bool = False
    raw: bool = False
    """The bridge reads the raw image tokens, too."""
    seen: bool = False
    """Evaluated before cameras at the azimuths of its training."""
    wrong: bool = False
    """With cameras said to be turned by `WRONG_DEG`: a control that must fail."""

    @property
    def trained(self) -> str:
        """Name of the policy, which arms may share."""
        return ("xyz" if self.xyz else "plain") + ("-raw" if self.raw else "")


ARMS = {
    "plain": XYZArm(),
    "xyz": XYZArm(xyz=True),
    "xyz-wrong": XYZArm(xyz=True, wrong=True),
    "plain-seen": XYZArm(seen=True),
    "xyz-seen": XYZArm(xyz=True, seen=True),
    "plain-raw": XYZArm(raw=True),
    "xyz-raw": XYZArm(xyz=True, raw=True),
    "xyz-raw-wrong": XYZArm(xyz=True, raw=True, wrong=True),
}


@dataclass(frozen=True)
class XYZExperimentConfig:
    """Equal demonstrations, steps and evaluation scenes for policies that read places in pictures, and in metres."""

    suite: str = "tabletop-pick"
    """The suite to evaluate in."""
    arms: tuple[str, ...] = ("plain", "xyz", "xyz-wrong")
    """plain: places in pictures; xyz: places in the robot's frame; xyz-wrong: the same from wrong calibration, a
    control. With -seen: before the cameras of training; with -raw: raw tokens are read, too."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations, azimuths and initial weights."""
    demos: int = 80
    """Number of demonstrations."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    cameras: tuple[str, ...] = ("front",)
    """Those that the policies read: the one that stands elsewhere. With the camera on the hand, which never does, a
    policy can do without the other (docs/research-log.md)."""
    steps: int = 1300
    """Gradient steps of imitation."""
    episodes: int = 200
    """Evaluation scenes, the same for every arm and seed."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def xyz(config: XYZExperimentConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed; `arms.compare` says what is returned. ValueError for an unknown arm."""
    for arm in config.arms:
        lookup(arm, ARMS, "arm")
    if "front" not in config.cameras:  # the one on the hand is never turned about the table
        raise ValueError("--cameras must have front: it is the one that stands elsewhere")
    return compare(
        "xyz", config.arms, config.seeds, partial(_imitate_and_evaluate, config, out), out,
        asked={name: getattr(config, name) for name in ("suite", "demos", "backbone", "steps", "episodes")}
        | {"cameras": list(config.cameras)},
        figures={
            "replan_ms": lambda rows: round(float(np.median([row["replan_ms"] for row in rows])), 2),
            "replan_ratio": lambda rows: round(float(np.median([row["replan_ratio"] for row in rows])), 3),
        },
        on_progress=on_progress,
    )  # fmt: skip


def _imitate_and_evaluate(config: XYZExperimentConfig, out: Path, name: str, seed: int) -> Row:
    from envs.evaluation.evaluate import evaluate
    from envs.perturb.perturbation import Perturbation
    from vla.model.policy import VLAPolicy

    arm, began = ARMS[name], time.monotonic()
    model, plain = _imitate(config, arm, seed, out)
    seconds = time.monotonic() - began
    policy = VLAPolicy(model.eval())
    azimuths = trained_azimuths(seed) if arm.seen else HELD_OUT
    shown = Miscalibrated(policy, WRONG_DEG) if arm.wrong else policy
    with evaluation_scenes(config, policy, perturb=Perturbation(azimuths=azimuths)) as (env, seeds):
        report = evaluate(shown, env, seeds, suite=config.suite)
        replan_ms, ratio = replan_times(policy, VLAPolicy(plain.eval()), env.observation().select([0]))
    return {
        "successes": report.successes,
        "episodes": report.episodes,
        "wrong_object": report.wrong_object,
        "azimuths": list(trained_azimuths(seed)),
        "train_seconds": round(seconds, 1),
        "replan_ms": replan_ms,
        "replan_ratio": ratio,
    }


def _imitate(config: XYZExperimentConfig, arm: XYZArm, seed: int, out: Path) -> tuple[Any, Any]:
    """The arm's policy of this seed, trained unless an earlier arm or command has; and an untrained plain one of the
    same shape. KeyboardInterrupt when training is stopped."""
    from envs.demos.record import record
    from envs.perturb.perturbation import Perturbation
    from envs.seeds import DEMO_BLOCK
    from vla.backbones.hub import load as load_backbone
    from vla.core.types import IMAGE_SIZE
    from vla.data.lerobot_dataset import load_dataset
    from vla.training.recipes import RECIPES
    from vla.training.train import build_vla, train

    recipe = RECIPES["tabletop" if arm.raw else "tabletop-few"]()
    shape: VLAConfig = replace(recipe.model, backbone=config.backbone)
    recipe = replace(recipe, steps=config.steps, seed=seed, model=shape, cameras=config.cameras)
    backbone = load_backbone(config.backbone, num_views=len(config.cameras))
    folder = out / f"{arm.trained}-policy-{seed}"
    dataset = record(
        config.suite, config.demos, out / f"demos-{seed}", seed0=DEMO_BLOCK * seed, num_workers=config.workers,
        image_size=getattr(backbone, "image_size", IMAGE_SIZE), perturb=Perturbation(azimuths=trained_azimuths(seed)),
        depth=True,
    )  # fmt: skip
    demos = load_dataset(dataset, config.cameras, depth=arm.xyz)
    plain = build_vla(recipe, demos, backbone=backbone)
    recipe = replace(recipe, model=replace(shape, xyz=XYZConfig() if arm.xyz else None))
    model = build_vla(recipe, demos, backbone=backbone)
    if train(recipe, model, demos, folder, resume=(folder / "config.json").exists()).interrupted:
        raise KeyboardInterrupt
    return model, plain


def replan_times(
    policy: Policy, plain: Policy, obs: Observation, plain_obs: Observation | None = None, *, rounds: int = 60
) -> tuple[float, float]:
    """Median milliseconds of one decision of `policy` for one robot, and the median of its ratios to `plain`'s in the
    same rounds: what else the machine does slows both alike. `plain_obs`: the observation as `plain` has it drawn."""
    shown = (obs, obs if plain_obs is None else plain_obs)
    taken = np.zeros((rounds, 2))
    for number, row in enumerate(taken):
        for place in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            (policy, plain)[place].act(shown[place])
            row[place] = 1000 * (time.perf_counter() - began)
    taken = taken[rounds // 6 :]
    return float(np.median(taken[:, 0])), float(np.median(taken[:, 0] / taken[:, 1]))
