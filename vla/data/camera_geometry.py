"""Depth and calibration of the cameras of a LeRobotDataset v3, as `vla demos --depth` or LeRobot records them.

For a camera NAME, by feature: "observation.images.NAME_depth", marked as a depth map: pictures of 16 bits or floats
with the unit in the feature's info, or LeRobot's video of 12-bit codes; "observation.intrinsics.NAME", 9 numbers, and
"observation.extrinsics.NAME", 16, both row by row and as `vla.core.types.Observation` has them (the frame of the
extrinsics is the robot's).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from vla.data.dataset_meta import IMAGE_PREFIX, check_width, depth_maps
from vla.data.findings import Finding
from vla.data.tables import row_place, vectors
from vla.data.video_index import open_video, readable, video_files
from vla.processing.calibration import NOTHING, lens_problem, measured, off_centre, pose_problem
from vla.processing.depth import sampled

_MM = {"mm": 1.0, "m": 1000.0}
"""Millimetres of a unit."""
_MOST_MM = 65535
_AT_ONCE = 256
_CODES = 4095
"""Codes of LeRobot's depth videos: 0 is the least depth or less (nothing measured), this one the most or more."""
_ENCODING = {"depth_min": 0.01, "depth_max": 10.0, "shift": 3.5, "use_log": True}
"""How LeRobot 0.6 makes codes of metres, unless the feature's info says otherwise ("video.depth_min")."""


@dataclass(frozen=True, eq=False)
class CameraGeometry:
    """Depth and calibration of one camera in F frames."""

    depth_mm: NDArray[np.uint16]
    """(F, H, W); 0 where nothing was measured."""
    intrinsics: NDArray[np.float32]
    """(F, 3, 3), pixels of the depth map."""
    extrinsics: NDArray[np.float32]
    """(F, 4, 4) world_from_camera, m."""

    def take(self, frames: Any) -> CameraGeometry:
        """These frames, numbers or a slice."""
        return CameraGeometry(self.depth_mm[frames], self.intrinsics[frames], self.extrinsics[frames])


def depth_key(camera: str) -> str:
    """Feature of a camera's depth."""
    return f"{IMAGE_PREFIX}{camera}_depth"


def geometry_features(features: Mapping[str, Any], cameras: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Camera -> its features of depth, intrinsics and extrinsics. ValueError naming the first that is missing."""
    marked = depth_maps(features)
    found = {}
    for camera in cameras:
        keys = depth_key(camera), f"observation.intrinsics.{camera}", f"observation.extrinsics.{camera}"
        for key in keys:
            if key not in features:
                raise ValueError(
                    f"the dataset has no feature '{key}', without which camera '{camera}' tells no depth: record it "
                    "(`vla demos --depth` in simulation), choose other --cameras, or train a policy that reads no depth"
                )
        if f"{camera}_depth" not in marked:
            raise ValueError(f"feature '{keys[0]}' is not marked as a depth map: set is_depth_map in its info")
        for key, width in zip(keys[1:], (9, 16), strict=True):
            check_width(features, key, width)
        found[camera] = keys
    return found


def table_columns(features: Mapping[str, Any], keys: Mapping[str, tuple[str, str, str]]) -> list[str]:
    """Those of these features that lie in the tables: videos do not."""
    return [key for three in keys.values() for key in three if features[key]["dtype"] != "video"]


def read_geometry(
    root: Path,
    info: dict[str, Any],
    table: pa.Table,
    keys: Mapping[str, tuple[str, str, str]],
    size: int | None,
) -> dict[str, CameraGeometry]:
    """Depth and calibration of each camera in every row of `table`, whose columns hold these features; the maps sampled
    at `size` pixels a side, if given."""
    found, features = {}, info["features"]
    for camera, (depth, inner, outer) in keys.items():
        if features[depth]["dtype"] == "video":
            maps = _filmed(root, info, table, depth)
        else:
            maps = _depths(root, table, features[depth], depth)
        matrix, poses = matrices(table, features, inner, outer)
        if not _measured(maps).any():
            raise ValueError(
                f"feature '{depth}' holds {NOTHING} of any frame: is depth_unit right in its info in meta/info.json? "
                "Correct it, or leave the camera out (--cameras)"
            )
        if size is not None:
            height, width = maps.shape[1:]
            matrix = matrix * np.array([size / width, size / height, 1.0], np.float32)[:, None]
            maps = sampled(maps, size)
        found[camera] = CameraGeometry(maps, matrix, poses)
    return found


def matrices(
    table: pa.Table, features: Mapping[str, Any], inner: str, outer: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(F, 3, 3) and (F, 4, 4) of these two features. ValueError naming the first frame whose matrix cannot be true."""
    matrix, poses = (vectors(table, features, key).reshape(-1, n, n) for key, n in ((inner, 3), (outer, 4)))
    for key, problem in ((inner, lens_problem(matrix)), (outer, pose_problem(poses))):
        if problem:
            raise ValueError(
                f"the values of feature '{key}' at {row_place(table, problem[0])} {problem[1]}: record them again, or "
                "leave the camera out (--cameras)"
            )
    return matrix, poses


def geometry_findings(geometry: Mapping[str, CameraGeometry]) -> list[Finding]:
    """Findings about cameras whose depth tells nothing in some frames, or whose intrinsics are hardly theirs."""
    found = []
    for camera, known in geometry.items():
        blind = int((~_measured(known.depth_mm)).sum())
        if blind:
            text = f"camera '{camera}' measures {NOTHING} of {blind} of {len(known.depth_mm)} frames: was it covered?"
            found.append(Finding("depth_missing", "warning", text, cameras=(camera,)))
        found += lens_findings(camera, known.intrinsics, known.depth_mm.shape[1:])
    return found


def lens_findings(camera: str, intrinsics_F33: NDArray[np.float32], shape: Sequence[int]) -> list[Finding]:
    """A finding if a camera's intrinsics are unlikely to be those of depth maps of this (height, width)."""
    if problem := off_centre(intrinsics_F33, *shape):
        text = f"the intrinsics of camera '{camera}' {problem}"
        return [Finding("intrinsics_off", "warning", text, cameras=(camera,))]
    return []


def _depths(root: Path, table: pa.Table, feature: Mapping[str, Any], key: str) -> NDArray[np.uint16]:
    """(F, H, W) of a depth feature of pictures, mm."""
    unit, cells = depth_unit(feature, key), table.column(key).to_pylist()

    def decode(row: int) -> NDArray[np.uint16]:
        return depth_picture(cells[row], root, unit, key, lambda: row_place(table, row))

    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(decode, range(len(cells)))))


