"""Keyframes of demonstrations: the few poses that a task is made of, and what every frame before one has to say.

A keyframe is where the gripper is told to open or close, where the hand comes to rest, and where the episode ends
(James and Davison 2022, ARM). A frame is labelled with the keyframe that it is on the way to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla.model.heatmap.rotation import vector_of

Floats = NDArray[np.floating]

STILL_FRAMES, STILL_M = 4, 0.004
"""A hand that moves less than this over so many frames stands still."""
GRIPPING_FRAMES = 3
"""Frames after the gripper was told to move in which it still moves: they say nothing about the next keyframe."""
_BESIDE = 8
"""A rest so few frames from a change of the gripper belongs to that."""
_LARGE, _FOLLOWS = 0.3, 0.5
"""Actions from which their scale is read, as a share of the fastest; and how well motion must correlate with them."""
_TURNING = 0.1
"""The same for rotations, which are slower."""
FAR_M, ABOVE_M, OVER_M = 0.03, 0.03, 0.02
"""A hand comes from above that was further than the first to the side, and is higher than the second when it first is
within the third."""


@dataclass(frozen=True)
class Labels:
    """For every frame of one episode, T of them, the keyframe ahead."""

    target_T: NDArray[np.int64]
    """Its frame; -1 where there is none to learn."""
    open_T: NDArray[np.bool_]
    """The gripper's command there."""
    lift_T: NDArray[np.bool_]
    """The hand comes to it from above."""
    over_T: NDArray[np.bool_]
    """The episode's last keyframe has been reached: nothing is ahead."""


def keyframes(hand_T3: Floats, open_T: NDArray[np.bool_]) -> list[int]:
    """Frames of one episode that are keyframes, in order. `open_T`: the gripper's command at every frame.

    A change of the command at frame t makes t a keyframe: the hand is there, the gripper about to move.
    """
    last = len(hand_T3) - 1
    changes = (np.flatnonzero(open_T[1:] != open_T[:-1]) + 1).tolist()
    found = set(changes)
    moved = np.linalg.norm(hand_T3[STILL_FRAMES:] - hand_T3[:-STILL_FRAMES], axis=-1)
    still = np.append(moved < STILL_M, np.zeros(min(STILL_FRAMES, len(hand_T3)), bool))
    for start in np.flatnonzero(still[1:] & ~still[:-1]) + 1:
        if all(abs(start - other) > _BESIDE for other in (*changes, 0, last)):
            found.add(int(start))
    return sorted(found | {last})


def label(hand_T3: Floats, open_T: NDArray[np.bool_]) -> Labels:
    """The labels of one episode."""
    length, marks = len(hand_T3), keyframes(hand_T3, open_T)
    target, opened, lift = np.full(length, -1), np.ones(length, bool), np.zeros(length, bool)
    start = last = 0
    for mark in marks:
        last = start
        changes = mark > 0 and open_T[mark] != open_T[mark - 1]
        # At a change's own frame the hand is there and the gripper has still to be told.
        end = mark + 1 if changes else mark
        if end <= start:  # the episode ends while the gripper still moves
            continue
        rows = np.arange(start, end)
        target[rows], opened[rows] = mark, open_T[mark]
        lift[rows] = _from_above(hand_T3[start : mark + 1], rows - start)
        start = mark + 1 + GRIPPING_FRAMES if changes else mark
    apart = np.linalg.norm(hand_T3 - hand_T3[-1], axis=-1)
    arrived = length - int(np.argmax((apart >= STILL_M)[::-1])) if (apart >= STILL_M).any() else length - 1
    over = np.arange(length) >= min(length - 1, max(arrived, last))
    target[over], lift[over], opened[over] = -1, False, open_T[over]
    return Labels(target, opened, lift, over)


def _from_above(way_N3: Floats, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For these rows of the way to a keyframe, its last row: whether the hand comes to it from above."""
    apart = np.linalg.norm(way_N3[:, :2] - way_N3[-1, :2], axis=-1)
    above = way_N3[:, 2] - way_N3[-1, 2]
    found = np.zeros(len(rows), bool)
    for place, row in enumerate(rows):
        if row < len(way_N3) and apart[row] > FAR_M:
            over = row + int(np.argmax(apart[row:] < OVER_M))
            found[place] = above[over] > ABOVE_M
    return found


def metres_per_action(command_T3: Floats, action_T3: Floats, episode_T: NDArray[np.int64], *, frames: int = 1) -> float:
    """Displacement that an action component of 1 commands: the upper quartile of what large actions did in `frames`
    frames (more than one where only the hand's own position is known, which follows with a delay).

    Not the mean: what disturbs demonstrations is cut off at the fastest action, so most of them do less than they say,
    and a hand that is thought to be slow goes too far, one that is thought to be fast comes in two steps. ValueError
    where the motion does not follow the actions: they are no displacements, then.
    """
    ends = np.arange(frames, len(command_T3))
    ends = ends[episode_T[ends] == episode_T[ends - frames]]
    summed = np.concatenate([np.zeros((1, 3)), np.cumsum(action_T3.astype(np.float64), 0)])
    told = (summed[ends] - summed[ends - frames]).ravel()
    done = (command_T3[ends] - command_T3[ends - frames]).astype(np.float64).ravel()
    large = np.abs(told) > _LARGE * frames
    follows = float(np.corrcoef(told, done)[0, 1]) if large.any() and done.std() > 0 else 0.0
    if not follows > _FOLLOWS:
        raise ValueError(
            "the hand does not follow the actions dx, dy, dz of these demonstrations: heat-maps need actions that "
            "displace it"
        )
    return float(np.quantile(done[large] / told[large], 0.75))


def radians_per_action(
    turn_T33: Floats, action_T3: Floats, episode_T: NDArray[np.int64], *, frames: int, otherwise: float
) -> float:
    """Rotation that action components of length 1 command, read as `metres_per_action` is, along the axis that was
    asked for; `otherwise` for demonstrations that hardly turn the hand."""
    summed = np.concatenate([np.zeros((1, 3)), np.cumsum(action_T3.astype(np.float64), 0)])
    found = []
    for end in range(frames, len(turn_T33)):
        told = summed[end] - summed[end - frames]
        length = float(np.linalg.norm(told))
        if episode_T[end] == episode_T[end - frames] and length > _TURNING * frames:
            found.append(float(vector_of(turn_T33[end] @ turn_T33[end - frames].T) @ told) / length**2)
    return float(np.quantile(found, 0.75)) if len(found) >= frames and np.median(found) > 0 else otherwise
