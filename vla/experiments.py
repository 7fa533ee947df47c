"""Experiments: several arms, several seeds, one table. Part of the shell: it sees every room.

What is finished is kept in OUT (one file per arm and seed), so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.config import load_json, save_json
from vla.experiment_latency import LatencyConfig, latency
from vla.experiment_rl import RLConfig, rl
from vla.experiment_robustness import RobustnessConfig, robustness

if TYPE_CHECKING:
    from vla.model import VLA, VLAConfig

    Variant = Callable[[VLAConfig], VLAConfig]

Report = Callable[[int, int, str], None]
"""(finished runs, all runs, what is going on)."""


@dataclass(frozen=True)
class AblationConfig:
    """Which parts of bridge attention earn their place: equal demonstrations, steps and evaluation scenes."""

    suite: str = "tabletop-pick"
    arms: tuple[str, ...] = ("bridge", "last-layer", "raw-only", "queries-only", "lean", "no-language")
    """Of `vla.ablations`, several joined by "+"; the first is what others are compared with, no-language must fail."""
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
    from vla.ablations import ablation as variant

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


def imitate(
    config: AblationConfig | RLConfig, seed: int, out: Path, folder: Path, variant: Variant | None = None
) -> VLA:
    """The seed's imitation policy in `folder`, from demonstrations in `out`; a run that was stopped goes on exactly
    where it was. KeyboardInterrupt when it is stopped again."""
    from envs.demos import record
    from vla.data import load_dataset
    from vla.recipes import RECIPES
    from vla.train import build_vla, train

    demos = load_dataset(
        record(config.suite, config.demos, out / f"demos-{seed}", seed0=20_000 * seed, num_workers=config.workers)
    )
    recipe = RECIPES["tabletop"]()
    model = replace(recipe.model, backbone=config.backbone)
    recipe = replace(recipe, steps=config.steps, seed=seed, model=variant(model) if variant else model)
    model = build_vla(recipe, demos)
    if train(recipe, model, demos, folder, resume=(folder / "config.json").exists()).interrupted:
        raise KeyboardInterrupt
    return model


def _imitate_and_evaluate(config: AblationConfig, arm: str, seed: int, out: Path) -> dict[str, Any]:
    from envs import make_vec
    from envs.rollout import evaluate
    from envs.suites import load_suite
    from vla.ablations import ablation as variant
    from vla.model import VLAPolicy

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
    from envs.rollout import Count

    total = Count(sum(row["successes"] for row in rows), sum(row["episodes"] for row in rows))
    return {
        **total.to_dict(),
        "per_seed": {str(row["seed"]): [row["successes"], row["episodes"]] for row in rows},
        "wrong_object": sum(row["wrong_object"] for row in rows),
        "trainable_parameters": rows[0]["trainable_parameters"],
    }


EXPERIMENTS: dict[str, tuple[type[Any], Callable[..., dict[str, Any]]]] = {
    "ablation": (AblationConfig, ablation),
    "latency": (LatencyConfig, latency),
    "rl": (RLConfig, rl),
    "robustness": (RobustnessConfig, robustness),
}
"""By name: its configuration, and what runs it."""
