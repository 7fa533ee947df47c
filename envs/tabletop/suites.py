"""Suites: which tasks, how many objects, what horizon. Data in `sim_configs/suites/*.toml`."""

from __future__ import annotations

from dataclasses import dataclass

from envs.tabletop.scene import SCENES
from vla.core.paths import SIM_CONFIGS
from vla.core.types import Plane


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

    @property
    def plane(self) -> Plane:
        """Which columns of `envs.tabletop.goals.privileged` and `envs.backends.cpu_worlds.PROPRIO_NAMES` lie in the
        plane of the table."""
        return Plane(
            hand=(0, 1), hand_offsets=((3, 4),), places=((0, 1), (13, 14)), offsets=((3, 4), (6, 7)),
            turns=not SCENES[self.scene].fixtures,
        )  # fmt: skip


def suite_names() -> tuple[str, ...]:
    """Names of every suite file, sorted."""
    return tuple(sorted(path.stem for path in (SIM_CONFIGS / "suites").glob("*.toml")))


