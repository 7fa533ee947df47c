"""`vla experiment ablation`: variants of bridge attention, each trained anew by imitation. May import every package."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bascule.experiments.ablations import ablation as variant
from bascule.experiments.arms import Report, Row, compare, evaluation_scenes, imitate
from vla.model.config import DEFAULT_BACKBONE


@dataclass(frozen=True)
class AblationConfig:
    """Ablation of bridge attention: equal demonstrations, training steps and evaluation scenes for every arm."""

    suite: str = "tabletop-pick"
    """The suite to evaluate in."""
    arms: tuple[str, ...] = ("bridge", "last-layer", "raw-only", "queries-only", "lean", "no-language")
    """Names in `bascule.experiments.ablations`, several joined by "+". The first is the baseline; no-language is a
    control that must fail."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and initial weights."""
    demos: int = 100
    """Number of demonstrations."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 700
    """Gradient steps of imitation."""
    episodes: int = 200
    """Evaluation scenes, the same for every arm and seed."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def ablation(config: AblationConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Imitation of every arm with every seed; `arms.compare` says what is returned. ValueError for an unknown arm."""
    for arm in config.arms:
        variant(arm)
    return compare(
        "ablation", config.arms, config.seeds, partial(_imitate_and_evaluate, config, out), out,
        asked={name: getattr(config, name) for name in ("suite", "demos", "backbone", "steps", "episodes")},
        figures={"trainable_parameters": lambda rows: rows[0]["trainable_parameters"]},
        on_progress=on_progress,
    )  # fmt: skip


def _imitate_and_evaluate(config: AblationConfig, out: Path, arm: str, seed: int) -> Row:
    from envs.evaluation.evaluate import evaluate
    from vla.model.policy import VLAPolicy

    began = time.monotonic()
    model = imitate(config, seed, out, out / f"{arm}-{seed}", variant(arm))
    seconds = time.monotonic() - began
    policy = VLAPolicy(model.eval())
    with evaluation_scenes(config, policy) as (env, seeds):
        report = evaluate(policy, env, seeds, suite=config.suite)
    return {
        "successes": report.successes,
        "episodes": report.episodes,
        "wrong_object": report.wrong_object,
        "train_seconds": round(seconds, 1),
        "trainable_parameters": sum(p.numel() for p in model.trainable()),
    }
