"""robosuite's control step without its overhead: the same arithmetic in the same order, three times as fast.

A control step is 25 physics steps, each after robosuite's operational-space controller. Of the time, the physics is a
fifth: the rest looks names up, copies arrays and computes Jacobians of a base that is screwed down. Here robosuite
takes the first of the physics steps, which turns an action into the controller's goal, and this file the others. Same
numbers to the last bit (`tests/envs/adapters` plays an episode both ways). No robosuite is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ControlMaths:
    """robosuite's own compiled functions (`robosuite.utils.control_utils`)."""

    opspace_matrices: Callable[..., tuple[Array, Array, Array, Array]]
    nullspace_torques: Callable[..., Array]
    orientation_error: Callable[[Array, Array], Array]


class LeanStep:
    """Control steps of one robosuite environment: a Panda on a fixed base under OSC_POSE, with soft resets."""

    def __init__(self, env: Any, maths: ControlMaths) -> None:
        robot = env.robots[0]
        self._env, self._robot, self._maths = env, robot, maths
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._substeps = int(env.control_timestep / env.model_timestep)
        self._actuators = np.array(robot._ref_actuators_indexes_dict["right"])
        self._low, self._high = self._model.actuator_ctrlrange[self._actuators].T.copy()
        osc = robot.part_controllers["right"]
        self._site = self._model.site(osc.ref_name).id
        self._dofs, self._joints = np.array(osc.qvel_index), np.array(osc.qpos_index)
        nv = self._model.nv
        # Jacobian of the grip site: its position above, its rotation below. Views of MuJoCo's arrays cost time as well.
        self._jacobian, self._mass, self._own = np.zeros((6, nv)), np.zeros((nv, nv)), np.zeros((6, len(self._dofs)))
        data = self._data
        self._at, self._turned = data.site_xpos[self._site], data.site_xmat[self._site].reshape(3, 3)
        self._qpos, self._qvel, self._bias, self._ctrl = data.qpos, data.qvel, data.qfrc_bias, data.ctrl

    @staticmethod
    def suits(env: Any) -> bool:
        """True for the robot and controller that `LeanStep` computes; other environments step themselves."""
        robot = env.robots[0]
        osc = getattr(robot, "part_controllers", {}).get("right")
        return (
            len(env.robots) == 1
            and env.lite_physics
            and not robot.is_mobile
            and type(osc).__name__ == "OperationalSpaceController"
            and (osc.impedance_mode, osc.input_ref_frame, osc.input_type) == ("fixed", "base", "delta")
            and osc.use_ori
            and osc.uncoupling
            and osc.interpolator_pos is None
            and osc.interpolator_ori is None
            and osc.num_ref_sites == 1
        )

    def __call__(self, action_A: Array) -> None:
        """One control step, as `env.step(action_A)`; its observations and their sensors stand still."""
        env, model, data = self._env, self._model, self._data
        assert env.sim.data._data is data, "the environment was reset hard: make another LeanStep"
        env.timestep += 1
        env.sim.step1()
        env._pre_action(action_A, True)
        env.sim.step2()
        osc = self._robot.part_controllers["right"]  # a soft reset makes new ones
        goal_at = osc.origin_pos + np.dot(osc.origin_ori, osc.goal_pos)
        goal_turned = np.dot(osc.origin_ori, osc.goal_ori)
        kp, kd, rest = osc.kp, osc.kd, osc.initial_joint
        for _ in range(self._substeps - 1):
            mujoco.mj_step1(model, data)
            torque = self._torque(goal_at, goal_turned, kp, kd, rest)
            self._ctrl[self._actuators] = np.minimum(np.maximum(torque, self._low), self._high)
            mujoco.mj_step2(model, data)
        osc.new_update = True
        env.cur_time += env.control_timestep
        env._post_action(action_A)

    def _torque(self, goal_at: Array, goal_turned: Array, kp: Array, kd: Array, rest: Array) -> Array:
        """Joint torques towards a goal pose, world frame. Khatib 1987; robosuite's `OperationalSpaceController`."""
        model, data, jacobian = self._model, self._data, self._jacobian
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], self._site)
        mujoco.mj_fullM(model, self._mass, data.qM)
        mass = self._mass[self._dofs, :][:, self._dofs]  # in the memory order that their compiled functions know
        own = np.take(jacobian, self._dofs, axis=1, out=self._own)
        at, turned = self._at, self._turned.copy()
        force = (goal_at - at) * kp[:3] + -np.dot(jacobian[:3], self._qvel) * kd[:3]
        twist = self._maths.orientation_error(goal_turned, turned) * kp[3:] + -np.dot(jacobian[3:], self._qvel) * kd[3:]
        _, inertia_at, inertia_turned, nullspace = self._maths.opspace_matrices(mass, own, own[:3], own[3:])
        wrench = np.concatenate([np.dot(inertia_at, force), np.dot(inertia_turned, twist)])
        torque = np.dot(own.T, wrench) + self._bias[self._dofs]
        joints, speeds = self._qpos[self._joints], self._qvel[self._dofs]
        return torque + self._maths.nullspace_torques(mass, nullspace, rest, joints, speeds)
