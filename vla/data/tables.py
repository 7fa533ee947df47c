"""The tables of a LeRobotDataset v3: frames in recorded order, vectors, tasks. Errors name episode and frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla.data.findings import Finding, Severity
from vla.processing.stats import noise_alone

PRIVILEGED_FILE = "privileged.parquet"
"""In `meta/` of what `vla demos` records: the simulator's state by frame."""
_BOOKKEEPING = ("index", "episode_index", "frame_index", "timestamp", "task_index")
_POINTER = b"version https://git-lfs"
_PAUSE = 2.5
"""Steps of a recording longer than this many usual ones get a note."""
_LOST_SHARE = 0.01
"""Share of a component's spread that rounding to 32 bits may take away without a note."""
_WRONG_RATE, _WRONG_EVEN_RATE = 0.05, 0.005
"""Share by which the recorded rate may differ from the declared one without a note: of a clock's time stamps, and of
even ones, as LeRobot writes them."""
_EVEN = 0.01
"""Share of a step by which even time stamps may differ."""


def read_parquet(path: Path, root: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """These columns of a file in the dataset at `root`. ValueError naming the file or the column that is missing."""
    try:
        file = pq.ParquetFile(path)
        check_columns(file.schema_arrow.names, path, root, columns or ())
        return file.read(None if columns is None else list(columns)).replace_schema_metadata(None)
    except (pa.ArrowInvalid, OSError) as problem:
        refuse_pointer(path)
        raise ValueError(
            f"{root} is unfinished: {path.relative_to(root)} has no readable footer, as when a recording is killed "
            f"before finalize() ({type(problem).__name__})"
        ) from None


def refuse_pointer(path: Path) -> None:
    """ValueError for a file that git-lfs has left as a pointer to the real one."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull` there")


def check_columns(names: Sequence[str], path: Path, root: Path, columns: Sequence[str]) -> None:
    """ValueError naming the first of these columns that a file with the columns `names` lacks."""
    for column in columns:
        if column not in names:
            raise ValueError(f"feature '{column}' is in meta/info.json but not in {path.relative_to(root)}")


def row_place(table: pa.Table, row: int) -> str:
    """A row for a message: "episode 1, frame 2"."""
    return f"episode {table['episode_index'][int(row)]}, frame {table['frame_index'][int(row)]}"


def read_table(root: Path, info: Mapping[str, Any], features: Sequence[str]) -> tuple[pa.Table, NDArray[np.int64]]:
    """All frames, sorted by `index`, with bookkeeping and these features; and where each row lies in the files.

    ValueError where the bookkeeping has holes, or does not give each episode's frames once and in a row.
    """
    columns = [*_BOOKKEEPING, *features]
    parts = [read_parquet(path, root, columns) for path in data_files(root, info)]
    try:
        table = pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as problem:
        raise ValueError(f"{root}: the files in data/ have columns of different types: {problem}") from None
    if len(table) != info["total_frames"]:
        raise ValueError(
            f"{root} is unfinished or damaged: meta/info.json promises {info['total_frames']} frames, data/ holds "
            f"{len(table)}"
        )
    table = _plain_bookkeeping(root, table)
    index = table.column("index").to_numpy()
    order = np.argsort(index, kind="stable")
    if not (np.diff(index) > 0).all():
        table = table.take(pa.array(order))
    _check_order(root, table)
    return table, order


def _plain_bookkeeping(root: Path, table: pa.Table) -> pa.Table:
    """The table with its bookkeeping as flat numbers: some writers store them as lists of one."""
    for name in _BOOKKEEPING:
        column = table.column(name)
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise ValueError(f"{root}: column '{name}' of data/ has no value in row {row}")
        kind = column.type
        if _is_list(kind):
            flat = column.combine_chunks().flatten()
            if len(flat) != len(table) or flat.null_count:
                raise ValueError(f"{root}: column '{name}' of data/ must hold one number per row")
            column, kind = pa.chunked_array([flat]), flat.type
            table = table.set_column(table.column_names.index(name), name, column)
        if not (pa.types.is_integer(kind) or (name == "timestamp" and pa.types.is_floating(kind))):
            whole = "numbers" if name == "timestamp" else "numbers without a fraction (int64)"
            raise ValueError(f"{root}: column '{name}' of data/ must hold {whole}, it holds {kind}")
        if name != "timestamp" and kind != pa.int64():  # differences of unsigned numbers are never negative
            table = table.set_column(table.column_names.index(name), name, column.cast(pa.int64()))
    stamps = table.column("timestamp").to_numpy()
    if not np.isfinite(stamps).all():
        row = int(np.flatnonzero(~np.isfinite(stamps))[0])
        raise ValueError(f"{root}: the timestamp of {row_place(table, row)} is {stamps[row]}")
    return table


def _check_order(root: Path, table: pa.Table) -> None:
    """ValueError unless each episode's frames follow one another in the order of `index`."""
    index, episode, frame = (table.column(name).to_numpy() for name in ("index", "episode_index", "frame_index"))
    if len(twice := np.flatnonzero(np.diff(index) == 0)):
        a, b = twice[0], twice[0] + 1
        raise ValueError(
            f"{root}: {row_place(table, a)} and {row_place(table, b)} both have the index {index[a]}: "
            "number all frames of data/ from 0 on"
        )
    same = np.diff(episode) == 0
    if len(back := np.flatnonzero(same & (np.diff(frame) <= 0))):
        raise ValueError(f"{root}: {row_place(table, back[0] + 1)} follows {row_place(table, back[0])} in data/")
    first = np.append(0, np.flatnonzero(~same) + 1)
    numbers, counts = np.unique(episode[first], return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{root}: the frames of episode {numbers[counts > 1][0]} are not together in data/")


def timing_findings(table: pa.Table, info: Mapping[str, Any]) -> list[Finding]:
    """A finding each where frames are missing inside episodes, time stands still, runs backwards or jumps, or the
    recorded rate is not the declared one."""
    episode, frame, stamps = (table.column(name).to_numpy() for name in ("episode_index", "frame_index", "timestamp"))
    same = np.diff(episode) == 0
    found = []

    def add(code: str, severity: Severity, rows: NDArray[np.int64], text: str) -> None:
        found.append(Finding(code, severity, text, tuple(np.unique(episode[rows]).tolist())))

    if len(gaps := np.flatnonzero(same & (np.diff(frame) > 1))):
        text = (
            f"{row_place(table, gaps[0] + 1)} follows frame {frame[gaps[0]]}: the frames between are missing, and "
            f"actions across such a gap count as consecutive ({len(gaps)} in all)"
        )
        add("frames_missing", "warning", gaps, text)
    rows = np.flatnonzero(same) + 1
    steps = np.diff(stamps.astype(np.float64))[same] / np.diff(frame)[same]
    if len(back := rows[steps <= 0]):
        text = (
            f"the timestamp of {row_place(table, back[0])} ({_seconds(stamps[back[0]])} s) is not after that of the "
            f"frame before it ({_seconds(stamps[back[0] - 1])} s): {_why_not_after(stamps, back, info)} "
            f"({len(back)} in all)"
        )
        add("time_backwards", "error", back, text)
    step = float(np.median(steps)) if len(steps) else 0.0  # 0: no episode has two frames
    if len(pauses := rows[steps > _PAUSE * max(step, 0.0)]) and not len(back):
        pause = stamps[pauses[0]] - stamps[pauses[0] - 1]
        text = (
            f"{pause:.3g} s pass before {row_place(table, pauses[0])}, and actions across such a pause count as "
            f"consecutive: remove these frames or split the episode ({len(pauses)} in all)"
        )
        add("pause", "warning", pauses, text)
    even = len(steps) > 0 and float(np.quantile(np.abs(steps - step), 0.9)) < _EVEN * step
    if step > 0 and abs(step * info["fps"] - 1) > (_WRONG_EVEN_RATE if even else _WRONG_RATE):
        text = (
            f"by its timestamps it was recorded at {1 / step:.3g} Hz, meta/info.json declares {info['fps']:g} Hz: the "
            "policy will act at the declared rate"
        )
        add("rate", "warning", np.empty(0, np.int64), text)
    return found


def _seconds(stamp: np.floating | np.integer) -> str:
    """A time stamp with all digits that tell it from the next one."""
    return f"{float(str(stamp)):.16g}"


def _why_not_after(stamps: NDArray[np.floating], rows: NDArray[np.int64], info: Mapping[str, Any]) -> str:
    """The likely reason why the time stamps of these rows are not after those before them, and the remedy."""
    remedy = "LeRobot writes frame_index / fps, seconds from the episode's start"
    coarse = np.spacing(np.abs(stamps[rows]).max()) if np.issubdtype(stamps.dtype, np.floating) else 0.0
    if coarse > 0.1 / info["fps"]:
        bits = 8 * stamps.dtype.itemsize
        return f"so far from zero {bits}-bit numbers are {coarse:.3g} s apart and tell no frames apart; {remedy}"
    if (stamps[rows] == stamps[rows - 1]).all():
        return f"was the time recorded? {remedy}"
    return "is this the order of recording?"


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files in the chunks of `folder`, in order. Files that a Mac put beside them when it copied the
    dataset ("._file-000.parquet": attributes, no frames) are left out."""
    return [path for path in sorted(folder.glob("*/*.parquet")) if not path.name.startswith("._")]


def foreign_findings(root: Path) -> list[Finding]:
    """A finding about files that `parquet_files` leaves out."""
    found = sorted(path for place in ("data", "meta/episodes") for path in (root / place).glob("*/._*"))
    if not found:
        return []
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    text = f"{found[0].relative_to(root)}{more}: left behind by a copy from a Mac, ignored; they may be deleted"
    return [Finding("foreign_files", "note", text)]


def data_files(root: Path, info: Mapping[str, Any]) -> list[Path]:
    """The dataset's Parquet files in order. ValueError if `data/` holds none: the recording is unfinished."""
    paths = parquet_files(root / "data")
    if not paths:
        raise ValueError(
            f"{root} is unfinished: meta/info.json promises {info['total_frames']} frames, data/ holds none"
        )
    return paths


def vectors(table: pa.Table, features: Mapping[str, Any], key: str) -> NDArray[np.float32]:
    """(F, D) of a numeric feature. ValueError for a wrong width, a NaN or an infinity, naming the place."""
    recorded = numbers(table, features, key)
    with np.errstate(over="ignore"):  # what does not fit is told below
        values = recorded.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(not_finite(table, key, recorded))
    return values


def numbers(table: pa.Table, features: Mapping[str, Any], key: str) -> NDArray[Any]:
    """(F, D) of a numeric feature as it was recorded, also NaN and infinities. ValueError for a wrong width or a frame
    without a value, naming the place."""
    column, width = table.column(key).combine_chunks(), features[key]["shape"][0]
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"feature '{key}' has no value at {row_place(table, row)}")
    if _is_list(column.type):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != width)
        if len(wrong):
            raise ValueError(
                f"feature '{key}' should have {width} components but has {lengths[wrong[0]]:.0f} at "
                f"{row_place(table, wrong[0])}"
            )
        column = column.flatten()
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"feature '{key}' must be a vector of numbers, data/ holds {kind}")
    values = column.to_numpy(zero_copy_only=False).reshape(len(table), -1)
    if values.shape[1] != width:
        raise ValueError(f"feature '{key}' should have {width} components but has {values.shape[1]}")
    return values


