"""Pictures of a recording: dark, bright, frozen, alike or exchanged cameras. Of every episode a few are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vla.checking.motion import EpisodeFacts
from vla.checking.recording import Recording
from vla.checking.timing import colour_findings
from vla.data.camera_geometry import (
    depth_picture,
    depth_unit,
    filmed,
    geometry_features,
    lens_findings,
    matrices,
    placement_findings,
    shape_findings,
)
from vla.data.dataset_meta import height_width
from vla.data.decoding import check_image, mixed_sizes
from vla.data.findings import Finding, identical_cameras, listed, other_shape, still_camera
from vla.data.lerobot_dataset import PROPRIO, on_disk
from vla.data.tables import row_place
from vla.processing.cameras.calibration import NOTHING, measured
from vla.processing.cameras.placement import Look

if TYPE_CHECKING:
    from vla.data.lazy_frames import LazyFrames

_GRID = 16
"""Rows and columns of means by which pictures are compared: fine enough for an arm, too coarse for a codec's noise."""
_SAME = 2.0
"""Grey levels (of 255) within which two grids count as the same picture."""
_BLACK, _WHITE, _PLAIN = 10.0, 245.0, 2.0
_DARK, _CLIPPED = 35.0, 0.4
"""Mean grey level below which, and share of white or black pixels from which, exposure is told."""
_APART = 10.0
"""Grey levels by which two cameras must differ before they can be told apart."""
_COLOURED = 3.0
"""Mean difference between a view's red and blue, of 255, from which it shows when they are exchanged."""
_GREY = 1.5
"""Levels between a picture's colours up to which it is grey."""
_CHANGES = {
    "has red and blue exchanged (BGR instead of RGB?)": ("colours_swapped", np.s_[..., ::-1]),
    "stands on its head": ("camera_turned", np.s_[:, ::-1, ::-1]),
}
"""How pictures (B, H, W, 3) of some episodes may be changed: in words -> the finding's code, and the change. Mirrored
ones are left out: a drawer may stand on either side."""
_FEWEST = 3
_MAPS = 32
"""Maps of depth, spread over the recording, that are looked at."""
_TOLD = 500
"""Pictures between two reports of progress."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Figures of what one camera showed in an episode, at the frames looked at."""

    grids: NDArray[np.float32]
    """(n, rows, columns, 3) means of the blocks of each picture."""
    mean: NDArray[np.float64]
    """(n,) grey level of each picture."""
    spread: NDArray[np.float64]
    """(n,) its standard deviation."""
    white: NDArray[np.float64]
    """(n,) share of its pixels at 250 or above."""
    black: NDArray[np.float64]
    """(n,) share of its pixels at 5 or below."""

    def stands(self) -> NDArray[np.bool_]:
        """(n - 1,) True where a picture is the one before it."""
        return (np.abs(np.diff(self.grids, axis=0)) < _SAME).all((1, 2, 3))


def camera_findings(
    recording: Recording,
    episodes: Sequence[EpisodeFacts],
    on_whole: Callable[[int], None],
    on_episode: Callable[[int], None],
) -> list[Finding]:
    """All findings about cameras. `on_whole(n)`, `on_episode(n)`: headers of n episodes' pictures have been read, some
    pictures of n episodes have been looked at."""
    found = _whole(recording, on_whole)
    damaged = {camera for finding in found for camera in finding.cameras}
    readers: dict[str, LazyFrames] = {}
    for camera, key in recording.cameras.items():
        try:
            readers[camera] = on_disk(recording.root, recording.info, recording.table, recording.order, key, None)
        except (ValueError, OSError) as problem:
            if camera not in damaged:
                found.append(Finding("pictures_unreadable", "error", str(problem), cameras=(camera,)))
            continue
        declared, shown_size = height_width(recording.info["features"], key), readers[camera].shape[1:3]
        found += other_shape(camera, declared, shown_size)
    places = {int(number): place for place, number in enumerate(recording.episodes)}
    seen: dict[str, dict[int, Seen]] = {camera: {} for camera in readers}
    faults: dict[str, list[tuple[int, str]]] = {}
    for done, episode in enumerate(episodes, 1):
        rows = recording.rows(places[episode.number]).start + episode.looked
        for camera, frames in readers.items():
            try:
                seen[camera][episode.number] = look(frames[rows])
            except (ValueError, OSError) as problem:
                if camera in damaged:
                    continue  # told already
                faults.setdefault(camera, []).append((episode.number, str(problem)))
        on_episode(done)
    for camera, list_of in faults.items():
        more = f" (and in {len(list_of) - 1} more episodes)" if len(list_of) > 1 else ""
        numbers = tuple(number for number, _ in list_of)
        found.append(Finding("pictures_unreadable", "error", list_of[0][1] + more, numbers, cameras=(camera,)))
    facts = {episode.number: episode for episode in episodes}
    for camera, shown in seen.items():
        found += _still(camera, shown) or [
            *_exposed(camera, shown),
            *_frozen(camera, shown, facts),
            *_turned(camera, shown),
        ]
    colours = {c: {n: one.grids.mean((1, 2)) for n, one in shown.items()} for c, shown in seen.items()}
    found += colour_findings(recording.root, recording.cameras, colours)
    names = list(seen)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            found += _alike(one, other, seen) or _exchanged(one, other, seen)
    return found


