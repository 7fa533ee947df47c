"""Demonstrations on disk: one file per finished episode while recording, one LeRobotDataset v3 folder at the end.

Why the v3 folder is written here and not with LeRobot's own writer: that writer leaves nothing readable when it is
killed, costs ~140 ms per episode to make durable, and takes 8-14 s to import. PNG in parquet ("image" features) is
lossless and, at the sizes policies look at, fast to write and to read back in bulk. The layout is LeRobot's v3.0
(`data/`, `meta/info.json`, `meta/tasks.parquet`, `meta/episodes/`, `meta/stats.json`); tests open it with LeRobot.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from envs.demos import geometry as views
from vla.core.config import save_json, write_atomic

PNG_LEVEL = 3
"""zlib level: higher levels cost more time than the disk they save on small frames."""
DATA_FILE_BYTES = 100_000_000
_QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)
PRIVILEGED, EXACT_PROPRIO = "privileged", "exact_proprio"
PRIVILEGED_FILE = "privileged.parquet"
"""In `meta/`, beside the dataset: as one of its features, appending or merging data would need a simulator."""
_INDEX_FEATURES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_OUTCOMES = {"next.reward": "float32", "next.done": "bool", "next.success": "bool"}
"""LeRobot's features for what an action led to, of the episodes of a policy: reward 1 and success at the last frame of
an episode that succeeded, done at the last frame of every one."""
_INTERVENTION = {"intervention": "bool"}
_METADATA_KEY = b"bascule"


@dataclass(frozen=True)
class WorldFacts:
    """Facts that a dataset keeps about the environment in which it was recorded."""

    fps: int
    action_names: tuple[str, ...]
    proprio_names: tuple[str, ...]
    cameras: tuple[str, ...]
    image_size: int
    robot_type: str = "panda"
    depth: bool = False
    """Depth and calibration of every camera are recorded, too."""
    outcomes: bool = False
    """Episodes are a policy's, which fail too: LeRobot's `next.*` features say how each ended."""
    corrected: bool = False
    """Somebody could take over from the policy: LeRobot's feature `intervention` says where they did."""


@dataclass(frozen=True)
class DemoEpisode:
    """One episode of T control steps: what was seen before each step, and the action; of a demonstration, which
    succeeds, the expert's clean one."""

    seed: int
    instruction: str
    images: dict[str, NDArray[np.uint8]]
    """Camera name -> (T, H, W, 3) RGB."""
    proprio: NDArray[np.float32]
    """(T, P)."""
    action: NDArray[np.float32]
    """(T, A)."""
    privileged: NDArray[np.float32] | None = None
    """(T, S) the simulator's state: for critics and teachers in simulation, never for a policy."""
    exact_proprio: NDArray[np.float32] | None = None
    """(T, P) proprio without the noise of sensors, for the same readers; None where they have none."""
    geometry: views.Geometry | None = None
    """Depth (T, H, W) and calibration (T, 3, 3), (T, 4, 4) of every camera; None unless asked for."""
    success: bool | None = None
    """How a policy's episode ended; None for a demonstration."""
    intervention: NDArray[np.bool_] | None = None
    """(T,) where a corrector gave the action instead of the policy; None where nobody could."""


def image_key(camera: str) -> str:
    """LeRobot's feature name of a camera."""
    return f"observation.images.{camera}"


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _vectors(values: NDArray[np.float32]) -> pa.Array:
    """(T, D) float32 -> a parquet column; LeRobot stores features of shape (1,) as plain scalars."""
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def save_episode(path: Path, episode: DemoEpisode) -> None:
    """Write one finished episode to `path`, atomically. ValueError if it holds a NaN or an infinity."""
    vectors = {"observation.state": episode.proprio, "action": episode.action}
    if episode.privileged is not None and episode.privileged.shape[1]:
        vectors[PRIVILEGED] = episode.privileged
        if episode.exact_proprio is not None:
            vectors[EXACT_PROPRIO] = episode.exact_proprio
    measured = episode.geometry or {}
    for camera, found in measured.items():
        vectors |= views.matrices(camera, found)
    for name, values in vectors.items():
        if not np.isfinite(values).all():
            frame = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise ValueError(f"seed {episode.seed}: the world produced a non-finite {name} at frame {frame}")
    columns: dict[str, pa.Array] = {}
    histograms = {}
    for camera, frames in episode.images.items():
        encoded = pa.array([_png(frame) for frame in frames], pa.binary())
        names = pa.array([f"frame-{i:06d}.png" for i in range(len(frames))])
        columns[image_key(camera)] = pa.StructArray.from_arrays([encoded, names], ["bytes", "path"])
        # A histogram per channel gives exact image statistics later, of any union of episodes, without decoding again.
        histograms[camera] = [np.bincount(frames[..., c].ravel(), minlength=256).tolist() for c in range(3)]
    columns |= {views.depth_key(camera): views.depth_column(found[0]) for camera, found in measured.items()}
    columns |= {name: _vectors(values) for name, values in vectors.items()}
    if episode.success is not None:
        ends = np.arange(len(episode.action)) == len(episode.action) - 1
        won = ends & episode.success
        columns |= {
            name: pa.array(values.astype(kind))
            for (name, kind), values in zip(_OUTCOMES.items(), (won, ends, won), strict=True)
        }
    if episode.intervention is not None:
        columns |= {name: pa.array(episode.intervention.astype(kind)) for name, kind in _INTERVENTION.items()}
    depths = {camera: views.depth_stats(found[0]) for camera, found in measured.items()}
    about = {"seed": episode.seed, "instruction": episode.instruction, "histograms": histograms, "depths": depths}
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(about)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="snappy")
    write_atomic(path, buffer.getvalue())


