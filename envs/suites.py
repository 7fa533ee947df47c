"""Suites: which tasks, how many objects, what horizon. Data in `sim_configs/suites/*.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass

from envs.scene import SCENES, SIM_CONFIGS
from vla.config import lookup

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


def suite_names() -> tuple[str, ...]:
    """Names of every suite file, sorted."""
    return tuple(sorted(path.stem for path in (SIM_CONFIGS / "suites").glob("*.toml")))


def load_suite(name: str) -> Suite:
    """The suite called `name`. ValueError with the nearest name if there is none."""
    path = lookup(name, {n: SIM_CONFIGS / "suites" / f"{n}.toml" for n in suite_names()}, "suite")
    raw = tomllib.loads(path.read_text())
    lookup(raw["scene"], SCENES, "scene")
    return Suite(name=name, **{**raw, "tasks": tuple(raw["tasks"])})
