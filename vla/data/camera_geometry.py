"""Depth and calibration of the cameras of a LeRobotDataset v3, as `vla demos --depth` or LeRobot records them.

For a camera NAME, by feature: "observation.images.NAME_depth", marked as a depth map: pictures of 16 bits or floats
with the unit in the feature's info, or LeRobot's video of 12-bit codes; "observation.intrinsics.NAME", 9 numbers, and
"observation.extrinsics.NAME", 16, both row by row and as `vla.core.types.Observation` has them (the frame of the
extrinsics is the robot's).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from vla.data.dataset_meta import IMAGE_PREFIX, check_width, depth_maps, height_width
from vla.data.findings import Finding
from vla.data.tables import row_place, vectors
from vla.data.video_index import open_video, readable, video_files
from vla.processing.cameras.calibration import NOTHING, lens_problem, measured, off_centre, pose_problem
from vla.processing.cameras.depth import sampled
from vla.processing.cameras.placement import Look, against_the_hand, apart
from vla.runtime.machine import free_memory

_MM = {"mm": 1.0, "m": 1000.0}
"""Millimetres of a unit."""
_MOST_MM = 65535
_AT_ONCE = 256
_MEMORY_SHARE = 0.8
_FRAMES = 16
"""Frames that are looked at for where things are."""
_LEAST_SHARE = 0.02
_CODES = 4095
"""Codes of LeRobot's depth videos: 0 is the least depth or less (nothing measured), this one the most or more."""
_BITS = 12
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

    def look(self) -> Look:
        """Some frames, spread over the recording, for where things are."""
        some = self.take(np.unique(np.linspace(0, len(self.depth_mm) - 1, _FRAMES).astype(np.int64)))
        return Look(some.depth_mm.astype(np.float32) / 1000, some.intrinsics, some.extrinsics)


def measured_by(
    geometry: Mapping[str, CameraGeometry], frames: Any
) -> dict[str, dict[str, NDArray[np.float32]] | None]:
    """Fields of an observation at these frames, numbers or a slice: depth in metres, and calibration."""
    seen = {camera: known.take(frames) for camera, known in geometry.items()}
    return {
        "depth": {camera: known.depth_mm.astype(np.float32) / 1000 for camera, known in seen.items()} or None,
        "intrinsics": {camera: known.intrinsics for camera, known in seen.items()} or None,
        "extrinsics": {camera: known.extrinsics for camera, known in seen.items()} or None,
    }


def shares_within(geometry: Mapping[str, CameraGeometry], centre_m: Sequence[float], half_m: float) -> dict[str, float]:
    """Camera -> the share of what it measures that lies within a cube of the extrinsics' frame, `half_m` to each side
    of `centre_m`; of some frames, spread over the recording. 0 where nothing is measured."""
    found = {}
    for camera, known in geometry.items():
        at, seen = known.look().points()
        inside = (np.abs(at - np.asarray(centre_m, np.float32)) <= half_m).all(-1)
        found[camera] = float((inside & seen).sum() / max(seen.sum(), 1))
    return found


def out_of_reach(geometry: Mapping[str, CameraGeometry], centre_m: Sequence[float], half_m: float) -> list[str]:
    """A warning where next to nothing of what the cameras measure lies where coordinates are told."""
    shares = shares_within(geometry, centre_m, half_m)
    if not shares or max(shares.values()) >= _LEAST_SHARE:
        return []
    told = ", ".join(f"{100 * share:.1f}% of '{camera}'" for camera, share in shares.items())
    centre = ", ".join(f"{x:g}" for x in centre_m)
    return [
        f"of what the cameras measure next to nothing ({told}) lies within {half_m:g} m of ({centre}) m, where a "
        "policy is told coordinates: are the extrinsics robot_from_camera, in metres? For another workspace change "
        "XYZConfig from Python (docs/beyond.md)"
    ]


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
    _check_memory(features, [depth for depth, _, _ in keys.values()], len(table), size)
    for camera, (depth, inner, outer) in keys.items():
        every = filmed(root, info, table, depth)
        if features[depth]["dtype"] != "video":
            every = _pictured(root, table, features[depth], depth)
        maps, (height, width) = _collected(every, table, depth, size)
        matrix, poses = matrices(table, features, inner, outer)
        if not _measured(maps).any():
            raise ValueError(
                f"feature '{depth}' holds {NOTHING} of any frame: is depth_unit right in its info in meta/info.json? "
                "Correct it, or leave the camera out (--cameras)"
            )
        if size is not None:
            matrix = matrix * np.array([size / width, size / height, 1.0], np.float32)[:, None]
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


def placement_findings(
    looks: Mapping[str, Look],
    poses: Mapping[str, NDArray[np.float32]],
    state_FP: NDArray[np.floating],
    names: Sequence[str],
    episode_F: NDArray[np.int64],
) -> list[Finding]:
    """Findings about extrinsics (F, 4, 4) of the wrong way round, by what the cameras measure in the same frames and by
    the hand's places in the state."""
    told = [*apart(looks), *against_the_hand(poses, state_FP, names, episode_F)]
    return [Finding("calibration", "warning", text, cameras=cameras) for cameras, text in told]


