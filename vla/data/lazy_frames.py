"""A camera's frames left on disk and decoded on request: memory does not grow with the dataset.

Behaves like the array (F, H, W, 3) it stands for, as far as training needs: a slice or an array of rows gives those
rows, the same pixels as decoding in bulk. Videos are read from the nearest key frame on (LeRobot writes one every other
frame); images from their parquet row group, of which the last ones read are kept, still encoded, up to a limit.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla.data.decoding import check_depth, check_sizes, decode_frame, decode_image, mixed_sizes
from vla.data.tables import check_columns
from vla.data.video_index import open_video, readable, video_files

ENCODED_LIMIT = 512 << 20
"""Bytes of encoded images kept per camera."""
_OPEN_VIDEOS = 8
_WORTH_DECODING = 32
"""Frames between two wanted ones that are decoded rather than skipped by seeking."""

Rows = NDArray[np.int64] | slice


class Reader(Protocol):
    """Decodes rows of one camera, numbered as in the whole dataset."""

    key: str
    """The camera's feature."""

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Decode these rows into images (H, W, 3) uint8, in the order of `rows`."""

    def files(self) -> list[Path]:
        """The files that hold this camera's images."""


class LazyFrames:
    """(F, H, W, 3) uint8 of one camera, on disk."""

    dtype = np.dtype(np.uint8)

    def __init__(self, reader: Reader, rows: NDArray[np.int64], height_width: tuple[int, int]) -> None:
        """`rows`: which of the dataset's frames these are, in order."""
        self._reader, self._rows, self._size = reader, rows, height_width
        self.most_decoded = 0
        """Frames in the largest request so far: nothing more is ever held decoded."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape (F, H, W, 3) that the array would have in memory."""
        return (len(self._rows), *self._size, 3)

    @property
    def nbytes(self) -> int:
        """Bytes held decoded: none."""
        return 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Rows) -> NDArray[np.uint8]:
        wanted = self._rows[rows]
        if wanted.ndim != 1:
            raise IndexError("frames on disk are indexed by a slice or an array of rows")
        self.most_decoded = max(self.most_decoded, len(wanted))
        unique, back = np.unique(wanted, return_inverse=True)
        frames = self._reader.read(unique)
        out = np.empty((len(wanted), *self._size, 3), np.uint8)
        for place, frame in enumerate(back):
            if frames[frame].shape != out.shape[1:]:
                raise mixed_sizes(self._reader.key, self._size, frames[frame].shape[:2])
            out[place] = frames[frame]
        return out

    def subset(self, rows: Rows) -> LazyFrames:
        """Only these rows, still on disk."""
        return LazyFrames(self._reader, self._rows[rows], self._size)

    def fingerprint(self) -> bytes:
        """Digest of the pixels without decoding them: of the files' content and the row numbers."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self._reader.files():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        digest.update(self._rows.tobytes())
        digest.update(repr(self._size).encode())
        return digest.digest()


class ParquetImages:
    """Images inside parquet files. `order`: the physical row (files one after the other) of each of the dataset's.

    `place`: names a row in messages.
    """

    def __init__(
        self,
        root: Path,
        key: str,
        paths: list[Path],
        order: NDArray[np.int64],
        size: int | None,
        place: Callable[[int], str],
    ) -> None:
        self.key, self._place = key, place
        self._root, self._paths, self._order, self._size = root, paths, order, size
        self._groups: list[tuple[int, int]] = []
        counts = []
        for number, path in enumerate(paths):
            about = pq.read_metadata(path)
            check_columns(about.schema.to_arrow_schema().names, path, root, [key])
            for group in range(about.num_row_groups):
                self._groups.append((number, group))
                counts.append(about.row_group(group).num_rows)
        self._starts = np.cumsum([0, *counts])
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = Lock()

    def files(self) -> list[Path]:
        """The Parquet files that hold this camera's images."""
        return self._paths

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Decode these rows into images (H, W, 3) uint8, in the order of `rows`; each row group is read once."""
        physical = self._order[rows]
        groups = np.searchsorted(self._starts, physical, side="right") - 1
        out: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(rows)
        with self._lock:
            for place in np.argsort(groups, kind="stable"):  # each group is read once per request
                group = int(groups[place])
                cell = self._group(group)[int(physical[place] - self._starts[group])].as_py()
                out[place] = decode_image(cell, self._root, self.key, self._size, self._place(rows[place]))
        return out

    def _group(self, group: int) -> pa.ChunkedArray:
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        number, within = self._groups[group]
        column = pq.ParquetFile(self._paths[number]).read_row_group(within, columns=[self.key]).column(self.key)
        self._kept[group] = column
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > ENCODED_LIMIT:
            self._kept.popitem(last=False)
        return column


class Videos:
    """Frames of mp4 files."""

    def __init__(self, root: Path, info: dict[str, Any], table: pa.Table, key: str, size: int | None) -> None:
        self.key, self._size = key, size
        self._located = video_files(root, info, table, key)
        check_sizes(self._located, key, size)
        self._file = np.full(len(table), -1)
        self._number = np.full(len(table), -1)
        for which, file in enumerate(self._located):
            rows = np.fromiter(file.row_of.values(), np.int64, len(file.row_of))
            self._file[rows] = which
            self._number[rows] = np.fromiter(file.row_of, np.int64, len(file.row_of))
        assert (self._number >= 0).all()  # video_files gives every row a frame, or raises
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()

    def files(self) -> list[Path]:
        """The mp4 files that hold this camera's frames."""
        return [file.path for file in self._located]

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Decode these rows into images (H, W, 3) uint8, in the order of `rows`; each file is decoded forwards once."""
        out: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(rows)
        with self._lock:
            for which in np.unique(self._file[rows]):
                places = np.flatnonzero(self._file[rows] == which)
                places = places[np.argsort(self._number[rows[places]], kind="stable")]
                wanted = {int(self._number[rows[place]]): place for place in places}
                for number, pixels in self._decode(int(which), list(wanted)):
                    out[wanted[number]] = pixels
        return out

    def _decode(self, which: int, numbers: list[int]) -> list[tuple[int, NDArray[np.uint8]]]:
        """These frames of one file; `numbers` ascending."""
        container, file = self._container(which), self._located[which]
        found: list[tuple[int, NDArray[np.uint8]]] = []
        decoding, at = iter(()), -1
        with readable(file.path):
            for wanted in numbers:
                pts, sought = int(file.pts[wanted]), not found or wanted - at > _WORTH_DECODING
                if sought:
                    decoding = self._from(container, pts)
                frame = _first_from(decoding, pts)
                # Past it, or without the frames that it refers to: once more, from the start.
                if sought and frame is not None and (frame.pts > pts or frame.is_corrupt):
                    decoding = self._from(container, int(file.pts[0]))
                    frame = _first_from(decoding, pts)
                if frame is None or frame.pts != pts:
                    raise ValueError(
                        f"feature '{self.key}' has no video frame {wanted} in {file.path.name}: the video is cut short"
                    )
                at = wanted
                check_depth(frame, self.key, file.path)
                where = f"{frame.pts * float(frame.time_base):.3f} s in {file.path.name}"
                found.append((wanted, decode_frame(frame, self._size, self.key, where)))
        return found

    def _from(self, container: Any, pts: int) -> Iterator[Any]:
        """Decoded frames from the last key frame before `pts` on."""
        stream = container.streams.video[0]
        container.seek(pts, stream=stream, backward=True)
        return container.decode(stream)

    def _container(self, which: int) -> Any:
        if which in self._open:
            self._open.move_to_end(which)
            return self._open[which]
        while len(self._open) >= _OPEN_VIDEOS:
            self._open.popitem(last=False)[1].close()
        self._open[which] = open_video(self._located[which].path)
        return self._open[which]


def _first_from(decoding: Iterator[Any], pts: int) -> Any:
    """The first frame of this stamp or a later one; None after the end."""
    return next((frame for frame in decoding if frame.pts is not None and frame.pts >= pts), None)
