"""Suites: which tasks, how many objects, what horizon. Data in `sim_configs/suites/*.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace

from envs.scene import SCENES, SIM_CONFIGS
from vla.config import lookup
from vla.types import Plane

TRAIN_SEED_LIMIT = 1_000_000
"""Training and demonstration seeds are below this, evaluation seeds at or above a suite's `eval_seed0`."""


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
        """Which columns of `envs.goals.privileged` and `envs.worlds.PROPRIO_NAMES` lie in the plane of the table."""
        return Plane(
            hand=(0, 1), hand_offsets=((3, 4),), places=((0, 1), (13, 14)), offsets=((3, 4), (6, 7)),
            turns=not SCENES[self.scene].fixtures,
        )  # fmt: skip


def suite_names() -> tuple[str, ...]:
    """Names of every suite file, sorted."""
    return tuple(sorted(path.stem for path in (SIM_CONFIGS / "suites").glob("*.toml")))


def all_suite_names() -> tuple[str, ...]:
    """The suite files' names, then those of the adapters (robosuite, Meta-World), their extras installed or not."""
    from envs.adapter import adapter_suites

    return (*suite_names(), *adapter_suites())


def load_suite(name: str) -> Suite:
    """The suite called `name` (an adapter's has the same name, description, tasks, horizon and eval_seed0).

    ValueError with the nearest name if there is none.
    """
    from envs.adapter import adapter_suites

    if name in adapter_suites():
        return adapter_suites()[name]  # type: ignore[return-value]  # it has no scene file, and nothing asks for one
    lookup(name, dict.fromkeys(all_suite_names()), "suite")
    path = SIM_CONFIGS / "suites" / f"{name}.toml"
    raw = tomllib.loads(path.read_text())
    lookup(raw["scene"], SCENES, "scene")
    return Suite(name=name, **{**raw, "tasks": tuple(raw["tasks"])})


def timed(suite: Suite, horizon: int | None) -> Suite:
    """The suite with episodes of `horizon` control steps (None: its own). ValueError if that is none, or more."""
    if horizon is not None and not 1 <= horizon <= suite.horizon:
        raise ValueError(f"horizon must be from 1 to the {suite.horizon} steps of suite {suite.name!r}, got {horizon}")
    return suite if horizon is None else replace(suite, horizon=horizon)
