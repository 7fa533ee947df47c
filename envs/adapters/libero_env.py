"""LIBERO's tasks as environments: Panda, OSC_POSE deltas, published initial states, two cameras, its own pictures.

Runs in LIBERO's own environment: nothing here may need what that lacks. Physics, controller, placement and success are
LIBERO's own. Set up as published evaluations are (openpi, LeRobot): ten idle steps before an episode begins, pictures
as in the published datasets, proprio of hand position, axis-angle and both fingers. Resets are soft: a model is
compiled once, and only its state (and where its fixtures stand) drawn anew.
"""

from __future__ import annotations

import math
import re
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.adapters.adapter_worlds import AdapterEpisode, AdapterWorlds, numpy_seed
from envs.adapters.libero_geometry import (
    Grasp,
    Handle,
    boxes,
    extent,
    joint_columns,
    plan_grasp,
    plan_grasp_aside,
    plan_handle,
    plan_handle_grasp,
    way_out,
    yaw_along,
)
from envs.adapters.libero_package import Libero
from envs.adapters.libero_suites import (
    CAMERAS,
    GOAL_DIM,
    GOAL_KINDS,
    GOALS,
    PRIVILEGED_DIM,
    SLOT,
    TO_OPEN_FIRST,
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
_NARROW = 0.8
"""A place whose width is less than this part of its length is narrow."""
_IDLE_ENVS = 10
"""Environments that are kept for a later episode."""


def rotation_vector(quat_xyzw: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,) of a unit quaternion, its angle in [0, 2 pi] as w says: the published datasets hold this one of the two."""
    w = float(np.clip(quat_xyzw[3], -1.0, 1.0))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quat_xyzw[:3]) * (2.0 * math.acos(w) / sine)


def _show_what_robosuite_draws(option: mujoco.MjvOption) -> None:
    option.geomgroup[0] = 0  # it collides with group 0 and draws group 1


def _exchange(env: Any, rng: np.random.Generator) -> None:
    """Put every thing that is nobody's goal place where another one stood, as it lies and at its own height."""
    places = {name for goal in env.parsed_problem["goal_state"] for name in goal[2:]}
    homes = {getattr(env.object_states_dict[name], "parent_name", name) for name in places}
    joints = [thing.joints[0] for name, thing in env.objects_dict.items() if name not in homes]
    poses = [env.sim.data.get_joint_qpos(joint).copy() for joint in joints]
    for joint, pose, k in zip(joints, poses, rng.permutation(len(joints)), strict=True):
        env.sim.data.set_joint_qpos(joint, np.concatenate([poses[k][:2], pose[2:]]))


type _Plan = tuple[Grasp, float] | Handle | float | None
"""How to take hold of a thing, and the top of its place above the place's position; how to move a joint; or the turn of
the hand for a narrow place, rad."""


class LiberoWorlds(AdapterWorlds):
    """`num_worlds` LIBERO episodes in this process, each with a model of its own (130 MB)."""

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
        self._libero = Libero(suite.published)
        self._envs: list[Any] = [None] * num_worlds
        self._numbers = [-1] * num_worlds
        """The task that each environment is of."""
        self._idle: list[tuple[int, Any]] = []
        """Environments (and their tasks) that no world needs now, the longest idle first."""
        self._plans: list[list[tuple[list[str], _Plan]]] = [[] for _ in range(num_worlds)]
        """By world and goal: LIBERO's predicate (of a drawer that has to be open first, ours) and how to meet it."""
        self._sentences = self._all_sentences()

    def _start(self, i: int, seed: int, task: str | None) -> AdapterEpisode:
        drawn, state = self.suite.scene_of(seed)
        task = task or drawn
        number = self.suite.tasks.index(task)
        env = self._envs[i] = self._environment(i, number)
        self._numbers[i] = number
        with numpy_seed(seed):
            self._libero.place(number, env)
        if state is not None:
            env.set_state(self._libero.published_state(number, state))
        if self.suite.exchanged:
            _exchange(env.env, np.random.default_rng([seed, Stream.EXCHANGE]))
        if state is not None or self.suite.exchanged:
            env.sim.forward()
            env._post_process()
        for _ in range(SETTLE_STEPS):
            env.step(_IDLE)
        self._plans[i] = self._plan(env.env)
        text, rivals = self._sentences[number], [words for words in self._sentences if words != self._sentences[number]]
        rival = rivals[np.random.default_rng([seed, Stream.WORDS]).integers(len(rivals))]
        return AdapterEpisode(seed, task, text, text, rival)

    def _environment(self, i: int, number: int) -> Any:
        """An environment of a task for world `i`: its present one, one that stands idle, or a new one."""
        if self._envs[i] is not None:
            if self._numbers[i] == number:
                return self._envs[i]
            self._idle.append((self._numbers[i], self._envs[i]))
        for k, (of, _) in enumerate(self._idle):
            if of == number:
                return self._idle.pop(k)[1]
        if len(self._idle) > _IDLE_ENVS:
            self._idle.pop(0)[1].close()
        return self._libero.make(number)

    def _all_sentences(self) -> list[str]:
        """The sentence of each task: of its name or, for LIBERO-PRO's other words and tasks, of its problem file."""
        suite = self.suite.variant("lan") if self.phrasings == "heldout" else self.suite.published
        assert suite is not None
        if not suite.endswith(("_lan", "_task")):
            return [instruction_of(task) for task in self.suite.tasks]
        return [self._libero.sentence(number, suite) for number in range(len(self.suite.tasks))]

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
        for k, (goal, plan) in enumerate(self._plans[i]):
            if isinstance(plan, float):
                goals[k, [0, 1, 14]] = SLOT, 1, plan
                continue
            kind = GOAL_KINDS.get(goal[0], 3) if goal in env.parsed_problem["goal_state"] else TO_OPEN_FIRST
            goals[k, :2] = kind, env._eval_predicate(goal)
            if isinstance(plan, Handle):
                goals[k, 2:] = joint_columns(env.sim.model._model, data._data, plan, grip)
            elif plan is not None:
                thing, place = self._where(env, goal[1]), self._where(env, goal[2])
                grasp, top = plan
                goals[k, 2:] = [
                    *thing, *place, *(thing - grip), *grasp.offset, grasp.yaw, grasp.low[2], grasp.high[2], top,
                ]  # fmt: skip
        return proprio, np.array([self._numbers[i], *goals.ravel()])

    def _plan(self, env: Any) -> list[tuple[list[str], _Plan]]:
        """How to meet each goal, and how to open the drawers that are closed and have to take something."""
        model, data = env.sim.model._model, env.sim.data._data
        wanted = env.parsed_problem["goal_state"][:GOALS]
        drawers = [["open", goal[2]] for goal in wanted if goal[0] == "in" and self._joints(env, goal[2])]
        first = [(goal, self._handle(env, *goal)) for goal in drawers if not env._eval_predicate(goal)]
        scene = boxes(model, data, set(env.obj_body_id.values()))
        plans: list[tuple[list[str], _Plan]] = []
        for goal in wanted:
            kind, thing, *place = goal
            if not place:
                plans.append((goal, self._handle(env, kind, thing)))
                continue
            home = getattr(
                env.object_states_dict[place[0]], "parent_name", place[0]
            )  # a place may be a part of a thing
            corners = extent(scene, env.obj_body_id.get(home, -1))
            top = 0.0 if corners is None else corners[1][2] - self._where(env, place[0])[2]
            body, where = env.obj_body_id[thing], self._where(env, thing)
            door = self._handle(env, "close", home) if kind == "in" and ["close", home] in wanted else None
            grasp = door and plan_handle_grasp(scene, body, where, way_out(model, data, door))
            if handle := next((handle for opened, handle in first if handle and opened[1] == place[0]), None):
                way = np.sign(handle.target) * data.xaxis[handle.joint]
                inside = self._where(env, place[0]) + abs(handle.target) * way
                grasp = plan_grasp_aside(scene, body, where, inside, way)
            plans.append((goal, (grasp or plan_grasp(scene, body, where), float(top))))
        slots = [(goal, yaw) for goal in wanted if (yaw := self._slot_yaw(env, goal)) is not None]
        return [*plans, *first, *slots][:GOALS]

    def _slot_yaw(self, env: Any, goal: list[str]) -> float | None:
        """The turn of the hand, its fingers closing across a narrow place without a door, as a caddy's compartment."""
        site = env.object_sites_dict.get(goal[-1]) if goal[0] == "in" else None
        if site is None or self._joints(env, site.parent_name):
            return None
        axes, size = env.sim.data.get_site_xmat(goal[2]), np.abs(np.asarray(site.size))
        narrow, wide = sorted((k for k in range(3) if abs(axes[2, k]) < 0.5), key=lambda k: size[k])
        return yaw_along(axes[:, narrow]) if size[narrow] < _NARROW * size[wide] else None

    def _handle(self, env: Any, kind: str, name: str) -> Handle | None:
        """How to move the joint that a predicate of one name is about; None where there is no such joint."""
        joints = self._joints(env, name)
        owner = env.get_object(getattr(env.object_states_dict[name], "parent_name", name))
        accepted = owner.object_properties.get("articulation", {}).get(f"default_{kind}_ranges")
        if not (joints and accepted):
            return None
        model, data = env.sim.model._model, env.sim.data._data
        return plan_handle(model, data, model.joint(joints[0]).id, accepted)

    @staticmethod
    def _joints(env: Any, name: str) -> list[str]:
        """Hinges and slides of a fixture or of the part of one, as a drawer is."""
        named, model = env.object_sites_dict.get(name) or env.get_object(name), env.sim.model._model
        free = mujoco.mjtJoint.mjJNT_FREE
        return [joint for joint in named.joints or () if model.joint(joint).type[0] != free]

    @staticmethod
    def _where(env: Any, name: str) -> NDArray[np.float64]:
        return np.array(env.object_states_dict[name].get_geom_state()["pos"])

    def ground(self, i: int) -> tuple[float, float, float]:
        """The middle of what the things of world `i` stand on, world frame, m."""
        x, y, z = self._envs[i].env.workspace_offset
        return float(x), float(y), float(z)

    def things(self, i: int) -> list[tuple[str, NDArray[np.float64], bool]]:
        """The free things of world `i`: words (several may share them), position (3,) in the world frame, m, and
        whether the fingers hold it."""
        env = self._envs[i].env
        return [
            (
                re.sub(r"_\d+$", "", name).replace("_", " "),
                self._where(env, name),
                bool(env._check_grasp(env.robots[0].gripper, thing.contact_geoms)),
            )
            for name, thing in env.objects_dict.items()
        ]

    def _scene(self, i: int) -> tuple[str, mujoco.MjModel, mujoco.MjData]:
        sim = self._envs[i].sim
        return str(self._numbers[i]), sim.model._model, sim.data._data

    def _painted(self, i: int) -> mujoco.MjModel:
        return self._libero.complete_model(self._numbers[i])

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
        for env in (*self._envs, *(env for _, env in self._idle)):
            if env is not None:
                env.close()
        self._envs, self._idle = [None] * self.num_envs, []
