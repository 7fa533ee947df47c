"""The scripted expert of the suites that have goals: grasps, drops, pushes, stacks, pulls drawers, presses buttons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs.tabletop.control import ControlConfig
from envs.tabletop.goals import GoalKind
from vla.core.types import ActionChunk, Observation, PolicySpec, Prefix

_TRAVEL_M = 0.15
"""Height of the fingertips on the way: above everything that stands on the table, with the palm above the handle."""
_CARRY_M = 0.105
"""Height of a carried thing's underside on the way."""
_CLOSE_STEPS = 5
_ALIGN_M, _DEPTH_M, _NEAR_M = 0.008, 0.005, 0.03
_DROP_M = 0.068
"""Fingertips above a container when they let go: clear of its rim, the palm clear of the drawer's handle."""
_BELOW_TOP_M = 0.027
"""How far below its top a tall thing is held: as low as the palm allows, else it slips."""
_HOVER_M = 0.005
_READY_M = np.array([0.53, 0.0, 0.19])
"""Where the hand waits: in one place, so that nothing changes but what is waited for."""
_CLOSED = 0.12
"""An opening below this needs no closing."""
_SLIDE_M, _SWING_M = 0.018, 0.024
"""Per control step, pushed and carried: faster, a thing tips or slips out of the fingers."""
_CLEAR, _REACH, _CLOSE, _ACT, _RELEASE = range(5)