def depth_unit(feature: Mapping[str, Any], key: str) -> float:
    """Millimetres of the unit of a depth feature of pictures. ValueError where it says none."""
    unit = (feature.get("info") or {}).get("depth_unit")
    if unit not in _MM:
        raise ValueError(f"feature '{key}' does not say its depth_unit, mm or m, in its info in meta/info.json: {unit}")
    return _MM[unit]


def depth_picture(cell: Any, root: Path, unit: float, key: str, place: Callable[[], str]) -> NDArray[np.uint16]:
    """(H, W) mm of one picture of depth, as it lies in a table. ValueError naming the `place` for what is none."""
    cell = cell or {}
    encoded, path = (cell, None) if isinstance(cell, bytes) else (cell.get("bytes"), cell.get("path"))
    try:
        with Image.open(io.BytesIO(encoded) if encoded else root / str(path)) as image:
            values = np.asarray(image)
    except OSError as problem:
        raise ValueError(f"feature '{key}' holds no depth at {place()}: {problem}") from None
    if values.ndim != 2 or values.dtype == np.uint8:
        raise ValueError(
            f"feature '{key}' holds {values.dtype} of shape {values.shape} at {place()}, not one channel of 16 bits or "
            "floats"
        )
    mm = np.nan_to_num(values.astype(np.float64) * unit, nan=0.0, posinf=0.0, neginf=0.0).round()
    return np.where((mm > 0) & (mm <= _MOST_MM), mm, 0).astype(np.uint16)


def _measured(depth_FHW: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """(F,) whether these maps, mm, hold a measurement; some at a time, for they may fill the memory."""
    parts = [depth_FHW[at : at + _AT_ONCE] for at in range(0, len(depth_FHW), _AT_ONCE)]
    return np.concatenate([measured(part.astype(np.float32) / 1000) for part in parts])


def _filmed(root: Path, info: dict[str, Any], table: pa.Table, key: str) -> NDArray[np.uint16]:
    """(F, H, W) of a depth feature that LeRobot has written as a video, mm."""
    told = info["features"][key].get("info") or {}
    how = {name: told.get(f"video.{name}", usual) for name, usual in _ENCODING.items()}
    mm_of = _millimetres_of_codes(**how)
    maps: list[NDArray[np.uint16] | None] = [None] * len(table)
    for file in video_files(root, info, table, key):
        row_at = {int(file.pts[number]): row for number, row in file.row_of.items()}
        with open_video(file.path) as container, readable(file.path):
            for frame in container.decode(container.streams.video[0]):
                row = row_at.get(frame.pts)
                if row is not None:
                    codes = frame.to_ndarray(format="gray12le").astype(np.int64).squeeze()
                    maps[row] = mm_of[codes.clip(0, _CODES)]
    seen = [one for one in maps if one is not None]
    if len(seen) < len(maps):
        row = next(row for row, one in enumerate(maps) if one is None)
        raise ValueError(f"feature '{key}' has no video frame for {row_place(table, row)}: the video is cut short")
    return np.stack(seen)


def _millimetres_of_codes(*, depth_min: float, depth_max: float, shift: float, use_log: bool) -> NDArray[np.uint16]:
    """(4096,) the depth that each of LeRobot's codes stands for (`lerobot.datasets.depth_utils`)."""
    share = np.arange(_CODES + 1) / _CODES
    if use_log:
        low, high = np.log(depth_min + shift), np.log(depth_max + shift)
        metres = np.exp(low + share * (high - low)) - shift
    else:
        metres = depth_min + share * (depth_max - depth_min)
    mm = (1000 * metres).round().clip(0, _MOST_MM).astype(np.uint16)
    mm[[0, _CODES]] = 0
    return mm
