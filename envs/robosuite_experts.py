"""Scripted expert of the robosuite suites: grasps from above, and lets go over the goal if there is one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vla.types import ActionChunk, Observation

_MAX_DELTA_M, _MAX_DELTA_RAD = 0.05, 0.5
_OPEN, _CLOSED = -1.0, 1.0
_HOVER_M, _CARRY_M, _ABOVE_GOAL_M = 0.10, 0.10, 0.13
_REACH, _DESCEND, _CLOSE, _LIFT, _CARRY, _LOWER, _RELEASE, _RISE = range(8)


def _rotation(quat_wxyz: NDArray[np.float64]) -> NDArray[np.float64]:
    w, x, y, z = quat_wxyz / np.linalg.norm(quat_wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _rotation_vector(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axis times angle (rad), for angles below pi."""
    twice = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    sine = np.linalg.norm(twice) / 2
    angle = np.arctan2(sine, (np.trace(matrix) - 1) / 2)
    return twice * (0.5 if sine < 1e-9 else angle / (2 * sine))


class RobosuiteExpert:
    """Policy of one-step chunks from `envs.robosuite_env`'s proprio and privileged state.

    The fingers close along the grip site's x axis (since robosuite 1.5): that axis is laid along the object's nearest
    face, and the hand points straight down.
    """

    def __init__(self, num_envs: int) -> None:
        self._phase = np.zeros(num_envs, np.int64)
        self._count = np.zeros(num_envs, np.int64)
        self._yaw = np.full(num_envs, np.nan)
        self._carry_z = np.zeros(num_envs)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        ids = slice(None) if env_ids is None else list(env_ids)
        self._phase[ids], self._count[ids], self._yaw[ids] = _REACH, 0, np.nan

    def act(self, obs: Observation) -> ActionChunk:
        """Observation of B worlds -> (B, 1, 7)."""
        if obs.privileged is None:
            raise ValueError("the scripted expert needs the simulator's state: Observation.privileged is None")
        rows = zip(obs.proprio.astype(np.float64), obs.privileged.astype(np.float64), strict=True)
        return np.stack([self._act(i, proprio, state) for i, (proprio, state) in enumerate(rows)])[:, None]

    def _act(self, i: int, proprio: NDArray[np.float64], state: NDArray[np.float64]) -> NDArray[np.float32]:
        grip, rotation = proprio[:3], _rotation(proprio[3:7])
        if np.isnan(self._yaw[i]):
            mine = np.arctan2(rotation[1, 0], rotation[0, 0])
            self._yaw[i] = mine + (state[3] - mine + np.pi / 4) % (np.pi / 2) - np.pi / 4
        c, s = np.cos(self._yaw[i]), np.sin(self._yaw[i])
        wanted = np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])
        turn = _rotation_vector(wanted @ rotation.T)
        goal, gripper, speed = self._decide(i, grip, state, float(np.linalg.norm(turn)))
        move = (goal - grip) / _MAX_DELTA_M
        move *= min(1.0, speed / max(np.abs(move).max(), 1e-9))
        turn = 0.6 * turn / _MAX_DELTA_RAD
        turn *= min(1.0, 1.0 / max(np.abs(turn).max(), 1e-9))
        return np.concatenate([move, turn, [gripper]]).astype(np.float32)

    def _decide(
        self, i: int, grip: NDArray[np.float64], state: NDArray[np.float64], turn: float
    ) -> tuple[NDArray[np.float64], float, float]:
        """(grip position to head for, gripper command, greatest action component)."""
        at, goal, has_goal, grasp_up = state[0:3], state[4:7], state[7] > 0.5, np.array([0.0, 0.0, state[11]])
        grasp, held = at + grasp_up, grip - at
        up = np.array([0.0, 0.0, 1.0])
        self._count[i] += 1

        def enter(phase: int) -> None:
            self._phase[i], self._count[i] = phase, 0

        if self._phase[i] in (_LIFT, _CARRY, _LOWER) and np.linalg.norm(held) > 0.06:
            self.reset([i])  # dropped
            return grasp + _HOVER_M * up, _OPEN, 1.0
        if self._phase[i] == _REACH:
            if np.linalg.norm(grasp + _HOVER_M * up - grip) < 0.015 and turn < 0.05:
                enter(_DESCEND)
            else:
                return grasp + _HOVER_M * up, _OPEN, 1.0
        if self._phase[i] == _DESCEND:
            if (np.linalg.norm(grasp - grip) < 0.006 and turn < 0.05) or self._count[i] > 40:
                enter(_CLOSE)
            else:
                return grasp, _OPEN, 1.0
        if self._phase[i] == _CLOSE:
            if self._count[i] < 6:
                return grasp, _CLOSED, 1.0
            self._carry_z[i] = grip[2] + (_CARRY_M if not has_goal else max(_CARRY_M, goal[2] - at[2] + _ABOVE_GOAL_M))
            enter(_LIFT)
        if self._phase[i] == _LIFT:
            if grip[2] < self._carry_z[i] - 0.02 or not has_goal:
                return np.array([grip[0], grip[1], self._carry_z[i]]), _CLOSED, 1.0
            enter(_CARRY)
        over = goal + held
        if self._phase[i] == _CARRY:
            if np.linalg.norm(over[:2] - grip[:2]) > 0.006 and self._count[i] < 80:
                return np.array([over[0], over[1], self._carry_z[i]]), _CLOSED, 1.0
            enter(_LOWER)
        if self._phase[i] == _LOWER:
            if np.linalg.norm(over - grip) > 0.005 and self._count[i] < 40:
                return over, _CLOSED, 0.5
            enter(_RELEASE)
        if self._phase[i] == _RELEASE:
            if self._count[i] < 6:
                return grip, _OPEN, 1.0
            enter(_RISE)
        return grip + 0.1 * up, _OPEN, 1.0
