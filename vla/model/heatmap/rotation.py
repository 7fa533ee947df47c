"""Orientations of a hand in bins of 5 degrees about three axes, and turning from one to another. Imports no torch.

BridgeVLA says of a keyframe's orientation in which of 72 bins each of its three Euler angles lies. Ours are roll, pitch
and yaw about the robot's fixed x, y and z, in this order: a scene turned about the vertical turns the yaw alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

BINS = 72
WIDTH_RAD = 2 * np.pi / BINS
_SLOWEST = 0.05
"""A hand that was never turned about an axis has no bounds there; it is turned no slower than this."""
_ASIDE = 0.1
"""Share of a rotation about an axis that bounds do not slow down: it is cut off."""


def matrices(quat_N4: Floats) -> NDArray[np.float64]:
    """(N, 3, 3) of quaternions w, x, y, z of any length but 0."""
    w, x, y, z = (np.asarray(quat_N4, np.float64) / np.linalg.norm(quat_N4, axis=-1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def angles_of(turn_N33: Floats) -> NDArray[np.float64]:
    """(N, 3) roll, pitch and yaw, rad. Where the pitch is a right angle roll and yaw are one; it is called yaw."""
    pitch = np.arcsin(np.clip(-turn_N33[:, 2, 0], -1.0, 1.0))
    upright = np.abs(turn_N33[:, 2, 0]) > 1 - 1e-9
    roll = np.where(upright, 0.0, np.arctan2(turn_N33[:, 2, 1], turn_N33[:, 2, 2]))
    yaw = np.where(
        upright, np.arctan2(-turn_N33[:, 0, 1], turn_N33[:, 1, 1]), np.arctan2(turn_N33[:, 1, 0], turn_N33[:, 0, 0])
    )
    return np.stack([roll, pitch, yaw], -1)


def turn_of(angles_N3: Floats) -> NDArray[np.float64]:
    """(N, 3, 3) of roll, pitch and yaw, rad: first about x, then y, then z."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(angles_N3).T, np.sin(angles_N3).T
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def bins_of(angles_N3: Floats) -> NDArray[np.int64]:
    """(N, 3) the bins, 0 to 71, in which angles lie; that of 0 rad is bin 0's middle, so that a hand which points
    straight down does not lie on a border."""
    return np.round(np.asarray(angles_N3) / WIDTH_RAD).astype(np.int64) % BINS


def middles(bins_N3: NDArray[np.integer]) -> NDArray[np.float64]:
    """(N, 3) the middles of bins, rad."""
    return bins_N3 * WIDTH_RAD


def vector_of(turn_33: Floats) -> NDArray[np.float64]:
    """(3,) the axis of a rotation times its angle, 0 to pi, rad."""
    axis = np.array([turn_33[2, 1] - turn_33[1, 2], turn_33[0, 2] - turn_33[2, 0], turn_33[1, 0] - turn_33[0, 1]])
    sine, cosine = np.linalg.norm(axis) / 2, (np.trace(turn_33) - 1) / 2
    if sine > 1e-6:
        return axis / (2 * sine) * np.arctan2(sine, cosine)
    if cosine > 0:
        return axis / 2
    column = int(np.argmax(np.diag(turn_33)))  # half a turn: the axis is what it leaves as it is
    along = (turn_33 + np.eye(3))[:, column]
    return np.pi * along / np.linalg.norm(along)


def turns(
    now_33: Floats, goal_33: Floats, *, radians_per_action: float, speed: float, most: int,
    bounds: tuple[Floats, Floats] = (-np.ones(3), np.ones(3)),
) -> Floats:  # fmt: skip
    """(n, 3), n <= most: actions that turn the hand from one orientation to the other about one axis of the robot's
    frame, at most `speed` long and within `bounds`; none where less than half a bin is left."""
    way = vector_of(goal_33 @ now_33.T)
    angle = float(np.linalg.norm(way))
    if angle < WIDTH_RAD / 2:
        return np.zeros((0, 3))
    along = np.abs(way) / angle
    bound = np.maximum(np.where(way > 0, bounds[1], -bounds[0]), _SLOWEST)
    speed = min(speed, *(bound[along > _ASIDE] / along[along > _ASIDE]))
    count = int(np.ceil(angle / (speed * radians_per_action) - 1e-9))
    return np.tile(way / count / radians_per_action, (min(count, most), 1))
