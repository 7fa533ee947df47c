"""Pixels of a LeRobotDataset v3: PNGs inside parquet, and mp4 files, each decoded once and in bulk."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vla.data.tables import row_place
from vla.data.video_index import VideoFile, open_video, readable, video_files
from vla.processing.pictures import check_eight_bits

_BATCH = 256
"""Images per task of the thread pool."""


_NO_PICTURE = (OSError, SyntaxError, zlib.error, struct.error, Image.DecompressionBombError)
"""Pillow's errors for damaged files."""


_JPEG_END = b"\xff\xd9"

_ORIENTATION, _UPRIGHT, _QUARTER_TURNS = 0x0112, 1, (5, 6, 7, 8)
"""Exif's tag for how a picture lies, its value for upright, and those that exchange width and height."""


def resized(image: Image.Image, size: int | None) -> NDArray[np.uint8]:
    """Convert to RGB and scale to `size` x `size` pixels (bilinear); None keeps the size. Returns (H, W, 3) uint8."""
    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def decode_image(cell: Any, root: Path, key: str, size: int | None, where: str) -> NDArray[np.uint8]:
    """(H, W, 3) of one cell of an image feature: encoded bytes, or a file relative to the dataset.

    A picture that Exif's orientation marks as turned is turned upright, as LeRobot's reader does."""
    with _opened(cell, root, key, where) as image:
        return resized(ImageOps.exif_transpose(image) if _turned(image) else image, size)


def check_image(cell: Any, root: Path, key: str, where: str) -> tuple[int, int]:
    """(height, width) of one cell of an image feature, read without decoding it. ValueError as `decode_image` raises,
    also for a PNG or JPEG that is cut short."""
    with _opened(cell, root, key, where) as image:
        width, height = reversed(image.size) if _turned(image) in _QUARTER_TURNS else image.size
        if image.format == "JPEG":
            image.fp.seek(-2, io.SEEK_END)
            if image.fp.read(2) != _JPEG_END:
                raise OSError("image file is truncated")
        else:
            image.verify()
    return height, width


def _turned(image: Image.Image) -> int:
    """Exif's orientation where it is not upright, else 0. Only a header is read, nothing decoded."""
    place = image.getexif().get(_ORIENTATION, _UPRIGHT) if "exif" in image.info else _UPRIGHT
    return 0 if place == _UPRIGHT else place


@contextmanager
def _opened(cell: Any, root: Path, key: str, where: str) -> Iterator[Image.Image]:
    """A picture of eight bits, not decoded yet; errors of reading and decoding become one line."""
    encoded, path = _encoded(cell, key, where)
    if not (encoded or path):
        raise ValueError(
            f"feature '{key}' has no picture at {where}: choose the other cameras with --cameras, or delete the "
            "episode with lerobot-edit-dataset"
        )
    try:
        with Image.open(io.BytesIO(encoded) if encoded else root / str(path)) as image:
            check_eight_bits(image.mode, f"feature '{key}' holds a picture at {where}")
            yield image
    except _NO_PICTURE as problem:
        raise ValueError(f"feature '{key}' holds an unreadable image at {where}: {problem}") from None


def _encoded(cell: Any, key: str, where: str) -> tuple[bytes | None, str | None]:
    """(bytes, path) of a cell: a map of them as LeRobot writes it, or one of them alone."""
    if cell is None or isinstance(cell, bytes):
        return cell, None
    if isinstance(cell, str):
        return None, cell
    if isinstance(cell, dict):
        return cell.get("bytes"), cell.get("path")
    raise ValueError(f"feature '{key}' holds a {type(cell).__name__} at {where}, pictures must be encoded (PNG, JPEG)")


def decode_frame(frame: Any, size: int | None, key: str, where: str) -> NDArray[np.uint8]:
    """(H, W, 3) of a decoded video frame. ValueError where the decoder had to invent parts of it."""
    if frame.is_corrupt:
        raise ValueError(
            f"feature '{key}' holds a damaged video frame at {where}: choose the other cameras with --cameras, or "
            "delete the episode with lerobot-edit-dataset"
        )
    return resized(frame.to_image(), size) if size else frame.to_ndarray(format="rgb24")


def mixed_sizes(key: str, one: Sequence[int], other: Sequence[int]) -> ValueError:
    """The one line for a camera whose pictures have two sizes, (H, W) each."""
    sizes = f"{tuple(one)} and {tuple(other)}"
    return ValueError(f"feature '{key}' mixes images of {sizes}: read all at one size (vla train --image-size 96)")


class _Frames:
    """Room for all frames of one camera; its shape is that of the first frame decoded."""

    def __init__(self, key: str, frames: int) -> None:
        self._key, self._frames, self._lock = key, frames, Lock()
        self.array: NDArray[np.uint8] | None = None

    def put(self, row: int, image: NDArray[np.uint8]) -> None:
        """Store the image (H, W, 3) at `row`. ValueError if its size differs from that of the first one stored."""
        if self.array is None:
            with self._lock:
                if self.array is None:
                    self.array = np.empty((self._frames, *image.shape), np.uint8)
        if image.shape != self.array.shape[1:]:
            raise mixed_sizes(self._key, self.array.shape[1:3], image.shape[:2])
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

    def fill(start: int, part: pa.Array) -> int:
        for i in range(len(part)):
            out.put(start + i, decode_image(part[i].as_py(), root, key, size, row_place(table, start + i)))
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


def video_frames(path: Path, key: str) -> Iterator[Any]:
    """The decoded frames of a video, in order. ValueError for a damaged file, and for more than 8 bits of grey."""
    with open_video(path) as container, readable(path):
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number == 0:
                check_depth(frame, key, path)
            yield frame


def check_depth(frame: Any, key: str, path: Path) -> None:
    """ValueError for a video of more than eight bits of grey: converting it would show depth as near black."""
    components = frame.format.components
    if len(components) == 1 and components[0].bits > 8:
        check_eight_bits("I;16", f"feature '{key}' holds frames in {path.name}")


def check_sizes(files: Sequence[VideoFile], key: str, size: int | None) -> None:
    """ValueError if a camera's videos have two sizes and are not resized to one."""
    for file in files if size is None else ():
        if file.height_width != files[0].height_width:
            raise mixed_sizes(key, files[0].height_width, file.height_width)


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
    check_sizes(files, key, size)
    out = _Frames(key, len(table))
    seen = np.zeros(len(table), bool)

    def fill(file: VideoFile) -> int:
        row_at = {int(file.pts[number]): row for number, row in file.row_of.items()}
        for frame in video_frames(file.path, key):
            row = row_at.get(frame.pts)
            if row is not None:
                out.put(row, decode_frame(frame, size, key, row_place(table, row)))
                seen[row] = True
        return len(file.row_of)

    for frames in pool.map(fill, files):
        count(frames)
    if not seen.all():
        row = int(np.flatnonzero(~seen)[0])
        raise ValueError(f"feature '{key}' has no video frame for {row_place(table, row)}: the video is cut short")
    return out.array
