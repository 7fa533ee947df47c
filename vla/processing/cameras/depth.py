"""Depth maps and camera matrices as a model reads them: one square per camera, in metres. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vla.core.types import Observation
from vla.processing.cameras.calibration import NOTHING, lens_problem, measured, off_centre, pose_problem

_NEEDS = "this policy reads depth and calibration of every camera"
_IMPOSSIBLE = {"intrinsics": lens_problem, "extrinsics": pose_problem}


def depth_views(
    cameras: Sequence[str], size: int, obs: Observation
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Depth (B, V, size, size), m, intrinsics (B, V, 3, 3) of pictures of this size and extrinsics (B, V, 4, 4) of
    these cameras. ValueError, one line, naming what the observation lacks or has wrong.

    A map of another size is sampled, not averaged: between a thing and what is behind it there is nothing. "" is a
    camera that the robot lacks: it has measured nothing.
    """
    depth, inner, outer = [], [], []
    for camera in cameras:
        if not camera:
            depth.append(np.zeros((obs.batch_size, size, size), np.float32))
            inner.append(np.tile(np.eye(3, dtype=np.float32), (obs.batch_size, 1, 1)))
            outer.append(np.tile(np.eye(4, dtype=np.float32), (obs.batch_size, 1, 1)))
            continue
        found = _of(camera, "depth", obs.depth, (obs.batch_size, None, None))
        matrix = _of(camera, "intrinsics", obs.intrinsics, (obs.batch_size, 3, 3))
        height, width = found.shape[1:]
        if camera in obs.images and obs.images[camera].shape[1:3] != (height, width):
            pixels = "x".join(map(str, obs.images[camera].shape[1:3]))
            raise ValueError(
                f"the depth of camera '{camera}' has {height}x{width} pixels, its picture {pixels}: align them first"
            )
        depth.append(sampled(found, size))
        inner.append(matrix * np.array([size / width, size / height, 1.0], np.float32)[:, None])
        outer.append(_of(camera, "extrinsics", obs.extrinsics, (obs.batch_size, 4, 4)))
    stacked = (np.stack(part, 1) for part in (depth, inner, outer))
    return tuple(np.ascontiguousarray(part, np.float32) for part in stacked)  # type: ignore[return-value]


def sampled(depth_BHW: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """A square of `size` pixels, each with the depth of the nearest one of the map."""
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(np.int64) for n in depth_BHW.shape[1:])
    same = depth_BHW.shape[1:] == (size, size)
    return depth_BHW if same else depth_BHW[:, rows[:, None], columns]


def _of(
    camera: str, what: str, given: Mapping[str, NDArray[np.float32]] | None, shape: tuple[int | None, ...]
) -> NDArray[np.float32]:
    if given is None or camera not in given:
        raise ValueError(f"the observation lacks the {what} of camera '{camera}': {_NEEDS}")
    values = np.asarray(given[camera])
    fits = values.ndim == len(shape) and all(w in (None, n) for w, n in zip(shape, values.shape, strict=True))
    if not fits or values.dtype.kind != "f":
        wanted = ", ".join("HW"[i - 1] if n is None else str(n) for i, n in enumerate(shape))
        raise ValueError(
            f"the {what} of camera '{camera}' must be floats of shape ({wanted}), got {values.dtype} {values.shape}"
        )
    if what == "depth":
        return values
    if not np.isfinite(values).all():
        raise ValueError(f"the {what} of camera '{camera}' holds NaN or infinity")
    if problem := _IMPOSSIBLE[what](values):
        raise ValueError(f"the {what} of camera '{camera}' {problem[1]}")
    return values


def depth_remarks(obs: Observation) -> dict[str, str]:
    """A line for each camera of an observation whose depth tells nothing, or whose intrinsics are unlikely to belong to
    its depth."""
    found = {}
    for camera, depth in (obs.depth or {}).items():
        inner = (obs.intrinsics or {}).get(camera)
        if not (measured(depth[:, ::8, ::8]).any() or measured(depth).any()):
            found[camera] = (
                f"camera '{camera}' measures {NOTHING}: is it covered, or its depth in mm? Floats are read as metres"
            )
        elif inner is not None and (problem := off_centre(inner, *depth.shape[1:])):
            found[camera] = f"the intrinsics of camera '{camera}' {problem}"
    return found
