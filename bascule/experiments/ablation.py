"""Experiments: several arms, several seeds, one table. May import every package.

Finished runs are kept in OUT (one file per arm and seed), so that repeating the command continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.core.config import load_json, save_json

if TYPE_CHECKING:
    from vla.model.config import VLAConfig

    Variant = Callable[[VLAConfig], VLAConfig]
from bascule.experiments.arms import imitate

Report = Callable[[int, int, str], None]
"""Callback with (finished runs, all runs, description of the current one)."""


@dataclass(frozen=True)
class AblationConfig:
    """Ablation of bridge attention: equal demonstrations, training steps and evaluation scenes for every arm."""

    suite: str = "tabletop-pick"
    arms: tuple[str, ...] = ("bridge", "last-layer", "raw-only", "queries-only", "lean", "no-language")
    """Names in `bascule.experiments.ablations`, several joined by "+". The first is the baseline; no-language is a
    control that must fail."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and initial weights."""
    demos: int = 100
    backbone: str = "tiny"
    """The one that BENCHMARKS.md's arms are on; imitation is better on `tiny-goals`."""
    steps: int = 700
    episodes: int = 200
    """Evaluation scenes, the same for every arm and seed."""
    num_envs: int = 48
    workers: int = 2


def ablation(config: AblationConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Imitation of every arm with every seed; {"experiment", "seeds", "arms": {arm: counts}, "seconds", ...}."""
    from bascule.experiments.ablations import ablation as variant

    for arm in config.arms:
        variant(arm)
    runs = [(seed, arm) for seed in config.seeds for arm in config.arms]
    started = time.monotonic()
    rows = []
    for done, (seed, arm) in enumerate(runs):
        if on_progress:
            on_progress(done, len(runs), f"{arm}, seed {seed}")
        file = out / f"{arm}-{seed}.json"
        asked = {name: getattr(config, name) for name in ("suite", "demos", "backbone", "steps", "episodes")}
        row = load_json(file) if file.is_file() else None
        if row is not None and row["asked"] != asked:
            raise ValueError(f"{out} holds results of other settings ({row['asked']}): choose another --out")
        if row is None:
            row = {"arm": arm, "seed": seed, "asked": asked, **_imitate_and_evaluate(config, arm, seed, out)}
            save_json(file, row)
        rows.append(row)
    if on_progress:
        on_progress(len(runs), len(runs), "")
    return {
        "experiment": "ablation",
        "seeds": list(config.seeds),
        "arms": {arm: _together([row for row in rows if row["arm"] == arm]) for arm in config.arms},
        "columns": ["trainable_parameters"],
        "seconds": round(time.monotonic() - started, 1),
    }


def _imitate_and_evaluate(config: AblationConfig, arm: str, seed: int, out: Path) -> dict[str, Any]:
    from bascule.experiments.ablations import ablation as variant
    from envs import make_vec
    from envs.evaluation.evaluate import evaluate
    from envs.registry import load_suite
    from vla.model.policy import VLAPolicy

    began = time.monotonic()
    model = imitate(config, seed, out, out / f"{arm}-{seed}", variant(arm))
    seconds = time.monotonic() - began
    first = load_suite(config.suite).eval_seed0
    envs = make_vec(config.suite, config.num_envs, num_workers=config.workers)
    try:
        report = evaluate(VLAPolicy(model.eval()), envs, range(first, first + config.episodes), suite=config.suite)
    finally:
        envs.close()
    own = sum(p.numel() for p in model.trainable())
    return {
        "successes": report.successes,
        "episodes": report.episodes,
        "wrong_object": report.wrong_object,
        "train_seconds": round(seconds, 1),
        "trainable_parameters": own,
    }


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm over its seeds."""
    from envs.evaluation.evaluate import Count

    total = Count(sum(row["successes"] for row in rows), sum(row["episodes"] for row in rows))
    return {
        **total.to_dict(),
        "per_seed": {str(row["seed"]): [row["successes"], row["episodes"]] for row in rows},
        "wrong_object": sum(row["wrong_object"] for row in rows),
        "trainable_parameters": rows[0]["trainable_parameters"],
    }
