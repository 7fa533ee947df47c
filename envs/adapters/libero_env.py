"""LIBERO's tasks as environments: Panda, OSC_POSE deltas, published initial states, two cameras, its own pictures.

The only file that imports libero, which it does in LIBERO's own environment: nothing here may need what that lacks.
Physics, controller, placement and success are LIBERO's own. Set up as published evaluations are (openpi, LeRobot): ten
idle steps before an episode begins, pictures as in the published datasets, proprio of hand position, axis-angle and
both fingers. Resets are soft: a model is compiled once, and only its state (and where its fixtures stand) drawn anew.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.adapters.adapter_worlds import AdapterEpisode, AdapterWorlds, numpy_seed
from envs.adapters.libero_geometry import Grasp, boxes, extent, plan_grasp
from envs.adapters.libero_suites import (
    CAMERAS,
    GOAL_DIM,
    GOAL_KINDS,
    GOALS,
    PRIVILEGED_DIM,
    LiberoSuite,
    instruction_of,
)
from envs.seeds import Stream
from envs.sim.base_worlds import Frames
from envs.sim.render_options import RenderOptions
from envs.tabletop.language import Phrasings
from vla.core.types import ActionSpec

PROPRIO_NAMES = ("eef_x", "eef_y", "eef_z", "eef_rx", "eef_ry", "eef_rz", "finger_left", "finger_right")
"""Grip site in the world frame (m), the hand's rotation vector (rad), finger joints (m): openpi's and LeRobot's."""
ACTION_SPEC = ActionSpec(
    names=("dx", "dy", "dz", "rx", "ry", "rz", "gripper"), low=(-1.0,) * 7, high=(1.0,) * 7, control_hz=20.0
)
"""OSC_POSE deltas, 1 being 5 cm and 0.5 rad; gripper: -1 opens and +1 closes."""
SETTLE_STEPS = 10
_IDLE = np.array([0.0] * 6 + [-1.0])
_PLACEMENTS = 100


