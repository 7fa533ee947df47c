"""LeRobotDataset v3 folder -> demonstrations in memory. Reads parquet and video directly, never the network.

LeRobot's own reader decodes one frame per item (and, with image features, every frame of an action chunk). Imitation
visits each frame many times, so the whole dataset is decoded once, in bulk: columns from Arrow, PNGs in a thread pool,
videos front to back. The layout is LeRobot's v3.0; the tests write with the stock recorder and read here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vla.core.types import ActionSpec, Observation
from vla.data.camera_geometry import (
    CameraGeometry,
    geometry_features,
    geometry_findings,
    measured_by,
    placement_findings,
    read_geometry,
    shape_findings,
    table_columns,
)
from vla.data.dataset_meta import (
    camera_keys,
    check_width,
    component_names,
    height_width,
    naming_findings,
    read_info,
    unread_findings,
    unused_findings,
)
from vla.data.decoding import decode_images, decode_videos
from vla.data.findings import (
    Finding,
    faint_findings,
    identical_cameras,
    numbered,
    other_shape,
    rare_findings,
    still_camera,
    still_vectors,
)
from vla.data.tables import (
    data_files,
    flags,
    foreign_findings,
    instructions,
    read_table,
    rounding_findings,
    row_place,
    simulator_state,
    timing_findings,
    vectors,
)
from vla.runtime.machine import free_memory

if TYPE_CHECKING:
    from vla.data.lazy_frames import LazyFrames
    from vla.processing.processor import Stats

PROPRIO, ACTION, SUCCESS = "observation.state", "action", "next.success"
INTERVENTION = "intervention"
"""LeRobot's feature (`lerobot-rollout --strategy.type=dagger`): true where a person drove instead of a policy."""
_MEMORY_SHARE = 0.8
_LOOKED_AT = 16
"""Frames, spread over the recording, by which a camera that never changes is found."""


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
    exact_proprio: NDArray[np.float32] | None = None
    """(F, P) `proprio` without the noise of sensors, for teachers; None where there was none."""
    success: NDArray[np.bool_] | None = None
    """(F,) whether this frame's action ended in success, where the dataset says so: of a policy's own episodes, not
    of demonstrations."""
    intervention: NDArray[np.bool_] | None = None
    """(F,) whether a person gave this frame's action, where the dataset says so: of a policy's episodes in which
    somebody could take over. Of demonstrations, None."""
    noticed: tuple[Finding, ...] = ()
    """A finding for each oddity of the dataset's tables that does not prevent reading it."""
    aspects: Mapping[str, float] = field(default_factory=dict)
    """Camera -> width by height of its recorded pictures; empty where they are read at another size."""
    geometry: Mapping[str, CameraGeometry] = field(default_factory=dict)
    """Depth and calibration by camera; empty unless asked for."""

    @property
    def num_frames(self) -> int:
        """Number of frames F over all episodes."""
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
        """Names, extremes and rate of the recorded actions. A simulator knows the true bounds; data has only these."""
        low, high = self.action.min(0), self.action.max(0)
        return ActionSpec(self.action_names, tuple(low.tolist()), tuple(high.tolist()), self.fps)

    def stats(self) -> Stats:
        """Normalisation statistics of these frames."""
        from vla.processing.processor import Stats  # lazily: torch, which only reading a dataset does not need

        return Stats.from_arrays(self.proprio, self.action)

    def warnings(self) -> list[str]:
        """One line for each thing in the recording that may not be what was meant; empty for ordinary data."""
        parts = ((ACTION, self.action, self.action_names), (PROPRIO, self.proprio, self.proprio_names))
        rare = [finding for part in parts for finding in rare_findings(*part)] + faint_findings(*parts[1])
        return [finding.text for finding in (*self.noticed, *self._still_or_alike(), *rare)]

    def _still_or_alike(self) -> list[Finding]:
        """Findings for actions, for the state, and for each camera, that are the same in every frame, and for two
        cameras that show the same. Of the pictures a few are looked at, for they may lie on disk."""
        if self.num_frames < 2:
            return []
        still = [bool((values == values[0]).all()) for values in (self.action, self.proprio)]
        found = still_vectors(self.num_frames, *still)
        looked = np.unique(np.linspace(0, self.num_frames - 1, _LOOKED_AT).astype(np.int64))
        moving: dict[str, NDArray[np.uint8]] = {}
        for camera, image in self.images.items():
            seen = image[looked]
            if (seen == seen[0]).all():
                found.append(still_camera(camera, len(looked), bool((seen[0] == seen[0, 0, 0]).all())))
            else:
                moving[camera] = seen
        for one, other in itertools.combinations(moving, 2):
            if np.array_equal(moving[one], moving[other]):
                found.append(identical_cameras(one, other, f"all of {len(looked)} frames looked at"))
        return found

    def observation(self, frames: Sequence[int] | NDArray[np.int64] | slice) -> Observation:
        """The observation of a policy at these frames; a slice gives views, an index copies."""
        return Observation(
            images={camera: image[frames] for camera, image in self.images.items()},
            proprio=self.proprio[frames],
            instruction=[self.instruction[i] for i in self._numbers(frames)],
            **measured_by(self.geometry, frames),
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
            exact_proprio=None if self.exact_proprio is None else self.exact_proprio[rows],
            success=None if self.success is None else self.success[rows],
            intervention=None if self.intervention is None else self.intervention[rows],
            geometry={camera: known.take(rows) for camera, known in self.geometry.items()},
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
        """Summary for the console: one line for the numbers, one for the names."""
        tasks = list(dict.fromkeys(self.instruction))
        cameras = ", ".join(f"{camera} {image.shape[1]}x{image.shape[2]}" for camera, image in self.images.items())
        where = "" if self.nbytes > self.proprio.nbytes + self.action.nbytes else ", left on disk"
        said = f"'{tasks[0]}'" if len(tasks) == 1 else f"{len(tasks)} tasks"
        return [
            f"{name}: {numbered(len(self.episodes), 'episode')}, {numbered(self.num_frames, 'frame')} at "
            f"{self.fps:g} Hz, {said}",
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
    depth: bool = False,
    num_threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> DemoSet:
    """Read a whole LeRobotDataset v3 folder; its pixels into memory, or (`lazy`) only when a frame is requested.

    `cameras`: names without "observation.images.", in the order wanted; None for all. `action_dim`, `proprio_dim`: the
    widths the policy needs. `image_size`: resize to this square while decoding (large videos must). `lazy` None: if the
    pixels would take more than half of the free memory. `depth`: each camera's depth and calibration, too
    (`vla.data.camera_geometry`), always in memory. `on_progress(frames decoded, frames to decode)` counts every
    camera. ValueError, one line, naming the feature at fault.
    """
    root = Path(root)
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size must be a whole number of pixels, at least 1, got {image_size}")
    info = read_info(root)
    features = info["features"]
    keys = camera_keys(features, cameras)
    for key, wanted in ((PROPRIO, proprio_dim), (ACTION, action_dim)):
        check_width(features, key, wanted)
    if lazy is None:
        lazy = _pixels(features, list(keys.values()), info["total_frames"], image_size) > 0.5 * free_memory()
    in_memory = [] if lazy else [key for key in keys.values() if features[key]["dtype"] == "image"]
    measured = geometry_features(features, keys) if depth else {}
    told = [name for name in (SUCCESS, INTERVENTION) if name in features]
    table, order = read_table(root, info, [PROPRIO, ACTION, *told, *in_memory, *table_columns(features, measured)])
    proprio, action = (vectors(table, features, key) for key in (PROPRIO, ACTION))
    if not lazy:
        _check_memory(features, list(keys.values()), len(table), image_size)
    done, total = 0, len(table) * len(keys)

    def count(frames: int) -> None:
        nonlocal done
        done += frames
        if on_progress is not None:
            on_progress(done, total)

    names = {key: component_names(features, key) for key in (ACTION, PROPRIO)}
    episode = table.column("episode_index").to_numpy()
    geometry = read_geometry(root, info, table, measured, image_size)
    images: dict[str, NDArray[np.uint8] | LazyFrames] = {}
    for camera, key in keys.items() if lazy else ():
        images[camera] = on_disk(root, info, table, order, key, image_size)
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
        instruction=instructions(root, table),
        episode_index=episode,
        fps=float(info["fps"]),
        action_names=names[ACTION],
        proprio_names=names[PROPRIO],
        privileged=simulator_state(root, table, "privileged"),
        exact_proprio=simulator_state(root, table, "exact_proprio"),
        success=flags(root, table, SUCCESS) if SUCCESS in told else None,
        intervention=flags(root, table, INTERVENTION) if INTERVENTION in told else None,
        noticed=(
            *naming_findings(features, (ACTION, PROPRIO)),
            *unused_findings(features, ACTION),
            *(found for found in unread_findings(features, PROPRIO) if found.severity != "note"),
            *rounding_findings(table, features, names),
            *timing_findings(table, info),
            *foreign_findings(root),
            *(() if image_size else _shapes(features, keys, images)),
            *geometry_findings(geometry),
            *placement_findings(
                {camera: known.look() for camera, known in geometry.items()},
                {camera: known.extrinsics for camera, known in geometry.items()},
                proprio,
                names[PROPRIO],
                episode,
            ),
            *(found for camera in geometry for found in shape_findings(features, camera, keys[camera])),
        ),
        aspects={} if image_size else {camera: image.shape[2] / image.shape[1] for camera, image in images.items()},
        geometry=geometry,
    )


def load_datasets(
    roots: Sequence[str | os.PathLike[str]],
    cameras: Sequence[str] | None = None,
    *,
    image_size: int | None = None,
    lazy: bool | None = None,
    depth: bool = False,
) -> dict[str, DemoSet]:
    """Several folders by the shortest names that tell them apart. An error names the folder when there are several."""
    paths = [Path(root) for root in roots]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [os.fspath(path) for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"the dataset {twice} is named twice: name each folder once (vla train --weights draws one more often)"
        )
    found = {}
    for name, path in zip(names, paths, strict=True):
        try:
            found[name] = load_dataset(path, cameras, image_size=image_size, lazy=lazy, depth=depth)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}" if len(paths) > 1 else str(problem)) from None
    return found