class GoalExpert:
    """Policy from privileged state (layout: `envs.tabletop.goals.privileged`, full). Chunk of one step.

    Per goal: reach above the subject and descend, close, act (lift, carry, push, pull), release and rise. A dropped
    object sends it back to reaching; a goal reached sends it on to the next.
    """

    spec = PolicySpec(chunk_size=1, n_action_steps=1)

    def __init__(self, num_envs: int, control: ControlConfig | None = None) -> None:
        self.control = control or ControlConfig()
        self._phase = np.full(num_envs, _REACH)
        self._count = np.zeros(num_envs, np.int64)
        self._stage = np.zeros(num_envs, np.int64)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""
        ids = slice(None) if env_ids is None else list(env_ids)
        self._phase[ids], self._count[ids], self._stage[ids] = _REACH, 0, 0

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Observation of B environments -> action chunk (B, 1, 4)."""
        if obs.privileged is None:
            raise ValueError("the scripted expert needs the simulator's state: Observation.privileged is None")
        state = obs.privileged.astype(np.float64)
        action = np.ones((len(state), 4))
        for i, row in enumerate(state):
            goal, action[i, 3] = self._decide(i, row)
            action[i, :3] = np.clip((goal - row[13:16]) / self.control.max_delta_m, -1, 1)
        return action[:, None].astype(np.float32)

    def _enter(self, i: int, phase: int) -> None:
        self._phase[i], self._count[i] = phase, 0

    def _decide(self, i: int, row: np.ndarray) -> tuple[np.ndarray, float]:
        """(commanded target position, gripper command) of environment i."""
        kind, stage = GoalKind(int(row[16:24].argmax())), int(row[27])
        if stage != self._stage[i]:
            self._stage[i] = stage
            self._enter(i, _CLEAR)
        grip = row[0:3] - row[3:6]
        if kind == GoalKind.CLOSE and row[26] < _CLOSED and self._phase[i] == _REACH:
            return _READY_M, 1.0  # nothing to be done but to wait
        if self._phase[i] == _CLEAR:
            self._count[i] += 1
            if self._count[i] <= 2 and kind != GoalKind.PRESS:
                return grip, 1.0
            if grip[2] > _TRAVEL_M - 0.02:
                self._enter(i, _REACH)
            return np.array([grip[0], grip[1], _TRAVEL_M + 0.02]), 1.0
        if kind == GoalKind.PRESS:
            return self._press(row, grip)
        if self._phase[i] in (_REACH, _CLOSE):
            hold = _hold_point(row, kind)
            if self._phase[i] == _REACH:
                if np.hypot(*(hold - grip)[:2]) < _ALIGN_M and grip[2] - hold[2] < _DEPTH_M:
                    self._enter(i, _CLOSE)
                else:
                    return _approach(grip, hold), 1.0
            self._count[i] += 1
            if self._count[i] <= _CLOSE_STEPS:
                return hold, -1.0
            self._enter(i, _ACT)
        if self._phase[i] == _ACT:
            if kind in (GoalKind.OPEN, GoalKind.CLOSE):
                return self._pull(i, row, grip, kind)
            if np.linalg.norm(row[3:6]) > 0.045:
                self._enter(i, _REACH)  # dropped
                return _approach(grip, _hold_point(row, kind)), 1.0
            if kind == GoalKind.LIFT:
                return np.array([grip[0], grip[1], row[8] + 0.18]), -1.0
            if kind == GoalKind.PUSH:
                return self._push(i, row, grip)
            return self._carry(i, row, grip, kind)
        self._count[i] += 1
        if self._count[i] <= 2:
            return grip, 1.0
        if self._count[i] > 30:  # it is not where it should be: once more
            self._enter(i, _CLEAR)
        return grip + np.array([0.0, 0.0, 0.10]), 1.0

    def _press(self, row: np.ndarray, grip: np.ndarray) -> tuple[np.ndarray, float]:
        if np.hypot(*row[3:5]) > _ALIGN_M and grip[2] > row[2]:
            return _approach(grip, row[0:3]), -1.0
        return np.array([row[0], row[1], row[2] - 0.03]), -1.0

    def _pull(self, i: int, row: np.ndarray, grip: np.ndarray, kind: GoalKind) -> tuple[np.ndarray, float]:
        """Drawers open toward the middle of the table, along y."""
        inward = -np.sign(row[1])
        sign = inward if kind == GoalKind.OPEN else -inward
        if np.linalg.norm(row[3:6]) > 0.04:
            self._enter(i, _REACH)  # lost the handle
        return np.array([row[0], grip[1] + sign * 0.03, row[2]]), -1.0

    def _push(self, i: int, row: np.ndarray, grip: np.ndarray) -> tuple[np.ndarray, float]:
        if row[2] - row[8] < 0.5 * _HOVER_M and row[11] < 0 and np.hypot(*row[6:8]) > 0.03:
            return np.array([grip[0], grip[1], grip[2] + 2 * _HOVER_M]), -1.0
        far = float(np.hypot(*row[6:8]))
        if far < 0.012:
            self._enter(i, _RELEASE)
        step = row[6:8] * min(1.0, _SLIDE_M / max(far, 1e-9))
        # A few millimetres up: a hand that sinks while it closes would press the thing onto the table.
        return np.array([*(grip[:2] + step), grip[2] + row[8] + _HOVER_M - row[2]]), -1.0

    def _carry(self, i: int, row: np.ndarray, grip: np.ndarray, kind: GoalKind) -> tuple[np.ndarray, float]:
        rest, floor, hold = row[8], row[24], float(grip[2] - row[2])
        over = float(np.hypot(*row[6:8]))
        down = floor + rest + hold + 0.003
        if kind == GoalKind.IN:
            down = max(down, _DROP_M)
        high = max(_CARRY_M + rest + min(hold, 0.02), down + 0.02)
        goal_xy = grip[:2] + row[6:8]
        near = 0.008 if kind == GoalKind.STACK else 0.015
        if over < near and grip[2] - down < 0.006:
            self._enter(i, _RELEASE)
            return grip, 1.0
        if over < near or (over < 0.025 and grip[2] < high - 0.03):
            return np.array([*goal_xy, down]), -1.0
        if grip[2] < high - 0.02:
            return np.array([grip[0], grip[1], high]), -1.0
        across = goal_xy - row[13:15]
        across *= min(1.0, _SWING_M / max(float(np.hypot(*across)), 1e-9))
        return np.array([*(row[13:15] + across), high]), -1.0


def _hold_point(row: np.ndarray, kind: GoalKind) -> np.ndarray:
    """Where the grip site goes to take hold of the subject: low enough for a firm grip, the palm clear of its top."""
    if kind >= GoalKind.OPEN:
        return row[0:3].copy()
    return row[0:3] + np.array([0.0, 0.0, max(0.0, row[8] - _BELOW_TOP_M)])


def _approach(grip: np.ndarray, hold: np.ndarray) -> np.ndarray:
    """Up, across, down."""
    horizontal = float(np.hypot(*(hold - grip)[:2]))
    if horizontal > _NEAR_M:
        if grip[2] < _TRAVEL_M - 0.03:
            return np.array([grip[0], grip[1], _TRAVEL_M + 0.02])
        return np.array([hold[0], hold[1], _TRAVEL_M])
    if horizontal > _ALIGN_M and grip[2] - hold[2] > 0.05:
        return np.array([hold[0], hold[1], hold[2] + 0.06])
    return hold