def _load_episode(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[_METADATA_KEY])
    return table.replace_schema_metadata(None), about


def is_whole(path: Path) -> bool:
    """True if an episode file can be read: a full disk may leave one that cannot."""
    try:
        return pq.read_metadata(path).num_rows > 0
    except (pa.ArrowInvalid, OSError):
        return False


def _vector_stats(values: NDArray[Any]) -> dict[str, list[Any]]:
    """LeRobot's statistics of one numeric feature, (T, D) -> {"min": D numbers, ...}."""
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    stats = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    quantiles = np.quantile(values, _QUANTILES, axis=0)
    stats |= {f"q{round(100 * q):02d}": v for q, v in zip(_QUANTILES, quantiles, strict=True)}
    return {name: v.tolist() for name, v in stats.items()} | {"count": [len(values)]}


def _image_stats(histogram_c256: NDArray[np.int64], frames: int) -> dict[str, list[Any]]:
    """LeRobot's statistics of one camera, in [0, 1], each of shape (3, 1, 1), from its exact histogram per channel."""
    levels = np.arange(256) / 255.0
    weights = histogram_c256 / histogram_c256.sum(1, keepdims=True)
    mean = weights @ levels
    cumulative = weights.cumsum(1)
    present = histogram_c256 > 0
    stats = {
        "min": levels[present.argmax(1)],
        "max": levels[255 - present[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(weights @ levels**2 - mean**2, 0.0)),
    }
    stats |= {f"q{round(100 * q):02d}": levels[(cumulative >= q - 1e-12).argmax(1)] for q in _QUANTILES}
    return {name: v.reshape(3, 1, 1).tolist() for name, v in stats.items()} | {"count": [frames]}


def _features(facts: WorldFacts) -> dict[str, dict[str, Any]]:
    """The `features` entry of info.json."""
    size = facts.image_size
    pixels = {"dtype": "image", "shape": [size, size, 3], "names": ["height", "width", "channels"]}
    return (
        {image_key(camera): dict(pixels) for camera in facts.cameras}
        | {
            key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
            for key, names in (("observation.state", facts.proprio_names), ("action", facts.action_names))
        }
        | views.features(facts.cameras if facts.depth else (), size)
        | {
            key: {"dtype": kind, "shape": [1], "names": None}
            for key, kind in [
                *(_OUTCOMES.items() if facts.outcomes else ()),
                *(_INTERVENTION.items() if facts.corrected else ()),
            ]
        }
        | {
            key: {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
            for key in _INDEX_FEATURES
        }
    )


def _hugging_face_schema(features: dict[str, dict[str, Any]]) -> dict[bytes, bytes]:
    """Parquet metadata by which Hugging Face `datasets` knows which columns are images."""

    def column(feature: dict[str, Any]) -> dict[str, Any]:
        if feature["dtype"] == "image":
            return {"_type": "Image"}
        value = {"dtype": feature["dtype"], "_type": "Value"}
        return value if feature["shape"] == [1] else {"feature": value, "length": feature["shape"][0], "_type": "List"}

    return {b"huggingface": json.dumps({"info": {"features": {k: column(f) for k, f in features.items()}}}).encode()}


class _DataFiles:
    """Writes `data/chunk-000/file-NNN.parquet`, one row group per episode, a new file when one grows large."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "data" / "chunk-000"
        self._folder.mkdir(parents=True)
        self._writer: pq.ParquetWriter | None = None
        self._bytes = 0
        self.file_index = -1

    def append(self, table: pa.Table) -> None:
        """Write one episode's table as a row group, in a new file when the current one has grown large."""
        if self._writer is None or self._bytes > DATA_FILE_BYTES:
            self.close()
            self.file_index += 1
            path = self._folder / f"file-{self.file_index:03d}.parquet"
            self._writer = pq.ParquetWriter(path, table.schema, compression="snappy")
            self._bytes = 0
        self._writer.write_table(table)
        self._bytes += table.nbytes

    def close(self) -> None:
        """Finish the current file, if one is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _with_indices(table: pa.Table, fps: int, episode: int, first: int, task: int) -> tuple[pa.Table, dict[str, Any]]:
    """The episode's table with LeRobot's bookkeeping columns, and those columns."""
    count = len(table)
    frame = np.arange(count, dtype=np.int64)
    index = {
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(count, episode, np.int64),
        "index": first + frame,
        "task_index": np.full(count, task, np.int64),
    }
    for name, values in index.items():
        table = table.append_column(name, pa.array(values))
    return table, index


def _numbers(table: pa.Table, key: str) -> NDArray[np.float32]:
    """(T, D) of a numeric column."""
    column = table.column(key).combine_chunks()
    flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    return flat.to_numpy(zero_copy_only=False).reshape(len(table), -1)


def build_dataset(files: list[Path], root: Path, facts: WorldFacts) -> list[int]:
    """Make a LeRobotDataset v3 at `root` (replaced if there) of these episode files, in order. Returns their seeds."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    features = _features(facts)
    schema = _hugging_face_schema(features)
    data = _DataFiles(root)
    tasks: dict[str, int] = {}
    seeds: list[int] = []
    rows: list[dict[str, Any]] = []
    numeric: dict[str, list[NDArray[Any]]] = {k: [] for k, f in features.items() if f["dtype"] != "image"}
    privileged: list[pa.Table] = []
    totals = {camera: np.zeros((3, 256), np.int64) for camera in facts.cameras}
    depths: dict[str, list[dict[str, Any]]] = {camera: [] for camera in facts.cameras if facts.depth}
    first = 0
    for episode, (table, about) in enumerate(map(_load_episode, files)):
        task = tasks.setdefault(about["instruction"], len(tasks))
        table, index = _with_indices(table, facts.fps, episode, first, task)
        data.append(table.select(list(features)).replace_schema_metadata(schema))
        values = index | {key: _numbers(table, key) for key in numeric if key not in index}
        if PRIVILEGED in table.column_names:
            known = [name for name in (PRIVILEGED, EXACT_PROPRIO) if name in table.column_names]
            privileged.append(table.select(["index", *known]))
        stats = {key: _vector_stats(values[key]) for key in numeric}
        for key in numeric:
            numeric[key].append(values[key])
        for camera in facts.cameras:
            histogram = np.array(about["histograms"][camera])
            totals[camera] += histogram
            stats[image_key(camera)] = _image_stats(histogram, len(table))
        for camera, parts in depths.items():
            parts.append(about["depths"][camera])
            stats[views.depth_key(camera)] = parts[-1]
        rows.append(
            {
                "episode_index": episode,
                "tasks": [about["instruction"]],
                "length": len(table),
                "data/chunk_index": 0,
                "data/file_index": data.file_index,
                "dataset_from_index": first,
                "dataset_to_index": first + len(table),
                **{f"stats/{key}/{name}": v for key, entry in stats.items() for name, v in entry.items()},
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        seeds.append(about["seed"])
        first += len(table)
    data.close()
    stats = {key: _vector_stats(np.concatenate(parts)) for key, parts in numeric.items()}
    stats |= {image_key(camera): _image_stats(totals[camera], first) for camera in facts.cameras}
    stats |= {views.depth_key(camera): views.joined_stats(parts) for camera, parts in depths.items()}
    _write_meta(root / "meta", facts, features, list(tasks), rows, stats, first)
    if privileged:
        pq.write_table(pa.concat_tables(privileged), root / "meta" / PRIVILEGED_FILE, compression="snappy")
    return seeds


def _write_meta(
    meta: Path,
    facts: WorldFacts,
    features: dict[str, dict[str, Any]],
    tasks: list[str],
    episodes: list[dict[str, Any]],
    stats: dict[str, Any],
    frames: int,
) -> None:
    import pandas as pd  # tasks.parquet is a pandas frame indexed by the task string

    (meta / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), meta / "episodes" / "chunk-000" / "file-000.parquet")
    index = pd.Index(tasks, name="task")
    pd.DataFrame({"task_index": np.arange(len(tasks), dtype=np.int64)}, index=index).to_parquet(meta / "tasks.parquet")
    info = {
        "codebase_version": "v3.0",
        "fps": facts.fps,
        "features": features,
        "total_episodes": len(episodes),
        "total_frames": frames,
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "robot_type": facts.robot_type,
        "splits": {"train": f"0:{len(episodes)}"},
    }
    save_json(meta / "stats.json", stats)
    save_json(meta / "info.json", info)


def iter_files(folder: Path, suffix: str) -> Iterator[tuple[int, Path]]:
    """(seed, path) of the files named `<seed><suffix>` in `folder`, by seed."""
    found = [(int(path.stem), path) for path in folder.glob(f"*{suffix}") if path.stem.isdigit()]
    return iter(sorted(found))
