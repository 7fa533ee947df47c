"""Options of what environments render for an observation. Imports no simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.core.types import IMAGE_SIZE, Policy

MAX_IMAGE_SIZE = 8192
"""Height and width in pixels beyond which graphics drivers have no frame buffers."""


@dataclass(frozen=True)
class RenderOptions:
    """Size of the images and the optional fields of `vla.core.types.Observation`. ValueError for
    numbers that no environment can render."""

    image_size: int = IMAGE_SIZE
    """Height and width of every image, pixels."""
    depth: bool = False
    """Render depth, in metres."""
    calibration: bool = False
    """Report the cameras' intrinsics and extrinsics."""
    history: int = 0
    """Number of earlier decisions whose images are shown, too; kept by `VecEnv` backends only."""

    def __post_init__(self) -> None:
        size = self.image_size
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or not 1 <= size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size must be a whole number of pixels from 1 to {MAX_IMAGE_SIZE:,}, got {size!r}")
        if self.history < 0:
            raise ValueError(f"history must be at least 0 frames, got {self.history}")


def pictures_for(policy: Policy | None) -> int:
    """Height and width in pixels of the images to draw for a policy, so that none is enlarged: the size it asks for."""
    return (None if policy is None else policy.spec.picture_size) or IMAGE_SIZE


def drawn_for(policy: Policy | None) -> dict[str, Any]:
    """Arguments of `envs.make_vec` for what a policy reads: pictures of its size, and depth and calibration only where
    it asks for them, since drawing depth costs as much as the picture."""
    depth = policy is not None and policy.spec.depth is True
    return {"image_size": pictures_for(policy), "depth": depth, "calibration": depth}
