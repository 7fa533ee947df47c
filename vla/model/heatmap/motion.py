"""Executing a keyframe: from where the hand is to where it should be, as displacements, up and over what is between."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vla.model.heatmap.config import Motion

Vector = NDArray[np.floating]
_BESIDE_M = 0.03
"""A goal so near to the side is approached straight, whatever the lift flag says."""


def plan(
    hand_3: Vector, commanded_3: Vector, goal_3: Vector, *, open_now: bool, open_then: bool, lift: bool,
    motion: Motion, chunk_size: int, turning: Vector | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Actions (chunk_size, 4): displacements as shares of the fastest one, and the gripper, +1 open or -1 closed; with
    `turning`, rotations (n, 3) from the first step on, (chunk_size, 7): they stand between them.

    The way begins at the commanded position, which may be ahead of the hand. Where it ends within the chunk the hand
    comes to rest, and the gripper moves if there is still time for it to finish; else the next chunk does that.
    """
    steps = _way(hand_3, commanded_3, goal_3, lift=lift, motion=motion, most=chunk_size)
    actions = np.zeros((chunk_size, 4 if turning is None else 7), np.float32)
    actions[: len(steps), :3] = steps
    actions[:, -1] = 1.0 if open_now else -1.0
    moves = len(steps)
    if turning is not None:
        actions[: len(turning), 3:6] = turning
        moves = max(moves, len(turning))
    moves += motion.settle_steps if moves else 0
    if open_then != open_now and moves + motion.gripper_steps <= chunk_size:
        actions[moves:, -1] = 1.0 if open_then else -1.0
    return actions


def _way(
    hand_3: Vector, commanded_3: Vector, goal_3: Vector, *, lift: bool, motion: Motion, most: int
) -> NDArray[np.float64]:
    """(n, 3), n <= most: actions that lead to the goal; none where the hand is there already."""
    if np.abs(goal_3 - hand_3).max() < motion.reached_m:
        return np.zeros((0, 3))
    goal, at = np.asarray(goal_3, np.float64), np.asarray(commanded_3, np.float64)
    stops = [goal]
    if lift and np.linalg.norm((goal - at)[:2]) > _BESIDE_M:
        top = max(at[2], goal[2] + motion.clearance_m)
        stops = [np.array([*at[:2], top]), np.array([*goal[:2], top]), goal]
    found = []
    stride = motion.speed * motion.metres_per_action
    for stop in stops:
        while len(found) < most and np.abs(stop - at).max() > 1e-6:
            step = (stop - at) * min(1.0, stride / np.abs(stop - at).max())
            at = at + step
            found.append(step / motion.metres_per_action)
    return np.array(found).reshape(-1, 3)