def calibration_findings(recording: Recording) -> list[Finding]:
    """Findings about depth and calibration of the cameras that have both, which only policies that read depth need:
    some maps without a measurement, matrices that cannot be true, and poses of the wrong way round."""
    found: list[Finding] = []
    maps: dict[str, dict[int, NDArray[np.uint16]]] = {}
    known: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for camera in recording.cameras:
        try:
            depth, inner, outer = geometry_features(recording.info["features"], [camera])[camera]
        except ValueError:
            continue  # which `vla train --xyz` says
        found += shape_findings(recording.info["features"], camera, recording.cameras[camera])
        try:
            maps[camera] = _looked_into(recording, depth)
        except ValueError as problem:
            found.append(Finding("depth_missing", "warning", str(problem), cameras=(camera,)))
        read, faults = [], {}
        for place, table in recording.vectors((inner, outer)):
            try:
                read.append(matrices(table, recording.info["features"], inner, outer))
            except ValueError as problem:
                faults[int(recording.episodes[place])] = str(problem)
        if faults:
            first, *others = faults
            text = faults[first] + (f" (and in {listed(others)})" if others else "")
            found.append(Finding("calibration", "warning", text, tuple(faults), cameras=(camera,)))
        elif read:
            known[camera] = np.concatenate([one for one, _ in read]), np.concatenate([one for _, one in read])
        if camera in maps and read:
            shape = next(iter(maps[camera].values())).shape
            found += lens_findings(camera, np.concatenate([one for one, _ in read]), shape)
    return found + _placed(recording, maps, known)


