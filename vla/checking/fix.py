"""A cleaned copy of a recording: idle ends cut off, episodes left out, cameras renamed. LeRobot's own writer makes it.

Frames are copied as they are, time stamps become frame_index / fps, and videos are encoded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla.checking.check import Report
from vla.checking.episodes import IDLE_END_SECONDS
from vla.core.config import nearest
from vla.core.disk import remove, temporary, writing
from vla.data.dataset_meta import IMAGE_PREFIX
from vla.data.lerobot_dataset import on_disk
from vla.data.lerobot_writer import new_dataset, quietly
from vla.data.tables import PRIVILEGED_FILE, instructions, numbers, read_parquet

_KEPT_SECONDS = 0.25
"""Idle time that stays at a cut end: the robot's last rest shows where it began and that it is done."""
_AT_ONCE = 32
"""Pictures held decoded."""
_OUTCOME = "next."
"""Begins the names of features that say what a frame's action led to."""
_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class Plan:
    """Frames that a cleaned copy keeps, and names of its cameras."""

    kept: dict[int, slice]
    """Place of an episode -> its rows that are copied, in order."""
    cameras: dict[str, str]
    """Feature of a camera -> its feature in the copy."""
    cut: int
    """Idle frames that are cut off."""
    dropped: int
    """Episodes that are left out."""
    image_size: int | None = None
    """Height and width of all pictures of the copy; None: as they are."""

    @property
    def frames(self) -> int:
        """Frames of the copy."""
        return sum(rows.stop - rows.start for rows in self.kept.values())


def plan(report: Report, drop: Sequence[int], rename: Mapping[str, str], image_size: int | None = None) -> Plan:
    """The copy without the episodes `drop`, cut where an end is idle, with cameras renamed and resized.

    ValueError for an episode or camera that is not there, for one that cannot be copied, and if nothing would change.
    """
    recording = report.recording
    present = recording.episodes.tolist()
    if missing := [number for number in drop if number not in present]:
        raise ValueError(
            f"there is no episode {missing[0]} to leave out, the dataset has {present[0]} to {present[-1]}"
        )
    facts = {episode.number: episode for episode in report.episodes}
    kept, cut = {}, 0
    for place, number in enumerate(present):
        if number in drop:
            continue
        if number not in facts:
            raise ValueError(
                f"episode {number} holds values that cannot be copied (see its finding): --drop {number}, too"
            )
        rows, (start, end, _) = recording.rows(place), facts[number].idle
        first, last = (_cut(idle, recording.fps) if start < facts[number].length else 0 for idle in (start, end))
        kept[place] = slice(rows.start + first, rows.stop - last)
        cut += first + last
    if not kept:
        raise ValueError("all episodes would be left out: nothing remains to be written")
    cameras = _renamed(recording.cameras, rename)
    if not (cut or drop or rename or image_size):
        raise ValueError("there is nothing to mend: no idle ends, and no --drop, --rename or --image-size was given")
    return Plan(kept, cameras, cut, len(set(drop)), image_size)


def write_copy(report: Report, plan: Plan, out: Path, on_frame: Callable[[int], None] = lambda _: None) -> None:
    """Write the copy to the new folder `out`, which is there only when it is whole. `on_frame(n)`: n are written.

    ValueError for a folder that is there, and for features that cannot be copied.
    """
    if out.exists():
        raise ValueError(f"{out} is already there: choose another folder")
    part = temporary(out)
    try:
        with writing(out):
            _write(report, plan, part, out.name, on_frame)
            part.rename(out)
    finally:
        remove(part)


def _cut(idle: int, fps: float) -> int:
    return idle - round(_KEPT_SECONDS * fps) if idle >= IDLE_END_SECONDS * fps else 0


def _renamed(cameras: Mapping[str, str], rename: Mapping[str, str]) -> dict[str, str]:
    for name in rename:
        if name not in cameras:
            guess = nearest(name, cameras)
            hint = f"; did you mean '{guess}'?" if guess else ""
            raise ValueError(f"there is no camera '{name}' to rename{hint} (the dataset has: {', '.join(cameras)})")
    found = {key: IMAGE_PREFIX + rename[name] if name in rename else key for name, key in cameras.items()}
    if len(set(found.values())) < len(found):
        raise ValueError("two cameras would have one name: rename both, or choose another name")
    for name, key in cameras.items():
        if "/" in (new := found[key].removeprefix(IMAGE_PREFIX)):
            raise ValueError(f"LeRobot's writer takes no '/' in a camera's name, as in '{new}': --rename '{name}=NEW'")
    return found


