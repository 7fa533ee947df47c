"""`vla experiment distil`: learning from a privileged teacher, with and without its parts. May import every package.

VITA-VLA's ablation (arXiv 2510.09607) at equal demonstrations and steps: alignment with the teacher's latents before
the actions are learnt, against the same steps without it. The teacher reads the simulator's state and imitates the same
demonstrations: what a student learns in addition is what it says about their frames.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes
from bascule.experiments.distillation.config import ARMS, SHARES, DistilConfig
from vla.core.config import lookup
from vla.core.statistics import wilson95

if TYPE_CHECKING:
    from vla.core.types import Policy


def distil(config: DistilConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed; `arms.compare` says what is returned, to which the success after each of `SHARES` is
    added. ValueError for an unknown arm."""
    for arm in config.arms:
        lookup(arm, dict.fromkeys(ARMS), "arm")
    result = compare(
        "distil", config.arms, config.seeds, partial(_run, config, out), out,
        asked={
            name: getattr(config, name)
            for name in ("suite", "demos", "backbone", "steps", "align_steps", "episodes")
        },
        figures={f"after_{share}": partial(_after, share) for share in SHARES[:-1]}
        | {f"after_{share}_wilson95": partial(_interval, share) for share in SHARES[:-1]}
        | {f"after_{share}_per_seed": partial(_each, share) for share in SHARES[:-1]},
        on_progress=on_progress,
    )  # fmt: skip
    result["columns"] = ["per_seed", *(f"after_{share}" for share in SHARES[:-1])]
    return result


def _after(share: int, rows: list[Row]) -> int:
    return sum(row[f"after_{share}"] for row in rows)


def _interval(share: int, rows: list[Row]) -> list[float]:
    return list(wilson95(_after(share, rows), sum(row["episodes"] for row in rows)))


def _each(share: int, rows: list[Row]) -> dict[str, list[int]]:
    return {str(row["seed"]): [row[f"after_{share}"], row["episodes"]] for row in rows}


def _run(config: DistilConfig, out: Path, arm: str, seed: int) -> Row:
    """An arm trained with one seed, and evaluated on its way."""
    from bascule.experiments.distillation.students import (
        TeacherPolicy,
        demonstrations,
        fit,
        plain_policy,
        train_student,
    )
    from envs.evaluation.evaluate import evaluate
    from vla.model.policy import VLAPolicy

    began = time.monotonic()
    demos = demonstrations(config, out, seed)
    recipe, plain = plain_policy(config, demos, seed)
    trained: Mapping[int, Policy]
    if arm == "teacher":
        trained = {SHARES[-1]: TeacherPolicy(fit(config, demos, plain.processor, seed), plain)}
    else:
        places = train_student(config, recipe, plain, demos, arm, seed, out / f"{arm}-{seed}", SHARES)
        trained = {share: VLAPolicy.load(place) for share, place in places.items()}
    seconds = time.monotonic() - began
    with evaluation_scenes(config, VLAPolicy(plain)) as (env, seeds):
        played = {share: evaluate(policy, env, seeds, suite=config.suite) for share, policy in trained.items()}
    last = played[SHARES[-1]]
    return {f"after_{share}": played.get(share, last).successes for share in SHARES[:-1]} | {
        "successes": last.successes,
        "episodes": last.episodes,
        "wrong_object": last.wrong_object,
        "train_seconds": round(seconds, 1),
    }
