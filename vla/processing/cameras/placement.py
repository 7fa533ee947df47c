"""Cameras beside each other and beside the hand: extrinsics that are a pose each, and yet put things elsewhere.

The inverse of a pose is a pose, too. It shows where two cameras see the same thing, and where a camera rides on the
hand: by the inverse, and not as recorded, what they measure or how they move agrees. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from vla.processing.cameras.calibration import FAR_M, NEAR_M

THIN = 4
"""Every so many rows and columns of a depth map that are looked at for where things are."""
_SAME_M = 0.03
"""Depths that lie within this belong to one surface: cameras differ by a pixel's slope, and by their noise."""
_MEET, _TIMES = 0.3, 1.5
"""Share of what one camera measures that another must confirm by the inverse, and how many times as much that must be
as without it, before the inverse is held for the truth."""
_ALIKE = 0.98
"""Share of the best from which another choice of cameras is as good: of mirrored ones nothing tells which is wrong."""
_RIDES_M = 0.02
"""Deviation within episodes from which a camera moves."""
_RIDES = 0.8
"""Agreement with the hand's motion (1: the same but for its size) that a camera on the hand reaches at least."""
_LEAST, _WORSE = 0.03, 3.0
"""The part that a camera's motion lacks of the hand's (0: they are the same): more than this is told, and more than so
many times what it would lack by the inverse. A camera beside the hand lacks a little wherever the hand turns."""
_AXIS = re.compile(r"(.*[^a-z])?x$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Look:
    """The measurements of a camera in N frames, and where it was then."""

    depth_NHW: NDArray[np.float32]
    """m; 0 where nothing was measured."""
    intrinsics_N33: NDArray[np.float32]
    extrinsics_N44: NDArray[np.float32]

    def inverted(self) -> Look:
        """The same, had the inverse of the pose been recorded."""
        return replace(self, extrinsics_N44=np.linalg.inv(self.extrinsics_N44))

    def points(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(N, h, w, 3) m in the extrinsics' frame of every `THIN`th row and column, and where something is measured."""
        depth = self.depth_NHW[:, ::THIN, ::THIN]
        rows, columns = (THIN * np.arange(n, dtype=np.float32) + 0.5 for n in depth.shape[1:])
        lens = self.intrinsics_N33[:, :, :, None, None]
        x = (columns - lens[:, 0, 2]) / lens[:, 0, 0]
        y = (rows[:, None] - lens[:, 1, 2]) / lens[:, 1, 1]
        rays = np.stack(np.broadcast_arrays(x * depth, y * depth, depth), -1)
        at = np.einsum("fij,fhwj->fhwi", self.extrinsics_N44[:, :3, :3], rays)
        return at + self.extrinsics_N44[:, None, None, :3, 3], (depth > NEAR_M) & (depth < FAR_M)


def confirmed(one: Look, other: Look) -> float:
    """The share of what `one` measures that `other` measures in the same frames, at the same place."""
    at, seen = one.points()
    outer, lens = other.extrinsics_N44, other.intrinsics_N33
    local = np.einsum("fji,fhwj->fhwi", outer[:, :3, :3], at - outer[:, None, None, :3, 3])
    ahead = local[..., 2] > NEAR_M
    away = np.where(ahead, local[..., 2], 1.0)
    height, width = other.depth_NHW.shape[1:]
    inside, pixel = ahead & seen, []
    for axis, size in ((0, width), (1, height)):
        place = local[..., axis] / away * lens[:, axis, axis, None, None] + lens[:, axis, 2, None, None]
        inside &= (place >= 0) & (place < size)
        pixel.append(place.clip(0, size - 1).astype(np.int64))
    there = other.depth_NHW[np.arange(len(at))[:, None, None], pixel[1], pixel[0]]
    return float((inside & (np.abs(there - away) < _SAME_M)).sum() / max(seen.sum(), 1))


def apart(looks: Mapping[str, Look]) -> list[tuple[tuple[str, ...], str]]:
    """(cameras, a sentence) of each pair that agrees on where things are by the inverse of one's extrinsics, or of
    both, and not as they are. The frames of all cameras are the same."""
    found = []
    for pair in combinations(looks, 2):
        shares = {}
        for turned in ((), (pair[0],), (pair[1],), pair):
            a, b = (looks[name].inverted() if name in turned else looks[name] for name in pair)
            shares[turned] = max(confirmed(a, b), confirmed(b, a))
        most = max(shares.values())
        if most < _MEET or most < _TIMES * shares[()]:
            continue
        best = [turned for turned, share in shares.items() if share >= _ALIKE * most]
        which = " or of ".join(" and ".join(f"'{name}'" for name in turned) for turned in best)
        found.append(
            (
                tuple(name for name in pair if any(name in turned for turned in best)),
                f"cameras '{pair[0]}' and '{pair[1]}' place what they see apart: {100 * shares[()]:.0f}% of what one "
                f"measures the other confirms, and {100 * most:.0f}% by the inverse of the extrinsics "
                f"of {which}: record robot_from_camera, not camera_from_robot",
            )
        )
    return found


def against_the_hand(
    poses: Mapping[str, NDArray[np.floating]],
    state_FP: NDArray[np.floating],
    names: Sequence[str],
    episode_F: NDArray[np.int64],
) -> list[tuple[tuple[str, ...], str]]:
    """(camera, a sentence) of each camera whose extrinsics (F, 4, 4) move with the hand by their inverse, and not as
    they are. The hand is any three components of the state that are named x, y and z."""
    hands = [_within(state_FP[:, i : i + 3], episode_F) for i in _places(names)]
    hands = [hand for hand in hands if hand.std(0).max() > _RIDES_M]
    found = []
    for camera, pose in poses.items():
        matrix = np.asarray(pose, np.float64)
        here, there = (_within(m[:, :3, 3], episode_F) for m in (matrix, np.linalg.inv(matrix)))
        if not hands or here.std(0).max() < _RIDES_M:
            continue
        now, turned = (max(_agreement(motion, hand) for hand in hands) for motion in (here, there))
        if turned > _RIDES and 1 - now > _LEAST + _WORSE * (1 - turned):
            text = (
                f"camera '{camera}' moves with the hand, but not as its extrinsics say (agreement {now:.2f}, by their "
                f"inverse {turned:.2f}): record robot_from_camera, not camera_from_robot"
            )
            found.append(((camera,), text))
    return found


def _places(names: Sequence[str]) -> list[int]:
    """Where three components in a row are named x, y, z, but for what stands before: no quaternions, no rates."""
    found = []
    for i, name in enumerate(names[:-2]):
        if _AXIS.fullmatch(name):
            stem, letter = name[:-1], ord(name[-1])
            if tuple(names[i + 1 : i + 3]) == (stem + chr(letter + 1), stem + chr(letter + 2)):
                found.append(i)
    return found


def _within(values_FD: NDArray[np.floating], episode_F: NDArray[np.int64]) -> NDArray[np.float64]:
    """Deviations from each episode's mean."""
    _, which, counts = np.unique(episode_F, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(which, weights=column) for column in np.asarray(values_FD, np.float64).T], 1)
    return values_FD - (sums / counts[:, None])[which]


def _agreement(one_F3: NDArray[np.float64], other_F3: NDArray[np.float64]) -> float:
    """Cosine between two motions as whole: 1 where they are the same but for their size."""
    size = np.sqrt((one_F3**2).sum() * (other_F3**2).sum())
    return float((one_F3 * other_F3).sum() / size) if size else 0.0