def _write(report: Report, plan: Plan, out: Path, name: str, on_frame: Callable[[int], None]) -> None:
    recording = report.recording
    described = recording.info["features"]
    readers = {
        key: on_disk(recording.root, recording.info, recording.table, recording.order, key, plan.image_size)
        for key in recording.cameras.values()
    }
    features: dict[str, Any] = {}
    for key, feature in described.items():
        if key in _BOOKKEEPING:
            continue
        if key in readers:
            size = {"shape": tuple(readers[key].shape[1:]), "names": ["height", "width", "channels"]}
            features[plan.cameras[key]] = {"dtype": feature["dtype"], **size}
        elif len(feature["shape"]) == 1 and str(feature["dtype"]).startswith(("float", "int", "uint", "bool")):
            features[key] = {"dtype": feature["dtype"], "shape": tuple(feature["shape"]), "names": feature.get("names")}
        else:
            raise ValueError(
                f"feature '{key}' ({feature['dtype']}) cannot be copied: remove it first, with lerobot-edit-dataset"
            )
    if recording.fps != round(recording.fps):
        raise ValueError(f"LeRobot writes whole frame rates only, the dataset has {recording.fps:g} Hz")
    vectors = {key: features[key]["dtype"] for key in features if key in described and key not in readers}
    texts = instructions(recording.root, recording.table)
    dataset = new_dataset(out, name, round(recording.fps), features, recording.info.get("robot_type"))
    done = 0
    for place, table in recording.vectors(tuple(vectors)):
        if place not in plan.kept:
            continue
        rows, start = plan.kept[place], recording.rows(place).start
        values = {key: _as_declared(key, numbers(table, described, key), dtype) for key, dtype in vectors.items()}
        for key in [key for key in values if key.startswith(_OUTCOME)]:
            values[key] = outcome_kept(values[key], rows.stop - start)
        for row, pictures in _pictures(readers, rows):
            frame: dict[str, Any] = {plan.cameras[key]: picture for key, picture in pictures.items()}
            frame |= {key: part[row - start] for key, part in values.items()}
            dataset.add_frame({**frame, "task": texts[row]})
            done += 1
            on_frame(done)
        with quietly():
            dataset.save_episode()
    dataset.finalize()
    _copy_simulator_state(recording.root, out, recording.table.column("index").to_numpy(), plan)


def _as_declared(key: str, values_TD: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The values in the numbers that meta/info.json declares. ValueError where these would cut off fractions."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = values_TD.astype(dtype)
    if not np.issubdtype(found.dtype, np.inexact) and (found != values_TD).any():
        raise ValueError(
            f"feature '{key}' holds {values_TD.dtype} that {dtype}, which meta/info.json declares, cannot hold: "
            "correct its dtype there first"
        )
    return found


def outcome_kept(values_TD: NDArray[Any], length: int) -> NDArray[Any]:
    """The first `length` frames of what an episode's actions led to, the last of which stands for those cut off behind
    it, too: a success that came while the robot rested already is one, and rewards are summed."""
    kept, cut = values_TD[:length].copy(), values_TD[length:]
    if len(cut) and kept.dtype == np.bool_:
        kept[-1] |= cut.any(0)
    elif len(cut):
        kept[-1] += cut.sum(0)
    return kept


def _pictures(readers: Mapping[str, Any], rows: slice) -> Iterator[tuple[int, dict[str, NDArray[np.uint8]]]]:
    """(row, feature -> picture) of these rows, a few decoded at once."""
    for start in range(rows.start, rows.stop, _AT_ONCE):
        wanted = np.arange(start, min(start + _AT_ONCE, rows.stop))
        parts = {key: frames[wanted] for key, frames in readers.items()}
        for at, row in enumerate(wanted.tolist()):
            yield row, {key: part[at] for key, part in parts.items()}


def _copy_simulator_state(root: Path, out: Path, index: NDArray[np.int64], plan: Plan) -> None:
    """Copy what the simulator knew of the frames kept: it lies beside the recording, not in it."""
    path = root / "meta" / PRIVILEGED_FILE
    if not path.is_file():
        return
    table = read_parquet(path, root)
    kept = np.concatenate([index[rows] for rows in plan.kept.values()])
    place = {int(number): at for at, number in enumerate(table.column("index").to_numpy())}
    if all(int(number) in place for number in kept):
        found = table.take(pa.array([place[int(number)] for number in kept]))
        at = found.column_names.index("index")
        pq.write_table(found.set_column(at, "index", pa.array(np.arange(len(kept)))), out / "meta" / PRIVILEGED_FILE)
