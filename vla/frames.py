"""Pixels of a LeRobotDataset v3: PNGs inside parquet, and mp4 files, each decoded once and in bulk."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

_BATCH = 256
"""Images per task of the thread pool."""


def read_parquet(path: Path, root: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        for column in columns or ():
            if column not in file.schema_arrow.names:
                raise ValueError(f"feature '{column}' is in meta/info.json but not in {path.relative_to(root)}")
        return file.read(columns).replace_schema_metadata(None)
    except (pa.ArrowInvalid, OSError) as problem:
        raise ValueError(
            f"{root} is unfinished: {path.relative_to(root)} has no readable footer, as when a recording is killed "
            f"before finalize() ({type(problem).__name__})"
        ) from None


def resized(image: Image.Image, size: int | None) -> NDArray[np.uint8]:
    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def decode_image(cell: dict[str, Any], root: Path, key: str, size: int | None, where: str) -> NDArray[np.uint8]:
    """(H, W, 3) of one cell of an image feature: encoded bytes, or a file relative to the dataset."""
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else root / str(cell["path"])) as image:
            return resized(image, size)
    except OSError as problem:
        raise ValueError(f"feature '{key}' holds an unreadable image at {where}: {problem}") from None


class _Frames:
    """Room for all frames of one camera; its shape is that of the first frame decoded."""

    def __init__(self, key: str, frames: int) -> None:
        self._key, self._frames, self._lock = key, frames, Lock()
        self.array: NDArray[np.uint8] | None = None

    def put(self, row: int, image: NDArray[np.uint8]) -> None:
        if self.array is None:
            with self._lock:
                if self.array is None:
                    self.array = np.empty((self._frames, *image.shape), np.uint8)
        if image.shape != self.array.shape[1:]:
            sizes = f"{self.array.shape[1:3]} and {image.shape[:2]}"
            raise ValueError(f"feature '{self._key}' mixes images of {sizes}: give an image_size")
        self.array[row] = image


def decode_images(
    root: Path,
    table: pa.Table,
    key: str,
    size: int | None,
    pool: ThreadPoolExecutor,
    count: Callable[[int], None],
) -> NDArray[np.uint8]:
    """(F, H, W, 3) of an image feature: encoded bytes, or files relative to the dataset."""
    out = _Frames(key, len(table))

    def fill(start: int, part: pa.StructArray) -> int:
        encoded, paths = part.field("bytes"), part.field("path")
        for i in range(len(part)):
            where = f"episode {table['episode_index'][start + i]}, frame {table['frame_index'][start + i]}"
            cell = {"bytes": encoded[i].as_py(), "path": paths[i].as_py()}
            out.put(start + i, decode_image(cell, root, key, size, where))
        return len(part)

    starts, parts, row = [], [], 0
    for chunk in table.column(key).chunks:  # never combined: a binary column beyond 2 GiB cannot be one array
        for i in range(0, len(chunk), _BATCH):
            parts.append(chunk.slice(i, _BATCH))
            starts.append(row + i)
        row += len(chunk)
    for frames in pool.map(fill, starts, parts):
        count(frames)
    return out.array


@dataclass(frozen=True)
class VideoFile:
    """One mp4, and which of its frames belong to which rows of the dataset."""

    path: Path
    row_of: dict[int, int]
    """Frame number in the file -> row."""


def video_files(root: Path, info: dict[str, Any], table: pa.Table, key: str) -> list[VideoFile]:
    place = [f"videos/{key}/{field}" for field in ("chunk_index", "file_index", "from_timestamp")]
    parts = [
        read_parquet(path, root, ["episode_index", *place])
        for path in sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    ]
    if not parts:
        raise ValueError(f"{root} is unfinished: meta/episodes holds no file, so feature '{key}' cannot be located")
    episodes = pa.concat_tables(parts)
    located = {row.pop("episode_index"): [row[name] for name in place] for row in episodes.to_pylist()}
    files: dict[Path, dict[int, int]] = {}
    stamps = table.column("timestamp").to_numpy()
    for row, episode in enumerate(table.column("episode_index").to_pylist()):
        if episode not in located:
            raise ValueError(f"{root} is unfinished: meta/episodes does not say where '{key}' of episode {episode} is")
        chunk, file, start = located[episode]
        path = root / info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
        files.setdefault(path, {})[round((start + float(stamps[row])) * info["fps"])] = row
    for path in files:
        if not path.is_file():
            raise ValueError(f"feature '{key}' lacks its video file {path.relative_to(root)}")
    return [VideoFile(path, row_of) for path, row_of in files.items()]


def open_video(path: Path) -> Any:
    """A PyAV container whose decoder may use several threads."""
    try:
        import av
    except ImportError:
        raise ValueError("reading video datasets needs PyAV: install the package 'av'") from None
    container = av.open(str(path))
    container.streams.video[0].thread_type = "AUTO"
    return container


def _video_frames(path: Path, fps: float) -> Iterator[tuple[int, Any]]:
    """(frame number, decoded frame) of a video, in order."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            yield round(float(frame.pts * stream.time_base) * fps), frame


def decode_videos(
    root: Path,
    info: dict[str, Any],
    table: pa.Table,
    key: str,
    size: int | None,
    pool: ThreadPoolExecutor,
    count: Callable[[int], None],
) -> NDArray[np.uint8]:
    """(F, H, W, 3) of a video feature, each file decoded once from front to back."""
    files = video_files(root, info, table, key)
    out = _Frames(key, len(table))
    seen = np.zeros(len(table), bool)

    def fill(file: VideoFile) -> int:
        for number, frame in _video_frames(file.path, info["fps"]):
            row = file.row_of.get(number)
            if row is not None:
                out.put(row, resized(frame.to_image(), size) if size else frame.to_ndarray(format="rgb24"))
                seen[row] = True
        return len(file.row_of)

    for frames in pool.map(fill, files):
        count(frames)
    if not seen.all():
        row = int(np.flatnonzero(~seen)[0])
        episode, frame = table["episode_index"][row], table["frame_index"][row]
        raise ValueError(
            f"feature '{key}' has no video frame for episode {episode}, frame {frame}: the video is cut short"
        )
    return out.array
