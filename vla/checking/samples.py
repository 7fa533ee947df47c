"""Episodes to look at: a strip of pictures from every camera, and what state and actions did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vla.checking.check import Report
from vla.checking.motion import IDLE_SECONDS, idle_frames
from vla.checking.recording import FEATURES
from vla.data.lerobot_dataset import on_disk

STILLS = 8
_HEIGHT = 96
"""Greatest height of a picture, pixels."""


@dataclass(frozen=True, eq=False)
class Shown:
    """One episode to look at."""

    number: int
    task: str
    seconds: NDArray[np.float64]
    """(T,) since its start."""
    values: dict[str, NDArray[np.float64]]
    """Feature -> (T, D)."""
    idle: NDArray[np.bool_]
    """(T,)."""
    strips: dict[str, NDArray[np.uint8]]
    """Camera -> pictures (n, H, W, 3) at evenly spread times; without the cameras that cannot be read."""


def chosen(report: Report, first: int, most: int) -> list[int]:
    """The numbers of the episodes to look at, at most `most`: those of errors and warnings, then the `first` ones."""
    told = [finding for finding in report.findings if finding.severity != "note"]
    numbers = [number for finding in told for number in finding.episodes[:3]]
    numbers += [number for finding in told for number in finding.episodes[3:]]
    start = [int(number) for number in report.recording.episodes[:first]]
    kept = list(dict.fromkeys(numbers))[: max(most - len(start), 0)]
    return sorted(set(kept) | set(start))


def shown(report: Report, numbers: Sequence[int], on_episode: Callable[[int], None] = lambda _: None) -> list[Shown]:
    """These episodes' pictures, states and actions. `on_episode(n)`: n of them are read."""
    recording, wanted, found = report.recording, set(numbers), []
    cameras = {}
    for camera, key in recording.cameras.items():
        try:
            cameras[camera] = on_disk(recording.root, recording.info, recording.table, recording.order, key, None)
        except (ValueError, OSError):
            continue  # the report says so
    for place, table in recording.vectors():
        number = int(recording.episodes[place])
        if number not in wanted:
            continue
        rows = recording.rows(place)
        values = {}
        for key in FEATURES:
            try:
                values[key] = recording.values(table, key)
            except ValueError:
                continue
        known = [values[key] / report.scales[key].span for key in FEATURES if key in values and key in report.scales]
        scaled = np.nan_to_num(np.concatenate(known, axis=1)) if known else np.zeros((len(table), 0))
        looked = np.unique(np.linspace(rows.start, rows.stop - 1, STILLS).astype(np.int64))
        strips = {}
        for camera, frames in cameras.items():
            try:
                strips[camera] = np.stack([_small(picture) for picture in frames[looked]])
            except (ValueError, OSError):
                continue
        found.append(
            Shown(
                number=number,
                task=report.tasks.get(number, ""),
                seconds=np.arange(len(table)) / recording.fps,
                values=values,
                idle=idle_frames(scaled, max(2, round(IDLE_SECONDS * recording.fps))) if known else np.zeros(0, bool),
                strips=strips,
            )
        )
        on_episode(len(found))
        if len(found) == len(wanted):
            break
    return found


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    if height <= _HEIGHT:
        return picture
    size = (max(1, round(width * _HEIGHT / height)), _HEIGHT)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