def not_finite(table: pa.Table, key: str, values: NDArray[Any]) -> str:
    """The first NaN, infinity or number too large for 32 bits in a feature as recorded, and its place, in words."""
    with np.errstate(over="ignore"):
        row, component = np.argwhere(~np.isfinite(values.astype(np.float32)))[0]
    value = values[row, component]
    large = ", more than 32-bit numbers hold" if np.isfinite(value) else ""
    return f"feature '{key}' holds {value}{large} at {row_place(table, row)} (component {component})"


def rounding_findings(
    table: pa.Table, features: Mapping[str, Any], names: Mapping[str, Sequence[str]]
) -> list[Finding]:
    """A finding for each component of the features `names` whose motion the policy's 32-bit numbers cannot tell."""
    found = []
    for key, components in names.items():
        kind = table.column(key).type
        kind = kind.value_type if _is_list(kind) else kind
        if pa.types.is_float64(kind) or pa.types.is_integer(kind):  # others are as they were recorded
            found += lost_motion(key, components, Rounding.of(numbers(table, features, key)))
    return found


@dataclass(frozen=True)
class Rounding:
    """Extremes of components as recorded, (D,) float64, and what rounding to 32 bits takes from a value at most."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    lost: NDArray[np.float64]

    @staticmethod
    def of(values: NDArray[Any]) -> Rounding:
        """That of finite values (F, D)."""
        values = values.astype(np.float64)
        with np.errstate(over="ignore"):
            return Rounding(values.min(0), values.max(0), np.abs(values - values.astype(np.float32)).max(0))

    def joined(self, other: Rounding) -> Rounding:
        """That of both recordings."""
        low, high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return Rounding(low, high, np.maximum(self.lost, other.lost))


def lost_motion(key: str, components: Sequence[str], rounding: Rounding) -> list[Finding]:
    """A finding for each component of feature `key` that lies far from zero and changes little: of 2,147,483,648.58
    32 bits keep 2,147,483,648. Of one recorded in 32 bits half the distance between neighbours is lost already."""
    spread, far = rounding.high - rounding.low, np.maximum(np.abs(rounding.low), np.abs(rounding.high))
    with np.errstate(over="ignore", invalid="ignore"):
        already = np.where(noise_alone(rounding.low, rounding.high), 0.0, np.spacing(far.astype(np.float32)) / 2)
    lost = np.where(rounding.lost > 0, rounding.lost, already)
    return [
        Finding(
            "motion_lost",
            "error",
            f"feature '{key}' component '{components[i]}' changes by {spread[i]:.3g} around {rounding.low[i]:.6g}, "
            f"which 32-bit numbers tell only to {lost[i]:.2g}: subtract a constant from it before training, and on the "
            "robot",
            components=(f"{key} {components[i]}",),
        )
        for i in np.flatnonzero(np.isfinite(lost) & (lost > _LOST_SHARE * spread))
    ]


def simulator_state(root: Path, table: pa.Table, name: str) -> NDArray[np.float32] | None:
    """(F, S) the column "privileged" or "exact_proprio" of what the simulator knew; None unless it is there for every
    frame (others may have been appended)."""
    path = root / "meta" / PRIVILEGED_FILE
    if not path.is_file():
        return None
    found = read_parquet(path, root)
    if name not in found.column_names:
        return None
    column = found.column(name).combine_chunks()
    values = column.flatten().to_numpy().reshape(len(found), -1)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        raise ValueError(f"{root}: meta/{PRIVILEGED_FILE} holds a number in row {row}, '{name}', that is not finite")
    wanted = table.column("index").to_numpy()
    order = np.argsort(found.column("index").to_numpy())
    numbers = found.column("index").to_numpy()[order]
    at = np.searchsorted(numbers, wanted).clip(max=len(numbers) - 1)
    return values[order[at]] if (numbers[at] == wanted).all() else None


def flags(root: Path, table: pa.Table, key: str) -> NDArray[np.bool_]:
    """(F,) a column of yes and no: bools, or numbers that are 0 for no. ValueError for anything else."""
    column = table.column(key).combine_chunks()
    if _is_list(column.type):
        column = column.flatten()
    kind = column.type
    fine = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if not fine or column.null_count or len(column) != len(table):
        raise ValueError(f"{root}: feature '{key}' must be one bool for each frame, it holds {kind}")
    values = column.to_numpy(zero_copy_only=False)
    if pa.types.is_floating(kind) and np.isnan(values).any():  # which would count as yes
        raise ValueError(f"{root}: feature '{key}' is NaN at {row_place(table, int(np.isnan(values).argmax()))}")
    return values.astype(bool)


def tasks(root: Path) -> list[tuple[int, object]]:
    """(task_index, task string) of each row of meta/tasks.parquet. ValueError where there is no such table."""
    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        raise ValueError(f"{root} has no task strings: meta/tasks.parquet is missing")
    table = read_parquet(path, root)
    texts = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if texts is None or "task_index" not in table.column_names:
        raise ValueError(
            f"{root} has no task strings: meta/tasks.parquet has the columns {', '.join(table.column_names)}"
        )
    return list(zip(table.column("task_index").to_pylist(), table.column(texts).to_pylist(), strict=True))


def instructions(root: Path, table: pa.Table) -> list[str]:
    """The task string of every frame."""
    known: dict[int, object] = {}
    for index, text in tasks(root):
        if known.setdefault(index, text) != text:
            raise ValueError(f"{root}: {two_texts(index, known[index], text)}")
    used = table.column("task_index").to_pylist()
    for index in set(used):
        if not says_something(known.get(index)):
            raise ValueError(f"{root} has {no_text(index)}")
    return [known[index] for index in used]  # type: ignore[misc]


def says_something(text: object) -> bool:
    """True for a task string that is not blank."""
    return isinstance(text, str) and bool(text.strip())


def two_texts(index: int, one: object, other: object) -> str:
    """The words for a task_index that stands for two tasks."""
    return f"meta/tasks.parquet has two task strings for task_index {index}, {one!r} and {other!r}: number them apart"


def no_text(index: int) -> str:
    """The words for a task_index whose frames have no instruction."""
    return f"no task string for task_index {index}: every frame needs an instruction"
