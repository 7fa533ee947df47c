"""The inverse of a pinhole camera, to hold depth and calibration against positions that are known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def backproject(
    depth_HW: NDArray[np.float32], intrinsics_33: NDArray[np.float32], extrinsics_44: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(H, W, 3) world position of what every pixel's centre sees, m. Hartley and Zisserman 2004, section 6.1."""
    height, width = depth_HW.shape
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(intrinsics_33.astype(np.float64)).T
    camera = rays * depth_HW[..., None].astype(np.float64)
    return camera @ extrinsics_44[:3, :3].T.astype(np.float64) + extrinsics_44[:3, 3]
