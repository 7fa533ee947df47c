"""The scripted expert of the SO-101 suites: from the simulator's state to positions of the joints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.adapters.so101_env import JOINTS, Hand, make_model
from vla.core.types import ActionChunk, Observation, PolicySpec, Prefix

Vector = NDArray[np.float64]
_SPEED_M = 0.010
"""Farthest that the commanded point of the hand goes in a step (m)."""
_AHEAD_M = 0.035
"""Farthest that it is from where the hand is: servos hang behind, and lower than they are told."""
_OPEN, _CLOSED = 60.0, 8.0
_ABOVE_M, _UP_M = 0.05, 0.10
_DOWN = np.array([0.0, 0.0, -1.0])
_TILT_M = 0.03
"""Metres of error that one radian of tilt counts for."""


class Reach:
    """Inverse kinematics of the arm: the point between the jaws at a place, the hand pointing down as far as it can.

    Damped least squares (Levenberg-Marquardt) from where the joints are; the jaws close across the table's y.
    """

    def __init__(self) -> None:
        self._model = make_model()
        self._data, self.hand = mujoco.MjData(self._model), Hand(self._model)
        self._range = self._model.jnt_range[[self._model.joint(name).id for name in JOINTS]]

    def solve(self, place: Vector, joints: Vector, iterations: int = 12) -> Vector:
        """(5,) joints (rad) near `joints` for which the point between the jaws is at `place` (m)."""
        model, data, hand = self._model, self._data, self.hand
        q = joints.copy()
        linear, angular = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        for _ in range(iterations):
            data.qpos[hand.qpos[:-1]] = q
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            axes = data.site_xmat[hand.site].reshape(3, 3)
            point = hand.point(data)
            mujoco.mj_jac(model, data, linear, angular, point, hand.body)
            tilt = np.cross(axes[:, 0], _DOWN)  # of the axis along which the jaws reach
            square = np.cross(
                axes[:, 2], np.array([0.0, np.sign(axes[1, 2]) or 1.0, 0.0])
            )  # across y, either way round
            error = np.concatenate([place - point, _TILT_M * tilt, 0.5 * _TILT_M * square[2:]])
            rows = [linear, _TILT_M * angular, 0.5 * _TILT_M * angular[2:]]
            jacobian = np.vstack(rows)[:, hand.dofs]
            q = q + np.linalg.solve(jacobian.T @ jacobian + 1e-4 * np.eye(len(q)), jacobian.T @ error)
            q = np.clip(q, self._range[:, 0], self._range[:, 1])
        return q


@dataclass
class _Going:
    """How far one environment's grasp is."""

    phase: int = 0
    steps: int = 0
    """In this phase."""
    point: Vector = field(default_factory=lambda: np.full(3, np.nan))
    """Where the hand is commanded."""


class SO101Expert:
    """Policy of one-step chunks: above the named block, down, close, up; again where the block was lost."""

    spec = PolicySpec(chunk_size=1, n_action_steps=1)

    def __init__(self, num_envs: int) -> None:
        self._reach = Reach()
        self._going = [_Going() for _ in range(num_envs)]

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Begin anew in these environments (all when None)."""
        for i in range(len(self._going)) if env_ids is None else env_ids:
            self._going[i] = _Going()

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Observation of B environments -> action chunk (B, 1, 6)."""
        if obs.privileged is None:
            raise ValueError("the scripted expert needs the simulator's state: Observation.privileged is None")
        rows = zip(obs.environments.tolist(), obs.privileged.astype(np.float64), strict=True)
        return np.stack([self._act(self._going[i], row) for i, row in rows]).astype(np.float32)[:, None]

    def _act(self, going: _Going, state: Vector) -> Vector:
        block, hand, joints = state[0:3], state[6:9], state[9:14]
        if np.isnan(going.point).any():
            going.point = hand.copy()
        goal = self._goal(going, block, hand)
        step = goal - hand
        step *= min(1.0, _SPEED_M / max(np.linalg.norm(step), 1e-9))
        ahead = going.point + step - hand
        going.point = hand + ahead * min(1.0, _AHEAD_M / max(np.linalg.norm(ahead), 1e-9))
        going.steps += 1
        opening = _CLOSED if going.phase in (2, 3) else _OPEN
        return np.append(np.rad2deg(self._reach.solve(going.point, joints)), opening)

    def _goal(self, going: _Going, block: Vector, hand: Vector) -> Vector:
        """Where the hand shall go, after the phase was changed where it is time."""
        above, off = block + [0.0, 0.0, _ABOVE_M], float(np.linalg.norm(hand - block))
        reached = np.linalg.norm(hand - above) < 0.02
        due = (reached, off < 0.01 or going.steps > 45, going.steps >= 10, going.steps > 15 and off > 0.05)
        if due[going.phase]:
            going.phase, going.steps = (going.phase + 1) % 4, 0
        up = np.array([*hand[:2], block[2] + _UP_M])
        return (above, block + [0.0, 0.0, 0.002], block, up)[going.phase]