def rotation_vector(quat_xyzw: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,) of a unit quaternion, its angle in [0, 2 pi] as w says: the published datasets hold this one of the two."""
    w = float(np.clip(quat_xyzw[3], -1.0, 1.0))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quat_xyzw[:3]) * (2.0 * math.acos(w) / sine)


class _Libero:
    """The parts of the package, imported without its prints and warnings."""

    def __init__(self) -> None:
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings(), redirect_stdout(StringIO()):
                warnings.simplefilter("ignore")
                import robosuite
                from libero.libero import benchmark, get_libero_path
                from libero.libero.envs.bddl_utils import robosuite_parse_problem
                from libero.libero.envs.env_wrapper import ControlEnv
        finally:
            logging.disable(logging.NOTSET)
        self.path, self.make, self._suites = get_libero_path, ControlEnv, benchmark.get_benchmark_dict()
        self.parse = robosuite_parse_problem
        self.errors = robosuite.utils.errors.RandomizationError

    def suite(self, name: str) -> Any:
        with redirect_stdout(StringIO()):
            return self._suites[name]()

    def problem(self, task: Any) -> str:
        return os.path.join(self.path("bddl_files"), task.problem_folder, task.bddl_file)


def _show_what_robosuite_draws(option: mujoco.MjvOption) -> None:
    option.geomgroup[0] = 0  # it collides with group 0 and draws group 1


class LiberoWorlds(AdapterWorlds):
    """`num_worlds` LIBERO episodes in this process, each with a model of its own (some hundred megabytes)."""

    proprio_names = PROPRIO_NAMES
    turned_views = (0, 1)

    def __init__(
        self,
        suite: LiberoSuite,
        num_worlds: int,
        *,
        phrasings: Phrasings = "train",
        render: RenderOptions = RenderOptions(),  # noqa: B008 - frozen
        frames_out: Frames | None = None,
    ) -> None:
        if phrasings != "train" and suite.variant("lan") is None:
            raise ValueError(f"suite {suite.name!r} has one sentence a task: phrasings must be train")
        super().__init__(
            suite, num_worlds, action_spec=ACTION_SPEC, cameras=CAMERAS, privileged_dim=PRIVILEGED_DIM,
            phrasings=phrasings, render=render, frames_out=frames_out, show=_show_what_robosuite_draws,
            full_quality=True,
        )  # fmt: skip
        self._libero = _Libero()
        self._published = self._libero.suite(suite.published)
        self._envs: list[Any] = [None] * num_worlds
        self._plans: list[list[tuple[Grasp, float] | None]] = [[] for _ in range(num_worlds)]
        """Of each goal of a world that is a thing's place: how to take hold of the thing, top of the place above it."""
        self._sentences = self._all_sentences()

    def _start(self, i: int, seed: int, task: str | None) -> AdapterEpisode:
        drawn, state = self.suite.scene_of(seed)
        task = task or drawn
        number = self.suite.tasks.index(task)
        if self._envs[i] is None or self.episodes[i].task != task:
            if self._envs[i] is not None:
                self._envs[i].close()
            self._envs[i] = self._make(number)
        env = self._envs[i]
        with numpy_seed(seed):
            self._place(env)
        if state is not None:
            env.set_state(self._published.get_task_init_states(number)[state])
            env.sim.forward()
            env._post_process()
        for _ in range(SETTLE_STEPS):
            env.step(_IDLE)
        self._plans[i] = self._plan(env.env)
        text, rivals = self._sentences[number], [words for words in self._sentences if words != self._sentences[number]]
        rival = rivals[np.random.default_rng([seed, Stream.WORDS]).integers(len(rivals))]
        return AdapterEpisode(seed, task, text, text, rival)

    def _all_sentences(self) -> list[str]:
        """The sentence of each task: of its name or, for LIBERO-PRO's other words and tasks, of its problem file."""
        name = self.suite.variant("lan") if self.phrasings == "heldout" else self.suite.published
        if not str(name).endswith(("_lan", "_task")):
            return [instruction_of(task) for task in self.suite.tasks]
        suite, parse = self._libero.suite(name), self._libero.parse
        problems = [parse(self._libero.problem(suite.get_task(k))) for k in range(len(self.suite.tasks))]
        words = [problem["language_instruction"] for problem in problems]
        return [" ".join(text if isinstance(text, list) else [text]).lower() for text in words]

    def _make(self, number: int) -> Any:
        problem = self._libero.problem(self._published.get_task(number))
        for attempt in range(_PLACEMENTS):
            with numpy_seed(attempt), redirect_stdout(StringIO()):
                try:
                    return self._libero.make(
                        problem, use_camera_obs=False, has_offscreen_renderer=False, ignore_done=True, hard_reset=False
                    )
                except self._libero.errors:
                    continue
        raise RuntimeError(f"LIBERO found no placement of {problem} in {_PLACEMENTS} attempts")

    def _place(self, env: Any) -> None:
        """Draw placements until one is free of overlaps, as LIBERO's wrapper does."""
        for _ in range(_PLACEMENTS):
            try:
                env.env.reset()
                gripper = env.env.robots[0].gripper
                gripper.current_action = np.zeros(gripper.dof)  # as in a new model; a soft reset keeps the last
                return
            except self._libero.errors:
                continue
        raise RuntimeError(f"LIBERO found no placement of {env.env.bddl_file_name} in {_PLACEMENTS} attempts")

    def _step(self, i: int, action_A: NDArray[np.float64]) -> bool:
        return bool(self._envs[i].step(action_A)[2])

    def _read(self, i: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        env = self._envs[i].env
        robot, data = env.robots[0], env.sim.data
        grip = np.array(data.site_xpos[robot.eef_site_id])
        w, x, y, z = data.get_body_xquat(robot.robot_model.eef_name)
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        proprio = np.concatenate([grip, rotation_vector(np.array([x, y, z, w])), fingers])
        goals = np.zeros((GOALS, GOAL_DIM))
        for k, (goal, plan) in enumerate(zip(env.parsed_problem["goal_state"], self._plans[i], strict=False)):
            goals[k, :2] = GOAL_KINDS.get(goal[0], 3), env._eval_predicate(goal)
            if plan is not None:
                thing, place = self._where(env, goal[1]), self._where(env, goal[2])
                grasp, top = plan
                goals[k, 2:] = [
                    *thing, *place, *(thing - grip), *grasp.offset, grasp.yaw, grasp.low[2], grasp.high[2], top,
                ]  # fmt: skip
        return proprio, np.array([self.suite.tasks.index(self.episodes[i].task), *goals.ravel()])

    def _plan(self, env: Any) -> list[tuple[Grasp, float] | None]:
        scene = boxes(env.sim.model._model, env.sim.data._data, set(env.obj_body_id.values()))
        plans: list[tuple[Grasp, float] | None] = []
        for kind, thing, *place in env.parsed_problem["goal_state"][:GOALS]:
            if kind not in GOAL_KINDS:
                plans.append(None)
                continue
            home = getattr(
                env.object_states_dict[place[0]], "parent_name", place[0]
            )  # a place may be a part of a thing
            corners = extent(scene, env.obj_body_id.get(home, -1))
            top = 0.0 if corners is None else corners[1][2] - self._where(env, place[0])[2]
            plans.append((plan_grasp(scene, env.obj_body_id[thing], self._where(env, thing)), float(top)))
        return plans

    @staticmethod
    def _where(env: Any, name: str) -> NDArray[np.float64]:
        return np.array(env.object_states_dict[name].get_geom_state()["pos"])

    def _scene(self, i: int) -> tuple[str, mujoco.MjModel, mujoco.MjData]:
        sim = self._envs[i].sim
        return self.episodes[i].task, sim.model._model, sim.data._data

    def _turn(self, i: int, view: int) -> None:
        """Show a view as the published datasets do, mirrored: LIBERO's pictures have their rows from the bottom up, and
        are turned by 180 degrees by everyone, not flipped. The calibration says so by a negative focal length."""
        self.images[i, view] = self.images[i, view, :, ::-1].copy()
        if self.depth is not None:
            self.depth[i, view] = self.depth[i, view, :, ::-1].copy()
        if self.intrinsics is not None:
            self.intrinsics[i, view, 0, 0] *= -1

    def close(self) -> None:
        """Free the graphics context and LIBERO's environments."""
        super().close()
        for env in self._envs:
            if env is not None:
                env.close()
        self._envs = [None] * self.num_envs