def shape_findings(features: Mapping[str, Any], camera: str, colours: str) -> list[Finding]:
    """A finding if a camera's depth maps have another size than its pictures, the feature `colours`: the two may not
    lie upon each other, which is how a pixel's depth is found."""
    (height, width), (high, wide) = (height_width(features, key) for key in (colours, depth_key(camera)))
    if (height, width) == (high, wide):
        return []
    text = (
        f"camera '{camera}' has pictures of {height}x{width} pixels and depth of {high}x{wide}: record depth aligned "
        "with the colours, or, if both show the same, read them at one size (vla train --image-size)"
    )
    return [Finding("depth_shape", "warning", text, cameras=(camera,))]


def lens_findings(camera: str, intrinsics_F33: NDArray[np.float32], shape: Sequence[int]) -> list[Finding]:
    """A finding if a camera's intrinsics are unlikely to be those of depth maps of this (height, width)."""
    if problem := off_centre(intrinsics_F33, *shape):
        text = f"the intrinsics of camera '{camera}' {problem}"
        return [Finding("intrinsics_off", "warning", text, cameras=(camera,))]
    return []


def _check_memory(features: Mapping[str, Any], keys: Sequence[str], frames: int, size: int | None) -> None:
    """ValueError where these depth maps would not fit into the memory."""
    pixels = sum(size**2 if size else math.prod(height_width(features, key)) for key in keys)
    needed, available = 2 * frames * pixels, free_memory()
    if needed > 1 << 30 and needed > _MEMORY_SHARE * available:
        raise ValueError(
            f"the depth of {frames} frames of {len(keys)} cameras needs {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} are free: give a smaller --image-size or fewer --cameras (depth is not left on "
            "disk, as --stream leaves pictures)"
        )


def _pictured(
    root: Path, table: pa.Table, feature: Mapping[str, Any], key: str
) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """(row, map (H, W), mm) of a depth feature of pictures."""
    unit, column = depth_unit(feature, key), table.column(key)

    def decode(row: int) -> tuple[int, NDArray[np.uint16]]:
        return row, depth_picture(column[row].as_py(), root, unit, key, lambda: row_place(table, row))

    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(table), _AT_ONCE):
            yield from pool.map(decode, range(start, min(start + _AT_ONCE, len(table))))


def _collected(
    every: Iterable[tuple[int, NDArray[np.uint16]]], table: pa.Table, key: str, size: int | None
) -> tuple[NDArray[np.uint16], tuple[int, ...]]:
    """(F, H, W) of the (row, map) pairs of all rows, sampled at `size` pixels a side if given, and (H, W) as they were.
    ValueError naming the first row without a map, or with one of another size."""
    maps: NDArray[np.uint16] | None = None
    shape: tuple[int, ...] = ()
    there = np.zeros(len(table), bool)
    for row, mm in every:
        shape = shape or mm.shape
        if mm.shape != shape:
            sizes = " and ".join("x".join(map(str, one)) for one in (shape, mm.shape))
            raise ValueError(
                f"feature '{key}' mixes depth maps of {sizes} pixels, the second at {row_place(table, row)}: record it "
                "in one size, or leave the camera out (--cameras)"
            )
        kept = mm if size is None else sampled(mm[None], size)[0]
        if maps is None:
            maps = np.empty((len(table), *kept.shape), np.uint16)
        maps[row], there[row] = kept, True
    if maps is None or not there.all():
        place = row_place(table, int(np.flatnonzero(~there)[0]))
        raise ValueError(f"feature '{key}' has no video frame for {place}: the video is cut short")
    return maps, shape


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


def filmed(
    root: Path, info: dict[str, Any], table: pa.Table, key: str, every: int = 1
) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """(row, map (H, W), mm) of every so many rows of a depth feature that LeRobot has written as a video, in the order
    of its files. ValueError for a video of other numbers than LeRobot's codes."""
    told = info["features"][key].get("info") or {}
    how = {name: told.get(f"video.{name}", usual) for name, usual in _ENCODING.items()}
    if problem := _no_encoding(**how):
        raise ValueError(f"feature '{key}' says in its info in meta/info.json that {problem}: correct it")
    mm_of = _millimetres_of_codes(**how)
    for file in video_files(root, info, table, key):
        row_at = {int(file.pts[number]): row for number, row in file.row_of.items() if row % every == 0}
        with open_video(file.path) as container, readable(file.path):
            stream = container.streams.video[0]
            if (bits := stream.format.components[0].bits) < _BITS:
                raise ValueError(
                    f"feature '{key}' is a video of {bits} bits a pixel, which holds pictures, not LeRobot's "
                    f"{_BITS}-bit codes of depth: record it again as LeRobot 0.6 does, or as pictures of 16 bits"
                )
            for frame in container.decode(stream):
                row = row_at.get(frame.pts)
                if row is not None:
                    codes = frame.to_ndarray(format="gray12le").astype(np.int64).squeeze()
                    yield row, mm_of[codes.clip(0, _CODES)]


def _no_encoding(*, depth_min: Any, depth_max: Any, shift: Any, use_log: Any) -> str | None:
    """Words for numbers that no depth video can have been encoded by."""
    numbers = depth_min, depth_max, shift
    if any(isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one) for one in numbers):
        return f"video.depth_min, depth_max and shift are {depth_min!r}, {depth_max!r} and {shift!r}, not numbers"
    if not 0 <= depth_min < depth_max or (use_log and depth_min + shift <= 0):
        return f"its depth goes from {depth_min:g} to {depth_max:g} m (shift {shift:g})"
    return None


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