# ---------------------------------------------------------------------- pixels
def _shapes(
    features: dict[str, Any], keys: Mapping[str, str], images: Mapping[str, NDArray[np.uint8] | LazyFrames]
) -> list[Finding]:
    """A finding for each camera whose pictures have another size than is declared."""
    parts = ((camera, height_width(features, key), images[camera].shape[1:3]) for camera, key in keys.items())
    return [finding for part in parts for finding in other_shape(*part)]


def _check_memory(features: dict[str, Any], keys: list[str], frames: int, image_size: int | None) -> None:
    needed, available = _pixels(features, keys, frames, image_size), free_memory()
    if needed > 1 << 30 and needed > _MEMORY_SHARE * available:
        raise ValueError(
            f"{frames} frames of {len(keys)} cameras need {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} "
            "are free: leave them on disk (vla train --stream True), use fewer --cameras or a smaller --image-size"
        )


def _pixels(features: dict[str, Any], keys: list[str], frames: int, image_size: int | None) -> int:
    """Bytes of these cameras, decoded."""
    return frames * sum(3 * image_size**2 if image_size else int(np.prod(features[key]["shape"])) for key in keys)


def _rows_of(image: NDArray[np.uint8] | LazyFrames, rows: NDArray[np.int64]) -> NDArray[np.uint8] | LazyFrames:
    return image[rows] if isinstance(image, np.ndarray) else image.subset(rows)


def on_disk(
    root: Path, info: dict[str, Any], table: pa.Table, order: NDArray[np.int64], key: str, size: int | None
) -> LazyFrames:
    """One camera's frames of the rows of `table`, which lie at `order` in the files, decoded on request."""
    from vla.data.lazy_frames import LazyFrames, ParquetImages, Videos

    rows = np.arange(len(table))
    if info["features"][key]["dtype"] == "image":
        place = partial(row_place, table.select(["episode_index", "frame_index"]))  # the rest need not stay
        reader = ParquetImages(root, key, data_files(root, info), order, size, place)
    else:
        reader = Videos(root, info, table, key, size)
    height, width = reader.read(rows[:1])[0].shape[:2]
    return LazyFrames(reader, rows, (height, width))
