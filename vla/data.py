"""LeRobotDataset v3 folder -> demonstrations in memory. Reads parquet and video directly, never the network.

LeRobot's own reader decodes one frame per item (and, with image features, every frame of an action chunk). Imitation
visits each frame many times, so the whole dataset is decoded once, in bulk: columns from Arrow, PNGs in a thread pool,
videos front to back. The layout is LeRobot's v3.0; the tests write with the stock recorder and read here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vla.config import load_json, nearest
from vla.frames import decode_images, decode_videos, read_parquet
from vla.types import ActionSpec, Observation

if TYPE_CHECKING:
    from vla.processor import Stats
    from vla.stream import LazyFrames

PROPRIO, ACTION = "observation.state", "action"
_PRIVILEGED_FILE = "privileged.parquet"
"""In `meta/` of what `vla demos` records: the simulator's state by frame."""
_IMAGE_PREFIX = "observation.images."
_BOOKKEEPING = ("index", "episode_index", "frame_index", "timestamp", "task_index")
_MEMORY_SHARE = 0.8


@dataclass(frozen=True, eq=False)
class DemoSet:
    """F frames of demonstrations, episode after episode, in the order they were recorded."""

    images: dict[str, NDArray[np.uint8] | LazyFrames]
    """Camera name -> (F, H, W, 3) RGB, in memory or left on disk."""
    proprio: NDArray[np.float32]
    """(F, P), raw units."""
    action: NDArray[np.float32]
    """(F, A), environment units: what was commanded while this frame was seen."""
    instruction: list[str]
    """One per frame."""
    episode_index: NDArray[np.int64]
    """(F,) as the dataset numbers them."""
    fps: float
    action_names: tuple[str, ...]
    proprio_names: tuple[str, ...]
    privileged: NDArray[np.float32] | None = None
    """(F, S) the simulator's state, where the demonstrations were made in one (`vla demos`): for teachers."""

    @property
    def num_frames(self) -> int:
        return len(self.action)

    @property
    def episodes(self) -> list[int]:
        """Numbers of the episodes held, in order."""
        return self.episode_index[self._starts].tolist()

    @property
    def nbytes(self) -> int:
        """Bytes held by images, proprio and actions."""
        return sum(image.nbytes for image in self.images.values()) + self.proprio.nbytes + self.action.nbytes

    @property
    def action_spec(self) -> ActionSpec:
        """Of the recorded actions: names, extremes, rate. A simulator knows the true bounds; data has only these."""
        low, high = self.action.min(0), self.action.max(0)
        return ActionSpec(self.action_names, tuple(low.tolist()), tuple(high.tolist()), self.fps)

    def stats(self) -> Stats:
        """Normalisation statistics of these frames."""
        from vla.processor import Stats  # lazily: torch, which only reading a dataset does not need

        return Stats.from_arrays(self.proprio, self.action)

    def observation(self, frames: Sequence[int] | NDArray[np.int64] | slice) -> Observation:
        """What a policy would have seen at these frames; a slice gives views, an index copies."""
        return Observation(
            images={camera: image[frames] for camera, image in self.images.items()},
            proprio=self.proprio[frames],
            instruction=[self.instruction[i] for i in self._numbers(frames)],
        )

    def subset(self, episodes: Iterable[int]) -> DemoSet:
        """Only these episodes (by number), in recorded order. ValueError naming one that is not there."""
        wanted = set(episodes)
        if missing := wanted - set(self.episodes):
            raise ValueError(f"there is no episode {min(missing)} among the {len(self.episodes)} of this dataset")
        rows = np.flatnonzero(np.isin(self.episode_index, list(wanted)))
        return replace(
            self,
            images={camera: _rows_of(image, rows) for camera, image in self.images.items()},
            proprio=self.proprio[rows],
            action=self.action[rows],
            instruction=[self.instruction[i] for i in rows],
            episode_index=self.episode_index[rows],
            privileged=None if self.privileged is None else self.privileged[rows],
        )

    def chunks(
        self, chunk_size: int, frames: Sequence[int] | NDArray[np.int64] | slice = slice(None)
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The actions from each of these frames on, (F, C, A), and their mask (F, C): 1 inside the episode, 0 after it.

        After the end the last action repeats, so that a padded entry is at least a plausible action.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        starts = self._starts
        ends = np.append(starts[1:], self.num_frames)
        first = self._numbers(frames)
        last = ends[np.searchsorted(ends, first, side="right")] - 1
        at = first[:, None] + np.arange(chunk_size)
        return self.action[np.minimum(at, last[:, None])], (at <= last[:, None]).astype(np.float32)

    def summary(self, name: str) -> list[str]:
        """What was found, for a console: one line for the numbers, one for the names."""
        tasks = list(dict.fromkeys(self.instruction))
        cameras = ", ".join(f"{camera} {image.shape[1]}x{image.shape[2]}" for camera, image in self.images.items())
        where = "" if self.nbytes > self.proprio.nbytes + self.action.nbytes else ", left on disk"
        said = f"'{tasks[0]}'" if len(tasks) == 1 else f"{len(tasks)} tasks"
        return [
            f"{name}: {len(self.episodes)} episodes, {self.num_frames} frames at {self.fps:g} Hz, {said}",
            f"{name}: cameras {cameras}{where}; state {self.proprio.shape[1]}; action {', '.join(self.action_names)}",
        ]

    def _numbers(self, frames: Sequence[int] | NDArray[np.int64] | slice) -> NDArray[np.int64]:
        return np.arange(self.num_frames)[frames] if isinstance(frames, slice) else np.asarray(frames, np.int64)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        changes = np.flatnonzero(np.diff(self.episode_index)) + 1
        return np.concatenate([np.zeros(min(1, self.num_frames), np.int64), changes])


def load_dataset(
    root: str | os.PathLike[str],
    cameras: Sequence[str] | None = None,
    *,
    action_dim: int | None = None,
    proprio_dim: int | None = None,
    image_size: int | None = None,
    lazy: bool | None = False,
    num_threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> DemoSet:
    """Read a whole LeRobotDataset v3 folder; its pixels into memory, or (`lazy`) only when a frame is asked for.

    `cameras`: names without "observation.images.", in the order wanted; None for all. `action_dim`, `proprio_dim`: the
    widths the policy needs. `image_size`: resize to this square while decoding (large videos must). `lazy` None: if the
    pixels would take more than half of the free memory. `on_progress(frames decoded, frames to decode)` counts every
    camera. ValueError, one line, naming the feature at fault.
    """
    root = Path(root)
    info = _read_info(root)
    features = info["features"]
    keys = _camera_keys(features, cameras)
    for key, wanted in ((PROPRIO, proprio_dim), (ACTION, action_dim)):
        _check_width(features, key, wanted)
    if lazy is None:
        lazy = _pixels(features, list(keys.values()), info["total_frames"], image_size) > 0.5 * _free_memory()
    in_memory = [] if lazy else [key for key in keys.values() if features[key]["dtype"] == "image"]
    table, order = _read_table(root, info, in_memory)
    episode = table.column("episode_index").to_numpy()
    frame = table.column("frame_index").to_numpy()
    proprio, action = (_vectors(table, features, key, episode, frame) for key in (PROPRIO, ACTION))
    if not lazy:
        _check_memory(features, list(keys.values()), len(table), image_size)
    done, total = 0, len(table) * len(keys)

    def count(frames: int) -> None:
        nonlocal done
        done += frames
        if on_progress is not None:
            on_progress(done, total)

    images: dict[str, NDArray[np.uint8] | LazyFrames] = {}
    for camera, key in keys.items() if lazy else ():
        images[camera] = _on_disk(root, info, table, order, key, image_size)
    with ThreadPoolExecutor(num_threads) as pool:
        for camera, key in () if lazy else keys.items():
            if features[key]["dtype"] == "image":
                images[camera] = decode_images(root, table, key, image_size, pool, count)
            else:
                images[camera] = decode_videos(root, info, table, key, image_size, pool, count)
    return DemoSet(
        images=images,
        proprio=proprio,
        action=action,
        instruction=_instructions(root, table),
        episode_index=episode,
        fps=float(info["fps"]),
        action_names=_names(features, ACTION),
        proprio_names=_names(features, PROPRIO),
        privileged=_privileged(root, table),
    )


def load_datasets(
    roots: Sequence[str | os.PathLike[str]], cameras: Sequence[str] | None = None, *, lazy: bool | None = None
) -> dict[str, DemoSet]:
    """Several folders by the shortest names that tell them apart. An error names the folder when there are several."""
    paths = [Path(root) for root in roots]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [os.fspath(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError("a dataset is named twice")
    found = {}
    for name, path in zip(names, paths, strict=True):
        try:
            found[name] = load_dataset(path, cameras, lazy=lazy)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}" if len(paths) > 1 else str(problem)) from None
    return found


# ---------------------------------------------------------------------- what the folder says about itself
def _read_info(root: Path) -> dict[str, Any]:
    if not (root / "meta" / "info.json").is_file():
        if (root / "recording" / "request.json").is_file():
            raise ValueError(
                f"{root} is an unfinished recording: repeat the command that recorded it, it will continue"
            )
        what = "does not exist" if not root.exists() else "is not a LeRobotDataset folder: it has no meta/info.json"
        raise ValueError(f"{root} {what}")
    info = load_json(root / "meta" / "info.json")
    version = str(info.get("codebase_version", "unknown"))
    if not version.startswith("v3."):
        raise ValueError(f"{root} is a LeRobotDataset {version}, not v3: convert it with LeRobot's conversion script")
    if not info.get("total_frames"):
        raise ValueError(f"{root} holds no episodes")
    return info


def _camera_keys(features: dict[str, Any], cameras: Sequence[str] | None) -> dict[str, str]:
    """Camera name -> feature name, in the order asked for."""
    present = {}
    for key, feature in features.items():
        about = feature.get("info") or {}
        is_depth = about.get("is_depth_map") or about.get("video.is_depth_map")
        if feature["dtype"] in ("image", "video") and not is_depth:
            present[key.removeprefix(_IMAGE_PREFIX)] = key
    if not present:
        raise ValueError(f"the dataset has no camera: no feature is an image or a video, it has {', '.join(features)}")
    for camera in present if cameras is None else cameras:
        if camera.removeprefix(_IMAGE_PREFIX) not in present:
            guess = nearest(camera, present)
            hint = f"; did you mean '{guess}'?" if guess else ";"
            raise ValueError(f"the dataset has no camera '{camera}'{hint} (it has: {', '.join(sorted(present))})")
    names = list(present) if cameras is None else [camera.removeprefix(_IMAGE_PREFIX) for camera in cameras]
    return {name: present[name] for name in names}


def _check_width(features: dict[str, Any], key: str, wanted: int | None) -> None:
    if key not in features:
        raise ValueError(f"the dataset has no feature '{key}'; it has: {', '.join(sorted(features))}")
    shape = tuple(features[key]["shape"])
    if len(shape) != 1 or not str(features[key]["dtype"]).startswith(("float", "int")):
        raise ValueError(
            f"feature '{key}' must be a vector of numbers, it is {features[key]['dtype']} of shape {shape}"
        )
    if wanted is not None and shape[0] != wanted:
        raise ValueError(
            f"feature '{key}' has {shape[0]} components, {wanted} are needed: {', '.join(_names(features, key))}"
        )


def _names(features: dict[str, Any], key: str) -> tuple[str, ...]:
    """Component names; some datasets nest them in a dict, some have none."""
    names, width = features[key].get("names"), features[key]["shape"][0]
    if isinstance(names, dict):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    return tuple(map(str, names)) if names and len(names) == width else tuple(f"{key}_{i}" for i in range(width))


def _check_memory(features: dict[str, Any], keys: list[str], frames: int, image_size: int | None) -> None:
    needed, available = _pixels(features, keys, frames, image_size), _free_memory()
    if needed > 1 << 30 and needed > _MEMORY_SHARE * available:
        raise ValueError(
            f"{frames} frames of {len(keys)} cameras need {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} "
            "are free: leave them on disk (lazy), use fewer cameras or a smaller image_size"
        )


def _pixels(features: dict[str, Any], keys: list[str], frames: int, image_size: int | None) -> int:
    """Bytes of these cameras, decoded."""
    return frames * sum(3 * image_size**2 if image_size else int(np.prod(features[key]["shape"])) for key in keys)


def _free_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _rows_of(image: NDArray[np.uint8] | LazyFrames, rows: NDArray[np.int64]) -> NDArray[np.uint8] | LazyFrames:
    return image[rows] if isinstance(image, np.ndarray) else image.subset(rows)


def _on_disk(
    root: Path, info: dict[str, Any], table: pa.Table, order: NDArray[np.int64], key: str, size: int | None
) -> LazyFrames:
    from vla.stream import LazyFrames, ParquetImages, Videos

    rows = np.arange(len(table))
    if info["features"][key]["dtype"] == "image":
        reader = ParquetImages(root, key, _data_files(root, info), order, size)
    else:
        reader = Videos(root, info, table, key, size)
    height, width = reader.read(rows[:1])[0].shape[:2]
    return LazyFrames(reader, rows, (height, width))


# ---------------------------------------------------------------------- tables
def _read_table(root: Path, info: dict[str, Any], image_keys: list[str]) -> tuple[pa.Table, NDArray[np.int64]]:
    """All frames, sorted, of the columns that are needed; and where each row lies in the files."""
    paths = _data_files(root, info)
    columns = [*_BOOKKEEPING, PROPRIO, ACTION, *image_keys]
    table = pa.concat_tables([read_parquet(path, root, columns) for path in paths], promote_options="permissive")
    if len(table) != info["total_frames"]:
        raise ValueError(
            f"{root} is unfinished or damaged: meta/info.json promises {info['total_frames']} frames, data/ holds "
            f"{len(table)}"
        )
    index = table.column("index").to_numpy()
    order = np.argsort(index, kind="stable")
    return (table if (np.diff(index) > 0).all() else table.take(pa.array(order))), order


def _data_files(root: Path, info: dict[str, Any]) -> list[Path]:
    paths = sorted((root / "data").glob("*/*.parquet"))
    if not paths:
        raise ValueError(
            f"{root} is unfinished: meta/info.json promises {info['total_frames']} frames, data/ holds none"
        )
    return paths


def _vectors(
    table: pa.Table, features: dict[str, Any], key: str, episode: NDArray[np.int64], frame: NDArray[np.int64]
) -> NDArray[np.float32]:
    """(F, D) of a numeric feature. ValueError for a wrong width, a NaN or an infinity, naming the place."""
    column = table.column(key).combine_chunks()
    width = features[key]["shape"][0]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != width)
        if len(wrong):
            row = wrong[0]
            raise ValueError(
                f"feature '{key}' should have {width} components but has {lengths[row]:.0f} at episode {episode[row]}, "
                f"frame {frame[row]}"
            )
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)
    if values.shape[1] != width:
        raise ValueError(f"feature '{key}' should have {width} components but has {values.shape[1]}")
    if not np.isfinite(values).all():
        row, component = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"feature '{key}' holds {values[row, component]} at episode {episode[row]}, frame {frame[row]} "
            f"(component {component})"
        )
    return values


