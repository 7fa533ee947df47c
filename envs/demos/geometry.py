"""Depth and calibration of the cameras of a demonstration, as features of a LeRobotDataset v3.

Depth is a picture of 16 bits in millimetres, marked as LeRobot 0.6 marks depth maps; the matrices are vectors, row by
row, in the frames of `vla.core.types.Observation`. `vla.data.camera_geometry` reads them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

CameraGeometry = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""Depth (..., H, W), m; intrinsics (..., 3, 3), pixels; extrinsics (..., 4, 4) world_from_camera, m."""
Geometry = dict[str, CameraGeometry]
"""By camera."""

MM = 1000.0
_MOST_MM = 65535
_PNG_LEVEL = 3


def depth_key(camera: str) -> str:
    """Feature of a camera's depth."""
    return f"observation.images.{camera}_depth"


def intrinsics_key(camera: str) -> str:
    """Feature of a camera's intrinsics."""
    return f"observation.intrinsics.{camera}"


def extrinsics_key(camera: str) -> str:
    """Feature of a camera's extrinsics."""
    return f"observation.extrinsics.{camera}"


def stacked_geometry(frames: Sequence[Geometry]) -> Geometry:
    """One episode's geometry, (T, ...) each, from its frames'."""
    return {camera: tuple(map(np.stack, zip(*(f[camera] for f in frames), strict=True))) for camera in frames[0]}  # type: ignore[misc]


def millimetres(depth: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Depth in whole millimetres; 0 where nothing was measured: not finite, not positive, or beyond 65 m."""
    mm = np.round(np.nan_to_num(depth.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) * MM)
    return np.where((mm > 0) & (mm <= _MOST_MM), mm, 0).astype(np.uint16)


def depth_column(depth_THW: NDArray[np.float32]) -> pa.Array:
    """A parquet column of depth pictures, lossless but for rounding to millimetres."""
    encoded = []
    for frame in millimetres(depth_THW):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG", compress_level=_PNG_LEVEL)
        encoded.append(buffer.getvalue())
    names = pa.array([f"frame-{i:06d}.png" for i in range(len(encoded))])
    return pa.StructArray.from_arrays([pa.array(encoded, pa.binary()), names], ["bytes", "path"])


def matrices(camera: str, geometry: CameraGeometry) -> dict[str, NDArray[np.float32]]:
    """Feature -> (T, 9) and (T, 16) of a camera's matrices, row by row."""
    _, inner, outer = geometry
    return {
        intrinsics_key(camera): inner.reshape(len(inner), 9),
        extrinsics_key(camera): outer.reshape(len(outer), 16),
    }


def features(cameras: Sequence[str], size: int) -> dict[str, dict[str, Any]]:
    """Entries of info.json for these cameras' depth and matrices."""
    found: dict[str, dict[str, Any]] = {}
    for camera in cameras:
        found[depth_key(camera)] = {
            "dtype": "image",
            "shape": [size, size, 1],
            "names": ["height", "width", "channels"],
            "info": {"is_depth_map": True, "depth_unit": "mm"},
        }
        for key, side in ((intrinsics_key(camera), 3), (extrinsics_key(camera), 4)):
            names = [f"r{row}c{column}" for row in range(side) for column in range(side)]
            found[key] = {"dtype": "float32", "shape": [side * side], "names": names}
    return found


def depth_stats(depth_THW: NDArray[np.float32]) -> dict[str, list[Any]]:
    """LeRobot's statistics of a depth feature in millimetres, each of shape (1, 1, 1)."""
    values = millimetres(depth_THW).astype(np.float64)
    stats = {"min": values.min(), "max": values.max(), "mean": values.mean(), "std": values.std()}
    stats |= {f"q{q:02d}": np.percentile(values, q) for q in (1, 10, 50, 90, 99)}
    return {name: [[[float(value)]]] for name, value in stats.items()} | {"count": [len(values)]}


def joined_stats(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Statistics of a whole dataset from its episodes'; of quantiles their mean, weighed by the frames."""
    count = np.array([part["count"][0] for part in parts], np.float64)
    weight = count / count.sum()
    of = {name: np.array([part[name][0][0][0] for part in parts]) for name in parts[0] if name != "count"}
    mean = weight @ of["mean"]
    joined = {name: float(weight @ values) for name, values in of.items()}
    joined["std"] = float(np.sqrt(max(0.0, weight @ (of["std"] ** 2 + of["mean"] ** 2) - mean**2)))
    joined |= {"min": float(of["min"].min()), "max": float(of["max"].max())}
    return {name: [[[value]]] for name, value in joined.items()} | {"count": [int(count.sum())]}
