"""Meta-World's tasks as suites: instructions, groups, cameras, horizon."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from envs.seeds import FIRST_EVALUATION_SEED
from envs.tabletop.language import Phrasings
from vla.core.paths import SIM_CONFIGS
from vla.core.types import PlanarSymmetry

CAMERAS = {"front": "corner2", "wrist": "gripperPOV"}


HORIZON = 500
MT10 = (
    "button-press-topdown", "door-open", "drawer-close", "drawer-open", "peg-insert-side", "pick-place", "push",
    "reach", "window-close", "window-open",
)  # fmt: skip


@dataclass(frozen=True)
class MetaworldSuite:
    """Some of the fifty tasks."""

    name: str
    description: str
    tasks: tuple[str, ...]
    horizon: int = HORIZON
    eval_seed0: int = FIRST_EVALUATION_SEED
    num_views: int = 2
    plane: PlanarSymmetry | None = None

    def summary(self, per_task: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """The published `group_rates`, for a report of all fifty tasks; else nothing."""
        return {"group_rates": group_rates(per_task)} if set(per_task) == set(task_names()) else {}


@cache
def _groups() -> dict[str, dict[str, list[list[str]]]]:
    """{difficulty: {task: [training phrasings, held-out phrasings]}}."""
    return tomllib.loads((SIM_CONFIGS / "metaworld.toml").read_text())


@cache
def phrasings_of(task: str) -> dict[Phrasings, tuple[str, ...]]:
    """A task's instructions."""
    train, heldout = next(tasks[task] for tasks in _groups().values() if task in tasks)
    return {"train": tuple(train), "heldout": tuple(heldout)}


@cache
def task_names() -> tuple[str, ...]:
    """All fifty, sorted; `PRIVILEGED_DIM`'s last entry is an index into this."""
    return tuple(sorted(task for tasks in _groups().values() for task in tasks))


@cache
def metaworld_suites() -> dict[str, MetaworldSuite]:
    """Every suite by name; needs no metaworld."""
    groups = _groups()
    suites = [
        MetaworldSuite("metaworld-mt50", "Meta-World v3: all fifty tasks", task_names()),
        MetaworldSuite("metaworld-mt10", "Meta-World v3: the ten tasks of MT10", MT10),
    ]
    for group, tasks in groups.items():
        words = f"Meta-World v3: the {len(tasks)} tasks of the {group} group"
        suites.append(MetaworldSuite(f"metaworld-{group}", words, tuple(sorted(tasks))))
    for group, tasks in groups.items():
        for task, (train, _) in tasks.items():
            suites.append(MetaworldSuite(f"metaworld-{task}", f"Meta-World v3 ({group}): {train[0]}", (task,)))
    return {suite.name: suite for suite in suites}


def group_rates(per_task: Mapping[str, float]) -> dict[str, float]:
    """Success rate per difficulty group from rates per task, and the published average: the groups' unweighted mean.

    ValueError unless all fifty tasks are there.
    """
    if missing := set(task_names()) - set(per_task):
        raise ValueError(f"the published average needs all fifty tasks; missing: {', '.join(sorted(missing))}")
    rates = {group: float(np.mean([per_task[task] for task in tasks])) for group, tasks in _groups().items()}
    return {**rates, "average": float(np.mean(list(rates.values())))}
