"""Which frame of which mp4 belongs to which row of a LeRobotDataset v3: the frame nearest to the row's time stamp.

A frame belongs to a row if it is less than half a period away, no other row claims it, and it lies within the row's
episode. Anything else is an error that names the stamps: pictures paired with another moment's action train a wrong
policy without a sign. The same index serves reading into memory and streaming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vla.data.tables import parquet_files, read_parquet, refuse_pointer, row_place

_LATE = 0.1
"""Share of a period by which an episode's last frame must precede the next episode's first."""
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_STAMPS = "the timestamps are not those of the video (LeRobot writes frame_index / fps)"
_REMEDY = f"the video is cut short, or {_STAMPS}"
_OTHER_RATE = 0.05
"""Share by which a video's own rate must be below the dataset's to be the reason for a row without a frame."""


@dataclass(frozen=True)
class VideoFile:
    """One mp4, and which of its frames belong to which rows of the dataset."""

    path: Path
    pts: NDArray[np.int64]
    """Presentation time stamps of all its frames, ascending, in the stream's units."""
    height_width: tuple[int, int]
    row_of: dict[int, int]
    """Position in `pts` -> row."""


def video_files(root: Path, info: Mapping[str, Any], table: pa.Table, key: str) -> list[VideoFile]:
    """The files of one camera with their frames' rows. ValueError naming the episode, frame and stamps at fault."""
    places = _places(root, info, key)
    episode = table.column("episode_index").to_numpy()
    numbers, which = np.unique(episode, return_inverse=True)
    for number in numbers.tolist():
        if number not in places:
            raise ValueError(f"{root} is unfinished: meta/episodes does not say where '{key}' of episode {number} is")
        if places[number] is None:
            raise ValueError(
                f"episode {number} has no video of camera '{key}' (meta/episodes holds null): choose the other cameras "
                "with --cameras, or delete the episode with lerobot-edit-dataset"
            )
    starts = np.array([places[number][1] for number in numbers.tolist()])
    stamps = table.column("timestamp").to_numpy().astype(np.float64)
    wanted = starts[which] + stamps
    files = []
    for path in dict.fromkeys(places[number][0] for number in numbers.tolist()):
        if not path.is_file():
            raise ValueError(f"feature '{key}' lacks its video file {path.relative_to(root)}")
        here = np.array([places[number][0] == path for number in numbers.tolist()])
        rows = np.flatnonzero(here[which])
        pts, time_base, size = frame_stamps(path)
        begins = np.unique([place[1] for place in places.values() if place is not None and place[0] == path])
        after = np.searchsorted(begins, starts[which[rows]], side="right")
        ends = np.append(begins, np.inf)[after]
        matched = _nearest(pts * time_base, wanted[rows], starts[which[rows]], ends, 1 / float(info["fps"]))
        seconds = wanted[rows], stamps[rows], ends
        _check(matched, rows, *seconds, pts * time_base, table, key, path.relative_to(root), info)
        files.append(VideoFile(path, pts, size, dict(zip(matched.tolist(), rows.tolist(), strict=True))))
    return files


def frame_stamps(path: Path) -> tuple[NDArray[np.int64], float, tuple[int, int]]:
    """(stamps ascending, seconds per unit, (height, width)) of a video's frames, read without decoding them."""
    with open_video(path) as container, readable(path):
        stream = container.streams.video[0]
        found = [packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size]
        return np.unique(np.array(found, np.int64)), float(stream.time_base), (stream.height, stream.width)


def open_video(path: Path) -> Any:
    """A PyAV container whose decoder may use several threads. ValueError for a file that is no video."""
    try:
        import av
    except ImportError:
        raise ValueError("reading video datasets needs PyAV: install the package 'av'") from None
    with readable(path):
        container = av.open(str(path))
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} holds no video")
    container.streams.video[0].thread_type = "AUTO"
    return container


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the decoder's errors into one line that names the video."""
    from av.error import FFmpegError

    try:
        yield
    except FFmpegError as problem:
        refuse_pointer(path)
        raise ValueError(
            f"{path} cannot be read as a video: it is damaged or cut short ({type(problem).__name__})"
        ) from None


def _places(root: Path, info: Mapping[str, Any], key: str) -> dict[int, tuple[Path, float] | None]:
    """Episode -> (file, seconds at which it starts there), None where meta/episodes holds null."""
    columns = [f"videos/{key}/{field}" for field in ("chunk_index", "file_index", "from_timestamp")]
    parts = [
        read_parquet(path, root, ["episode_index", *columns]) for path in parquet_files(root / "meta" / "episodes")
    ]
    if not parts:
        raise ValueError(f"{root} is unfinished: meta/episodes holds no file, so feature '{key}' cannot be located")
    pattern = info.get("video_path") or _VIDEO_PATH
    found: dict[int, tuple[Path, float] | None] = {}
    for row in pa.concat_tables(parts, promote_options="permissive").to_pylist():
        chunk, file, start = (row[column] for column in columns)
        found[row["episode_index"]] = None
        if None in (chunk, file, start) or start != start:
            continue
        try:
            path = root / pattern.format(video_key=key, chunk_index=int(chunk), file_index=int(file))
            found[row["episode_index"]] = (path, float(start))
        except (LookupError, ValueError, TypeError) as problem:
            raise ValueError(
                f"{root} does not say where '{key}' of episode {row['episode_index']} is: meta/episodes has "
                f"chunk {chunk!r}, file {file!r}, start {start!r}, video_path is {pattern!r} ({problem})"
            ) from None
    return found


