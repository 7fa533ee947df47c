"""Scripted experts: they read the simulator's state and solve every task. Source of demonstrations and upper bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs.tabletop.control import ControlConfig
from envs.tabletop.shapes import PLATE_THICKNESS_M
from vla.core.types import ActionChunk, Observation, PolicySpec, Prefix

HOVER_M = 0.09
CARRY_M = 0.10
_CLOSE_STEPS = 4
_ALIGN_M = 0.010
_GRASP_DEPTH_M = 0.008
_REACH, _CLOSE, _CARRY, _RELEASE = range(4)


class TabletopExpert:
    """Policy for pick and place from privileged state (see `envs.tabletop.goals.privileged`). Chunk of
    one step.

    Phases: reach above and descend onto the object, close, carry (up; over the plate when placing), release and rise.
    A dropped object sends it back to the first phase.
    """

    spec = PolicySpec(chunk_size=1, n_action_steps=1)

    def __init__(self, num_envs: int, control: ControlConfig | None = None) -> None:
        self.control = control or ControlConfig()
        self._phase = np.zeros(num_envs, np.int64)
        self._count = np.zeros(num_envs, np.int64)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""
        ids = slice(None) if env_ids is None else list(env_ids)
        self._phase[ids] = _REACH
        self._count[ids] = 0

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Observation of B environments -> action chunk (B, 1, 4)."""
        if obs.privileged is None:
            raise ValueError("the scripted expert needs the simulator's state: Observation.privileged is None")
        state = obs.privileged.astype(np.float64)
        goals = np.empty((len(state), 3))
        grip_cmd = np.ones(len(state))
        for i, row in enumerate(state):
            goals[i], grip_cmd[i] = self._decide(i, row)
        delta = (goals - state[:, 13:16]) / self.control.max_delta_m
        action = np.concatenate([np.clip(delta, -1, 1), grip_cmd[:, None]], axis=1)
        return action[:, None].astype(np.float32)

    def _decide(self, i: int, row: np.ndarray) -> tuple[np.ndarray, float]:
        """(commanded target position, gripper command) of environment i."""
        target, offset, to_plate = row[0:3], row[3:6], row[6:8]
        rest, is_place = row[8], row[9] > 0.5
        grip = target - offset
        horizontal = float(np.hypot(offset[0], offset[1]))
        # Tall things are held above their centre: the fingers must clear the table, and the can's lid is in reach.
        grasp = target + np.array([0.0, 0.0, max(0.0, rest - 0.022)])
        if self._phase[i] in (_CARRY,) and np.linalg.norm(offset) > 0.045:
            self._phase[i] = _REACH  # dropped
        if self._phase[i] == _REACH:
            if horizontal < _ALIGN_M and grip[2] - grasp[2] < _GRASP_DEPTH_M:
                self._phase[i], self._count[i] = _CLOSE, 0
            else:
                high = horizontal > 2.0 * _ALIGN_M and grip[2] > grasp[2] + 0.5 * HOVER_M or horizontal > 0.03
                return grasp + np.array([0.0, 0.0, HOVER_M if high else 0.0]), 1.0
        if self._phase[i] == _CLOSE:
            self._count[i] += 1
            if self._count[i] <= _CLOSE_STEPS:
                return grasp, -1.0
            self._phase[i] = _CARRY
        if self._phase[i] == _CARRY:
            if not is_place:
                return np.array([grip[0], grip[1], rest + CARRY_M + 0.08]), -1.0
            hold_z = float(grip[2] - target[2])
            over = float(np.hypot(*to_plate))
            goal_xy = grip[:2] + to_plate
            lift_z = rest + PLATE_THICKNESS_M + 0.07 + hold_z
            down_z = rest + PLATE_THICKNESS_M + 0.002 + hold_z
            if over < 0.015 and target[2] - rest - PLATE_THICKNESS_M < 0.008:
                self._phase[i], self._count[i] = _RELEASE, 0
            elif over < 0.02:
                return np.array([*goal_xy, down_z]), -1.0
            elif target[2] - rest < 0.045:
                return np.array([grip[0], grip[1], lift_z]), -1.0
            else:
                return np.array([*goal_xy, lift_z]), -1.0
        self._count[i] += 1
        if self._count[i] <= 2:
            return grip, 1.0
        return grip + np.array([0.0, 0.0, 0.10]), 1.0
