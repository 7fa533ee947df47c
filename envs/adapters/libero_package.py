"""LIBERO's package: the only file that imports libero. It does so in LIBERO's own environment, when asked.

An environment's model is compiled without its textures (147 of 270 MB, and most of the time): pictures are drawn with
those of one complete model a task, see `Libero.complete_model`.
"""

from __future__ import annotations

import logging
import os
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.adapters.adapter_worlds import numpy_seed

_PLACEMENTS = 100
"""Attempts at a placement without overlaps before that is an error."""


def without_pictures(xml: str) -> str:
    """A model whose textures of image files are grey: the same physics, and the same geoms to draw."""
    root = ET.fromstring(xml)
    for texture in root.iter("texture"):
        named = [name for name in texture.keys() if name.startswith("file")]  # noqa: SIM118 - an element is no mapping
        for name in (*named, "gridsize", "gridlayout") if named else ():
            texture.attrib.pop(name, None)
        if named:
            texture.attrib.update(builtin="flat", width="1", height="6" if texture.get("type") == "cube" else "1")
    return ET.tostring(root, encoding="unicode")


class Libero:
    """The parts of the package that are used, imported without its prints and warnings."""

    def __init__(self, suite: str) -> None:
        """`suite`: LIBERO's name of it."""
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings(), redirect_stdout(StringIO()):
                warnings.simplefilter("ignore")
                import robosuite.environments.base as robosuite_base
                from libero.libero import benchmark, get_libero_path
                from libero.libero.envs.bddl_utils import robosuite_parse_problem
                from libero.libero.envs.env_wrapper import ControlEnv
                from robosuite.utils.errors import RandomizationError
        finally:
            logging.disable(logging.NOTSET)
        self._base, self._path, self._make = robosuite_base, get_libero_path, ControlEnv
        self._parse, self._no_placement = robosuite_parse_problem, RandomizationError
        self._suites = benchmark.get_benchmark_dict()
        self._suite = self._named(suite)
        self._models: dict[int, str] = {}
        self._unplaced: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        """By task: where its bodies are in a new model, position (n, 3) and quaternion (n, 4)."""

    def _named(self, suite: str) -> Any:
        with redirect_stdout(StringIO()):
            return self._suites[suite]()

    def problem(self, number: int, suite: str | None = None) -> str:
        """Path of a task's problem file, also of another suite."""
        task = (self._suite if suite is None else self._named(suite)).get_task(number)
        return os.path.join(self._path("bddl_files"), task.problem_folder, task.bddl_file)

    def sentence(self, number: int, suite: str) -> str:
        """The instruction in the problem file of a task."""
        words = self._parse(self.problem(number, suite))["language_instruction"]
        return " ".join(words if isinstance(words, list) else [words]).lower()

    def published_state(self, number: int, state: int) -> NDArray[np.float64]:
        """Flattened MuJoCo state (time, qpos, qvel) of a task's published initial states."""
        return self._suite.get_task_init_states(number)[state]

    def make(self, number: int) -> Any:
        """LIBERO's environment of a task: it draws nothing, and its resets are soft."""

        def compiled(xml: str) -> Any:
            self._models[number] = xml
            made = sim.from_xml_string(without_pictures(xml))
            self._unplaced[number] = made.model.body_pos.copy(), made.model.body_quat.copy()
            return made

        sim = self._base.MjSim

        def make() -> Any:
            return self._make(
                self.problem(number), use_camera_obs=False, has_offscreen_renderer=False, ignore_done=True,
                hard_reset=False,
            )  # fmt: skip

        with redirect_stdout(StringIO()), numpy_seed(0):
            with patch.object(self._base, "MjSim", SimpleNamespace(from_xml_string=compiled)):
                return self._placed(make)

    def complete_model(self, number: int) -> mujoco.MjModel:
        """The model of a task with its textures, of which an environment must have been made."""
        return mujoco.MjModel.from_xml_string(self._models[number])

    def place(self, number: int, env: Any) -> None:
        """Place everything in an environment of a task afresh, as in a new model; draws from numpy's generator."""
        # LIBERO puts a thing on a fixture at the fixture's new place plus where the fixture's part is now: right only
        # where the fixture has not been moved yet.
        env.sim.model.body_pos[:], env.sim.model.body_quat[:] = self._unplaced[number]
        self._placed(env.env.reset)
        gripper = env.env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # a soft reset keeps the last

    def _placed[T](self, attempt: Callable[[], T]) -> T:
        for _ in range(_PLACEMENTS):
            try:
                return attempt()
            except self._no_placement:
                continue
        raise RuntimeError(f"LIBERO found no placement without overlaps in {_PLACEMENTS} attempts")