def _placed(
    recording: Recording,
    maps: Mapping[str, Mapping[int, NDArray[np.uint16]]],
    known: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> list[Finding]:
    """Findings about poses of the wrong way round: `maps` of some rows, mm, and the matrices of all, by camera."""
    looks = {}
    both = [camera for camera in maps if camera in known]
    rows = np.array(sorted(set.intersection(*(set(maps[camera]) for camera in both))) if both else [], np.int64)
    for camera in both:
        shapes = {maps[camera][row].shape for row in rows.tolist()}
        if len(shapes) == 1:
            metres = np.stack([maps[camera][row] for row in rows.tolist()]).astype(np.float32) / 1000
            looks[camera] = Look(metres, *(matrix[rows] for matrix in known[camera]))
    names = recording.names[PROPRIO]
    try:
        state = np.concatenate([recording.values(table, PROPRIO) for _, table in recording.vectors((PROPRIO,))])
    except ValueError:
        state = np.full((recording.frames, 1), np.nan)
    if not np.isfinite(state).all():
        state, names = np.zeros((recording.frames, 0)), ()  # which is told
    episode = recording.table.column("episode_index").to_numpy()
    return placement_findings(looks, {camera: poses for camera, (_, poses) in known.items()}, state, names, episode)


def _looked_into(recording: Recording, key: str) -> dict[int, NDArray[np.uint16]]:
    """Row -> (height, width) mm of some maps of a depth feature, the same rows of every feature. ValueError if none of
    them holds a measurement."""
    every = max(1, recording.frames // _MAPS)
    if recording.encoded(key):
        maps = dict(_pictured(recording, key, every))
    else:
        maps = dict(filmed(recording.root, recording.info, recording.table, key, every))
    if not any(measured(mm[None] / 1000).any() for mm in maps.values()):
        raise ValueError(
            f"feature '{key}' holds {NOTHING} of {len(maps)} frames looked at: a policy that reads depth learns none "
            "from it; is depth_unit right in its info in meta/info.json?"
        )
    return maps


def _pictured(recording: Recording, key: str, every: int) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """(row, map (H, W), mm) of every so many rows of a depth feature of pictures."""
    unit = depth_unit(recording.info["features"][key], key)
    for row, cell in recording.pictures(key):
        if row % every == 0:
            yield row, depth_picture(cell, recording.root, unit, key, partial(row_place, recording.table, row))


def _whole(recording: Recording, on_episode: Callable[[int], None]) -> list[Finding]:
    """Pictures that are missing, damaged, of more than eight bits or of another size: each one's header is read. Those
    of videos are known by their frames' times only."""
    found = []
    encoded = {camera: key for camera, key in recording.cameras.items() if recording.encoded(key)}
    episode, frame = (recording.table.column(name).to_numpy() for name in ("episode_index", "frame_index"))
    for at, (camera, key) in enumerate(encoded.items()):
        faults: dict[int, str] = {}
        sizes: dict[tuple[int, int], list[int]] = {}
        for done, (row, cell) in enumerate(recording.pictures(key), 1):
            number = int(episode[row])
            try:
                size = check_image(cell, recording.root, key, f"episode {number}, frame {frame[row]}")
            except ValueError as problem:
                faults.setdefault(number, str(problem))
            else:
                if not (those := sizes.setdefault(size, [])) or those[-1] != number:
                    those.append(number)
            if done % _TOLD == 0:
                on_episode(round((at + done / recording.frames) / len(encoded) * len(recording.episodes)))
        if faults:
            numbers = tuple(faults)
            more = f" (and in {listed(numbers[1:])})" if len(numbers) > 1 else ""
            text = faults[numbers[0]] + more
            found.append(Finding("pictures_unreadable", "error", text, numbers, cameras=(camera,)))
        if len(sizes) > 1:
            usual, other = sorted(sizes, key=lambda size: -len(sizes[size]))[:2]
            numbers = tuple(dict.fromkeys(sizes[other]))
            text = f"{mixed_sizes(key, usual, other)}; {other} are in {listed(numbers)}"
            found.append(Finding("picture_sizes", "warning", text, numbers, cameras=(camera,)))
    return found


def look(pictures: NDArray[np.uint8]) -> Seen:
    """Figures of pictures (n, H, W, 3)."""
    count, height, width, _ = pictures.shape
    grey = pictures.mean(-1, dtype=np.float32)
    rows, columns = (np.linspace(0, size, min(_GRID, size) + 1).astype(int)[:-1] for size in (height, width))
    sums = np.add.reduceat(np.add.reduceat(pictures.astype(np.float32), rows, axis=1), columns, axis=2)
    areas = np.diff(np.append(rows, height))[:, None] * np.diff(np.append(columns, width))[None]
    flat = grey.reshape(count, -1)
    return Seen(
        grids=sums / areas[None, :, :, None].astype(np.float32),
        mean=flat.mean(1),
        spread=flat.std(1),
        white=(flat >= 250).mean(1),
        black=(flat <= 5).mean(1),
    )


def _still(camera: str, shown: dict[int, Seen]) -> list[Finding]:
    """The finding for a camera that shows the same in the whole recording."""
    parts = list(shown.values())
    looked = sum(len(part.mean) for part in parts)
    if looked < 2 or any((np.abs(part.grids - parts[0].grids[0]) >= _SAME).any() for part in parts):
        return []
    return [still_camera(camera, looked, bool(parts[0].spread[0] < _PLAIN))]


def _exposed(camera: str, shown: dict[int, Seen]) -> list[Finding]:
    """Episodes with black, white or one-coloured pictures, and those too dark or too bright."""
    kinds: dict[str, list[int]] = {}
    for number, part in shown.items():
        plain = part.spread < _PLAIN
        for code, those in (
            ("camera_black", plain & (part.mean < _BLACK)),
            ("camera_white", plain & (part.mean > _WHITE)),
            ("camera_plain", plain & (part.mean >= _BLACK) & (part.mean <= _WHITE)),
        ):
            if those.any():
                kinds.setdefault(code, []).append(number)
        if not plain.any():
            if part.mean.mean() < _DARK or part.black.mean() > _CLIPPED:
                kinds.setdefault("camera_dark", []).append(number)
            if part.white.mean() > _CLIPPED:
                kinds.setdefault("camera_bright", []).append(number)
    words = {
        "camera_black": "is black",
        "camera_white": "is white",
        "camera_plain": "shows one colour",
        "camera_dark": "is underexposed: mostly black",
        "camera_bright": "is overexposed: mostly white",
    }
    found = []
    for code, numbers in kinds.items():
        which = "all episodes" if len(numbers) == len(shown) else listed(numbers)
        exposure = code in ("camera_dark", "camera_bright")
        remedy = (
            "mend its exposure and record again" if exposure else "leave these episodes out, or the camera (--cameras)"
        )
        level = np.mean([shown[number].mean.mean() for number in numbers])
        text = f"camera '{camera}' {words[code]} in {which} (mean grey level {level:.0f} of 255): {remedy}"
        found.append(Finding(code, "warning", text, tuple(numbers), cameras=(camera,)))
    return found


def _frozen(camera: str, shown: dict[int, Seen], facts: dict[int, EpisodeFacts]) -> list[Finding]:
    """Episodes in which the picture stands for half of the time or more while the robot moves."""
    frozen = []
    for number, part in shown.items():
        stands, moved = part.stands(), facts[number].moved
        run = longest = moving = 0
        for still, moves in zip(stands, moved, strict=True):
            run, moving = (run + 1, moving + bool(moves)) if still else (0, 0)
            longest = max(longest, run if moving >= 2 or moving == run else 0)
        if len(stands) >= 2 and longest >= max(2, len(stands) / 2) and not (part.spread < _PLAIN).all():
            frozen.append(number)
    if not frozen:
        return []
    text = (
        f"camera '{camera}' shows the same picture for half of {listed(frozen)} or longer while the robot moves: it "
        "froze; leave these episodes out"
    )
    return [Finding("camera_frozen", "warning", text, tuple(frozen), cameras=(camera,))]


def _turned(camera: str, shown: dict[int, Seen]) -> list[Finding]:
    """Episodes whose pictures are changed, by how the camera shows the others: in colour, or turned about."""
    numbers = [n for n, part in shown.items() if part.grids.shape[1:] == next(iter(shown.values())).grids.shape[1:]]
    if len(numbers) < 2 * _FEWEST:
        return []
    views = np.stack([shown[n].grids.mean(0) for n in numbers])
    spread = np.array([np.abs(np.diff(shown[n].grids, axis=-1)).max() for n in numbers])
    if (grey := spread < _GREY).any() and not grey.all() and np.median(spread[~grey]) > 20 * _GREY:
        odd = tuple(np.array(numbers)[grey].tolist())
        text = f"camera '{camera}' is grey in {listed(odd)}, in colour elsewhere: leave these episodes out"
        return [Finding("camera_grey", "warning", text, odd, cameras=(camera,))]
    for words, (code, change) in _CHANGES.items():
        turned, usual = np.zeros(len(views), bool), views[0]
        for _ in range(3):  # which episodes differ from the usual view, and the view without them
            own, other = (np.abs(part - usual).mean((1, 2, 3)) for part in (views, views[change]))
            turned = other < own
            usual = np.median(np.where(turned[:, None, None, None], views[change], views), axis=0)
        if 2 * turned.sum() > len(turned):
            turned, usual, own, other = ~turned, usual[None][change][0], other, own
        mirrored = np.abs(views[:, :, ::-1] - usual).mean((1, 2, 3))  # by the scene, and not by the camera
        clear = np.minimum(own, other) < 0.6 * np.where(turned, np.minimum(own, mirrored), other)
        shows = np.abs(usual - usual[None][change][0]).mean() >= (_COLOURED if code == "colours_swapped" else _APART)
        if turned.any() and clear.all() and shows:
            odd = tuple(np.array(numbers)[turned].tolist())
            text = (
                f"camera '{camera}' {words} in {listed(odd)}, by what it shows in the other {(~turned).sum()}: change "
                "these pictures back, or leave the episodes out"
            )
            return [Finding(code, "error", text, odd, cameras=(camera,))]
    return []


def _alike(one: str, other: str, seen: dict[str, dict[int, Seen]]) -> list[Finding]:
    """Two cameras that show the same."""
    both = [n for n in seen[one] if n in seen[other] and seen[one][n].grids.shape == seen[other][n].grids.shape]
    same = [n for n in both if (np.abs(seen[one][n].grids - seen[other][n].grids) < _SAME).all()]
    same = [n for n in same if (seen[one][n].spread > _PLAIN).any()]
    if not same:
        return []
    which = "all episodes" if len(same) == len(both) else listed(same)
    return [identical_cameras(one, other, which, tuple(same))]


def _exchanged(one: str, other: str, seen: dict[str, dict[int, Seen]]) -> list[Finding]:
    """Episodes in which each of two cameras looks like the other one elsewhere."""
    both = [n for n in seen[one] if n in seen[other] and seen[one][n].grids.shape[1:] == seen[other][n].grids.shape[1:]]
    if len(both) < _FEWEST:
        return []
    views = {name: np.stack([seen[name][n].grids.mean(0) for n in both]) for name in (one, other)}
    usual = {name: np.median(view, axis=0) for name, view in views.items()}

    def apart(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.abs(a - b).mean((-3, -2, -1))

    if apart(usual[one], usual[other]) < _APART:
        return []
    own = apart(views[one], usual[one]) + apart(views[other], usual[other])
    crossed = apart(views[one], usual[other]) + apart(views[other], usual[one])
    swapped = [n for n, yes in zip(both, crossed < 0.6 * own, strict=True) if yes]
    if not swapped:
        return []
    text = (
        f"cameras '{one}' and '{other}' are exchanged in {listed(swapped)}, by what they show in the other "
        f"{len(both) - len(swapped)}: rename them there, or leave these episodes out"
    )
    return [Finding("cameras_swapped", "error", text, tuple(swapped), cameras=(one, other))]
