"""Depth and calibration of a camera that cannot be true, or are unlikely to be meant: in recordings and in use alike.

Numbers of another unit, matrices of another picture size and transposed poses all have the right shapes: nothing but
their values tells. Imports no torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEAR_M, FAR_M = 0.01, 10.0
"""A depth outside of this is no measurement: 0 and infinity are what cameras and renderers give where they see
nothing."""
_AWAY_M = 20.0
"""Farther from the robot's origin no camera stands that sees its hand."""
_ROUNDED = 0.02
"""Error of a rotation's products that calibrations written with few digits have."""
_CENTRAL = 0.2
"""Share of a picture's side by which the principal point may lie off its middle: that of a picture half or twice the
size lies off by a quarter or more."""


def pose_problem(extrinsics_N44: NDArray[np.floating]) -> tuple[int, str] | None:
    """(row, words that follow "the extrinsics ...") of the first matrix that no camera's pose in the robot's frame can
    be; None where all can. Numbers must be finite."""
    matrix = np.asarray(extrinsics_N44, np.float64)
    turn, place = matrix[:, :3, :3], matrix[:, :3, 3]
    products = turn @ turn.transpose(0, 2, 1)
    wrong = (
        (
            (np.abs(matrix[:, 3] - [0, 0, 0, 1]) > 1e-4).any(1),
            "are no pose: the last row must be 0 0 0 1 (world_from_camera; transposed?)",
        ),
        (
            (np.abs(products - np.eye(3)) > _ROUNDED).any((1, 2)),
            "are no pose: the first three rows and columns must be a rotation, of orthonormal columns",
        ),
        (
            np.linalg.det(turn) < 0,
            "are no pose: they mirror the world (a left-handed frame, or an axis of wrong sign?)",
        ),
        (
            np.linalg.norm(place, axis=1) > _AWAY_M,
            "put the camera {:.0f} m from the robot's origin: the translation must be in metres (is it in mm?)",
        ),
    )
    for rows, words in wrong:
        if rows.any():
            row = int(rows.argmax())
            return row, words.format(np.linalg.norm(place[row]))
    return None


def lens_problem(intrinsics_N33: NDArray[np.floating]) -> tuple[int, str] | None:
    """(row, words that follow "the intrinsics ...") of the first matrix that no camera has; None where all can be."""
    matrix = np.asarray(intrinsics_N33, np.float64)
    focal = matrix[:, [0, 1], [0, 1]]
    if (rows := (focal <= 0).any(1)).any():
        row = int(rows.argmax())
        return (
            row,
            f"have no focal length: fx and fy must be positive, they are {focal[row, 0]:g} and {focal[row, 1]:g}",
        )
    if (rows := (np.abs(matrix[:, 2] - [0, 0, 1]) > 1e-4).any(1)).any():
        return int(rows.argmax()), "are no camera matrix: the last row must be 0 0 1 (transposed, or scaled?)"
    return None


def off_centre(intrinsics_N33: NDArray[np.floating], height: int, width: int) -> str | None:
    """Words that follow "the intrinsics ..." if the principal point lies far off the middle of a picture of this size
    in any of them."""
    points = np.asarray(intrinsics_N33, np.float64)[:, :2, 2]
    rows = (np.abs(points / [width, height] - 0.5) > _CENTRAL).any(1)
    if not rows.any():
        return None
    x, y = points[rows.argmax()]
    return (
        f"have their principal point at ({x:.4g}, {y:.4g}), far off the middle of the {width}x{height} pixels: are "
        "they those of another picture size? Scale them with the picture"
    )


def measured(depth_NHW: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(N,) whether any pixel of these maps, m, holds a measurement."""
    with np.errstate(invalid="ignore"):
        return ((depth_NHW > NEAR_M) & (depth_NHW < FAR_M)).any((1, 2))


NOTHING = f"no depth between {NEAR_M:g} and {FAR_M:g} m in any pixel"
"""Words that follow "measures ..."."""
