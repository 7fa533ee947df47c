"""Options of what environments render for an observation. Imports no simulator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RenderOptions:
    """Size of the images and the optional fields of `vla.core.types.Observation`. ValueError for a negative history."""

    image_size: int = 84
    """Height and width of every image, pixels."""
    depth: bool = False
    """Render depth, in metres."""
    calibration: bool = False
    """Report the cameras' intrinsics and extrinsics."""
    history: int = 0
    """Number of earlier decisions whose images are shown, too; kept by `VecEnv` backends only."""

    def __post_init__(self) -> None:
        if self.history < 0:
            raise ValueError(f"history must be at least 0 frames, got {self.history}")
