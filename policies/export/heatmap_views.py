"""Orthographic views of what depth cameras see, in numpy: those of `vla.model.heatmap.orthographic`, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.model.heatmap.config import COMPONENTS, SIGNS, Workspace

_NEARNESS_BITS = 20
_EMPTY = -1
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Points:
    """The points that the cameras of one scene measured, in the robot's frame."""

    place_3N: Floats
    """m"""
    colour_N: NDArray[np.int64]
    """Red, green and blue as one number, 8 bits each."""

    @staticmethod
    def of(images_VHWC: NDArray[np.uint8], depth_VHW: Floats, intrinsics_V33: Floats, extrinsics_V44: Floats) -> Points:
        """All pixels of a scene's cameras; a depth that is 0 or not finite was not measured."""
        height, width = depth_VHW.shape[1:]
        row, column = (np.arange(count, dtype=np.float32) + np.float32(0.5) for count in (height, width))
        turn, shift = np.moveaxis(extrinsics_V44[:, :3, :3], 1, 0), np.moveaxis(extrinsics_V44[:, :3, 3], 1, 0)
        inner = intrinsics_V33[..., None]
        x = turn[..., 0, None] * ((column - inner[:, 0, 2]) / inner[:, 0, 0])
        y = turn[..., 1, None] * ((row - inner[:, 1, 2]) / inner[:, 1, 1])
        ray = (x + turn[..., 2, None])[..., None, :] + y[..., None]
        seen = (depth_VHW > 0) & (depth_VHW < np.inf)
        place = shift[..., None, None] + np.where(seen, depth_VHW, np.float32(0)) * ray
        red, green, blue = np.moveaxis(images_VHWC[seen].astype(np.int64), -1, 0)
        return Points(place[:, seen], (red << 16) + (green << 8) + blue)

    def within(self, centre_3: Floats, half_m: float) -> NDArray[np.bool_]:
        """(N,) the points that lie in a cube."""
        return np.abs(self.place_3N - centre_3[:, None]).max(0) < half_m


def draw(points: Points, centre_3: Floats, half_m: float, workspace: Workspace) -> NDArray[np.uint8]:
    """Views (3, R, R, 3) of the points in the cube of half side `half_m` around `centre_3`, m: see `render` of
    `vla.model.heatmap.orthographic`."""
    side = workspace.resolution
    inside = points.within(centre_3, half_m)
    half = np.float32(half_m)
    unit = (points.place_3N[:, inside] - centre_3[:, None]) / (2 * half)
    colour = points.colour_N[inside]
    reach = round(float(np.float32(workspace.splat_m * side) / (2 * half)))
    views = np.empty((len(COMPONENTS), side, side, 3), np.uint8)
    for view, (parts, signs) in zip(views, zip(COMPONENTS, SIGNS, strict=True), strict=True):
        right, down, near = (
            unit[part] * np.float32(sign) + np.float32(0.5) for part, sign in zip(parts, signs, strict=True)
        )
        column, row = (np.clip((along * side).astype(np.int64), 0, side - 1) for along in (right, down))
        # One number for nearness and colour: the largest of a pixel's points is what is seen there.
        key = ((near * (1 << _NEARNESS_BITS)).astype(np.int64) << 24) + colour
        canvas = np.full(side * side, _EMPTY, np.int64)
        np.maximum.at(canvas, row * side + column, key)
        seen = _widened(canvas.reshape(side, side), reach)
        seen = np.where(seen == _EMPTY, workspace.background * 0x10101, seen)
        view[:] = np.stack([(seen >> shift) & 255 for shift in (16, 8, 0)], -1)
    return views


def _widened(key_HW: NDArray[np.int64], reach: int) -> NDArray[np.int64]:
    """The largest number within `reach` pixels in both directions: every point drawn as a square."""
    height, width = key_HW.shape
    padded = np.pad(key_HW, reach, constant_values=_EMPTY)
    rows = np.max([padded[shift : shift + height] for shift in range(2 * reach + 1)], 0)
    return np.max([rows[:, shift : shift + width] for shift in range(2 * reach + 1)], 0)


def points_of(seen: Any) -> list[Points]:
    """The points of each scene of a batch, from the processor's arrays."""
    parts = (seen.images_BVHWC, seen.depth_BVHW, seen.intrinsics_BV33, seen.extrinsics_BV44)
    return [Points.of(*scene) for scene in zip(*parts, strict=True)]
