"""Suites: which tasks, how many objects, what horizon. Data in `sim_configs/suites/*.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from envs.tabletop.scene import SCENES
from vla.core.paths import SIM_CONFIGS
from vla.core.types import Plane


class AnySuite(Protocol):
    """What every suite says of itself, ours or an adapter's."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def horizon(self) -> int:
        """Control steps after which an episode is truncated."""
        ...

    @property
    def eval_seed0(self) -> int:
        """First seed of its evaluation."""
        ...

    @property
    def num_views(self) -> int: ...
    @property
    def plane(self) -> Plane | None: ...
    def summary(self, per_task: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """What an evaluation report adds to the success rates per task, such as published rates per group."""
        ...


@dataclass(frozen=True)
class Suite:
    """One benchmark: a scene, the tasks drawn in it, and its evaluation seeds."""

    name: str
    description: str
    scene: str
    tasks: tuple[str, ...]
    objects_per_episode: int
    plates_per_episode: int
    horizon: int
    eval_seed0: int
    num_views: int = 2

    @property
    def plane(self) -> Plane:
        """Which columns of `envs.tabletop.goals.privileged` and `envs.backends.cpu_worlds.PROPRIO_NAMES` lie in the
        plane of the table."""
        return Plane(
            hand=(0, 1), hand_offsets=((3, 4),), places=((0, 1), (13, 14)), offsets=((3, 4), (6, 7)),
            turns=not SCENES[self.scene].fixtures,
        )  # fmt: skip

    def summary(self, per_task: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """See `AnySuite.summary`."""
        return {}


def suite_names() -> tuple[str, ...]:
    """Names of every suite file, sorted."""
    return tuple(sorted(path.stem for path in (SIM_CONFIGS / "suites").glob("*.toml")))