def _privileged(root: Path, table: pa.Table) -> NDArray[np.float32] | None:
    """(F, S) the simulator's state; None unless it is there for every frame (others may have been appended)."""
    path = root / "meta" / _PRIVILEGED_FILE
    if not path.is_file():
        return None
    found = read_parquet(path, root)
    column = found.column("privileged").combine_chunks()
    values = column.flatten().to_numpy().reshape(len(found), -1)
    wanted = table.column("index").to_numpy()
    order = np.argsort(found.column("index").to_numpy())
    numbers = found.column("index").to_numpy()[order]
    at = np.searchsorted(numbers, wanted).clip(max=len(numbers) - 1)
    return values[order[at]] if (numbers[at] == wanted).all() else None


def _instructions(root: Path, table: pa.Table) -> list[str]:
    """The task string of every frame."""
    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        raise ValueError(f"{root} has no task strings: meta/tasks.parquet is missing")
    tasks = read_parquet(path, root)
    texts = next((name for name in ("task", "__index_level_0__") if name in tasks.column_names), None)
    if texts is None or "task_index" not in tasks.column_names:
        raise ValueError(
            f"{root} has no task strings: meta/tasks.parquet has the columns {', '.join(tasks.column_names)}"
        )
    known = dict(zip(tasks.column("task_index").to_pylist(), tasks.column(texts).to_pylist(), strict=True))
    used = table.column("task_index").to_pylist()
    for index in set(used):
        if not (isinstance(known.get(index), str) and known[index].strip()):
            raise ValueError(f"{root} has no task string for task_index {index}: every frame needs an instruction")
    return [known[index] for index in used]