def _nearest(
    times: NDArray[np.float64],
    wanted: NDArray[np.float64],
    starts: NDArray[np.float64],
    ends: NDArray[np.float64],
    period: float,
) -> NDArray[np.int64]:
    """For each wanted time the frame nearest to it, as a position in `times`; -1 where it is too far or another's."""
    if not len(times):
        return np.full(len(wanted), -1)
    after = np.searchsorted(times, wanted).clip(1, max(len(times) - 1, 1))
    before = after - 1
    after = after.clip(max=len(times) - 1)
    best = np.where(wanted - times[before] <= times[after] - wanted, before, after)
    near = np.abs(times[best] - wanted) <= period / 2 * 1.001
    own = (times[best] >= starts - period / 2) & (times[best] < ends - _LATE * period)
    return np.where(near & own, best, -1)


def _other_rate(times: NDArray[np.float64], info: Mapping[str, Any]) -> str | None:
    """The words for a video that has fewer frames a second than the dataset, so that some rows have none."""
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    if step * info["fps"] <= 1 + _OTHER_RATE:
        return None
    return (
        f"the video has {1 / step:.3g} frames a second, meta/info.json declares {info['fps']:g}: encode it anew at "
        "that rate, or resample the recording to the video's"
    )


def _beyond(wanted: float, end: float, info: Mapping[str, Any]) -> str | None:
    """The words for a row whose time lies where meta/episodes says that the next episode begins, at `end`."""
    if wanted < end - _LATE / info["fps"]:
        return None
    return f"by meta/episodes the next episode begins at {end:.3f} s of it: its from_timestamp is wrong, or {_STAMPS}"


def _overlap(table: pa.Table, rows: NDArray[np.int64], starts: NDArray[np.float64]) -> str | None:
    """The words for two rows of different episodes, if meta/episodes lays both on the same part of a video."""
    one, other = (int(table["episode_index"][int(row)].as_py()) for row in rows)
    if one == other:
        return None
    return (
        f"meta/episodes says that episode {one} begins at {starts[0]:.3f} s of it and episode {other} at "
        f"{starts[1]:.3f} s, so that they overlap: correct their from_timestamp"
    )


def _check(
    matched: NDArray[np.int64],
    rows: NDArray[np.int64],
    wanted: NDArray[np.float64],
    stamps: NDArray[np.float64],
    ends: NDArray[np.float64],
    times: NDArray[np.float64],
    table: pa.Table,
    key: str,
    path: Path,
    info: Mapping[str, Any],
) -> None:
    """ValueError naming the first row that has no frame of its own."""
    if (matched < 0).any():
        at = int(np.flatnonzero(matched < 0)[0])
        nearest = f"{times[np.abs(times - wanted[at]).argmin()]:.3f} s" if len(times) else "none"
        raise ValueError(
            f"feature '{key}' has no video frame for {row_place(table, rows[at])}: its timestamp {stamps[at]:.3f} s is "
            f"{wanted[at]:.3f} s in {path}, the nearest frame is {nearest}, and one of this episode must be within "
            f"{0.5 / info['fps']:.3f} s: {_other_rate(times, info) or _beyond(wanted[at], ends[at], info) or _REMEDY}"
        )
    order = np.argsort(matched, kind="stable")
    twice = np.flatnonzero(np.diff(matched[order]) == 0)
    if len(twice):
        a, b = order[twice[0]], order[twice[0] + 1]
        raise ValueError(
            f"feature '{key}' has one video frame for two rows: {row_place(table, rows[a])} at {stamps[a]:.3f} s and "
            f"{row_place(table, rows[b])} at {stamps[b]:.3f} s are both nearest to the frame at "
            f"{times[matched[a]]:.3f} s in {path}: "
            f"{_overlap(table, rows[[a, b]], (wanted - stamps)[[a, b]]) or _other_rate(times, info) or _STAMPS}"
        )
    same = np.diff(table.column("episode_index").to_numpy()[rows]) == 0
    if len(back := np.flatnonzero(same & (np.diff(matched) < 0))):
        a, b = back[0], back[0] + 1
        raise ValueError(
            f"feature '{key}' is out of order: {row_place(table, rows[b])} has the timestamp {stamps[b]:.3f} s, before "
            f"frame {table['frame_index'][int(rows[a])]}'s {stamps[a]:.3f} s"
        )
