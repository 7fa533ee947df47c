"""Metadata of a dataset folder, read before anything heavy is imported: `meta/info.json` of a LeRobotDataset v3
(versions, cameras, widths, names of components), and whether a folder is a grounding set."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vla.core.config import likely, load_json, nearest
from vla.core.paths import quoted
from vla.data.findings import Finding

IMAGE_PREFIX = "observation.images."
_CALIBRATION = ("intrinsics.", "extrinsics.")
_NUMBERS = ("float", "int", "uint", "bool")


def read_info(root: Path) -> dict[str, Any]:
    """The checked content of meta/info.json. ValueError, one line, where the folder is no finished v3 dataset."""
    if not (root / "meta" / "info.json").is_file():
        if (root / "recording" / "request.json").is_file():
            raise ValueError(
                f"{root} is an unfinished recording: repeat the command that recorded it, it will continue"
            )
        if root.exists():
            raise ValueError(f"{root} is not a LeRobotDataset folder: it has no meta/info.json")
        hub = not root.is_absolute() and len(root.parts) == 2 and not root.parent.exists()
        remedy = f"; no dataset is fetched: `hf download {root} --repo-type dataset --local-dir FOLDER` does that"
        raise ValueError(f"{root} does not exist{remedy if hub else ''}")
    info = load_json(root / "meta" / "info.json")
    if not isinstance(info, dict):
        raise ValueError(f"{root}: meta/info.json must be a map, it is a {type(info).__name__}")
    version = str(info.get("codebase_version", "unknown"))
    if not version.startswith("v3."):
        number = version.removeprefix("v").partition(".")[0]
        newer = number.isdigit() and int(number) > 3
        remedy = "write it anew with" if newer else "convert it with the conversion script of"
        raise ValueError(f"{root} is a LeRobotDataset {version}, not v3: {remedy} a LeRobot that writes v3")
    frames, fps = info.get("total_frames"), info.get("fps")
    if frames is None:
        raise ValueError(f"{root}: meta/info.json does not give total_frames, the number of frames in data/: add it")
    if not frames:
        raise ValueError(f"{root} holds no episodes")
    if not isinstance(frames, int):
        raise ValueError(f"{root}: meta/info.json must give total_frames as a number, it says {frames!r}")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"{root}: meta/info.json must give fps as a positive number, it says {fps!r}")
    features = info.get("features")
    if not isinstance(features, dict):
        raise ValueError(f"{root}: meta/info.json lists no features")
    for key, feature in features.items():
        if not isinstance(feature, dict) or not isinstance(feature.get("dtype"), str):
            raise ValueError(f"{root}: meta/info.json must give feature '{key}' a dtype")
    return info


def camera_keys(features: Mapping[str, Any], cameras: Sequence[str] | None) -> dict[str, str]:
    """Camera name -> feature name, in the requested order. Depth maps are no cameras."""
    present, depth = {}, set()
    for key, feature in features.items():
        if feature["dtype"] in ("image", "video"):
            name = key.removeprefix(IMAGE_PREFIX)
            if _is_depth(feature):
                depth.add(name)
            elif name in present:
                raise ValueError(f"features '{present[name]}' and '{key}' are both camera '{name}'")
            else:
                present[name] = key
    if not present:
        raise ValueError(f"the dataset has no camera: no feature is an image or a video, it has {', '.join(features)}")
    names = list(present) if cameras is None else list(map(camera_name, cameras))
    for name in names:
        if name in present:
            continue
        has = f"it has: {', '.join(sorted(present))}"
        if name in depth:
            raise ValueError(f"'{name}' is a depth map, policies read colour cameras; {has}")
        raise ValueError(f"the dataset has no camera '{name}'; {likely(nearest(name, present), has)}")
    if not names:
        raise ValueError(f"no camera was chosen; the dataset has: {', '.join(sorted(present))}")
    for name in names:
        _shape(features, present[name])
    return {name: present[name] for name in names}


def camera_name(text: str) -> str:
    """The camera's name where a feature's name may be written in its place: "observation.images.front" is "front"."""
    return text.removeprefix(IMAGE_PREFIX)


def unused_findings(features: Mapping[str, Any], action: str) -> list[Finding]:
    """A finding for features that look like parts of the action and are none of `action`, which alone is learnt."""
    parts = [key for key in features if key.startswith(f"{action}.") or key == f"{action}s"]
    if not parts:
        return []
    text = f"only the feature '{action}' is learnt, these are left out: {', '.join(parts)}"
    return [Finding("action_left_out", "warning", f"{text}; join into '{action}' what the robot is to be sent")]


def unread_findings(features: Mapping[str, Any], state: str) -> list[Finding]:
    """A finding for features that look like parts of the `state`, which alone is read: a warning; and a note for other
    numbers that were observed."""
    prefix = f"{state.rpartition('.')[0]}."
    numbers = [key for key in features if key.startswith(prefix) and key != state and _numeric(features[key])]
    parts = [key for key in numbers if key.startswith(f"{state}.") or key == f"{state}s"]
    known = tuple(prefix + name for name in _CALIBRATION)
    others = [key for key in numbers if key not in parts and not key.startswith(known)]
    found = []
    for severity, keys in (("warning", parts), ("note", others)):
        if keys:
            text = f"of the numbers observed only the feature '{state}' is read, these are left out: {', '.join(keys)}"
            found.append(Finding("state_left_out", severity, f"{text}; join into '{state}' what the policy needs"))
    return found


def check_width(features: Mapping[str, Any], key: str, wanted: int | None) -> None:
    """ValueError unless feature `key` is a vector of numbers, with `wanted` components if that is given."""
    if key not in features:
        has = f"the dataset has no feature '{key}'; it has: {', '.join(sorted(features))}"
        raise ValueError(f"{has}; {_missing_vector(features, key)}")
    shape = _shape(features, key)
    if len(shape) != 1 or not str(features[key]["dtype"]).startswith(_NUMBERS):
        raise ValueError(
            f"feature '{key}' must be a vector of numbers, it is {features[key]['dtype']} of shape {shape}"
        )
    if wanted is not None and shape[0] != wanted:
        raise ValueError(
            f"feature '{key}' has {shape[0]} components, {wanted} are needed: "
            f"{', '.join(component_names(features, key))}"
        )


def _missing_vector(features: Mapping[str, Any], key: str) -> str:
    """The remedy for a dataset without the feature `key`, in words: join its parts, rename what is meant by it, or
    record it."""
    parts = [name for name in features if name.startswith(f"{key}.") and _numeric(features[name])]
    if parts:
        these = " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
        return f"{'join' if parts[1:] else 'rename'} {these} into '{key}', one vector for every frame"
    meant = {key, key.rpartition(".")[2]}
    alike = [name for name in features if _numeric(features[name]) and meant & {name, name.removesuffix("s")}]
    if len(alike) == 1:
        return f"rename '{alike[0]}' into it if that is meant"
    return "a policy learns from 'observation.state' and 'action'"


def _numeric(feature: Mapping[str, Any]) -> bool:
    return str(feature["dtype"]).startswith(_NUMBERS)


def component_names(features: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Names of a vector feature's components, in order; `key_0`, `key_1`, ... where the dataset names another number or
    leaves a name empty.

    LeRobot's tools write a list; {"delta_x": 0, "delta_y": 1} from a name to its place; or groups of either, such as
    {"motors": ["waist", "gripper"]}. Names that occur in two groups are told apart by them: "left.gripper".
    """
    width = features[key]["shape"][0]
    names = _names(features, key)
    return names if len(names) == width and all(map(str.strip, names)) else tuple(f"{key}_{i}" for i in range(width))


def naming_findings(features: Mapping[str, Any], keys: Sequence[str]) -> list[Finding]:
    """A finding for each of these features whose names cannot be those of its components, or name one twice."""
    notes = []
    for key in keys:
        names, given, width = _names(features, key), features[key].get("names"), features[key]["shape"][0]
        if given and len(names) != width:
            notes.append(
                f"feature '{key}' has {width} components but {len(names)} names in meta/info.json: they are not used"
            )
        elif not all(map(str.strip, names)):
            notes.append(f"feature '{key}' has components without a name in meta/info.json: its names are not used")
        elif len(set(names)) < len(names):
            notes.append(f"feature '{key}' names a component twice: {', '.join(names)}")
    return [Finding("component_names", "warning", note) for note in notes]


def _names(features: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = list(_flat(features[key].get("names"), ""))
    if len({name for _, name in found}) < len(found):
        return tuple(f"{group}.{name}" if group else name for group, name in found)
    return tuple(name for _, name in found)


def _shape(features: Mapping[str, Any], key: str) -> tuple[int, ...]:
    shape = features[key].get("shape")
    good = isinstance(shape, list | tuple) and all(isinstance(size, int) and size > 0 for size in shape)
    if not good:
        raise ValueError(f"feature '{key}' must have a shape of positive whole numbers in meta/info.json, not {shape}")
    return tuple(shape)


def height_width(features: Mapping[str, Any], key: str) -> tuple[int, int]:
    """Pixels of a camera's pictures, as meta/info.json declares them."""
    shape = _shape(features, key)
    return shape[1:3] if shape[0] in (1, 3, 4) else shape[:2]


def _flat(names: Any, group: str) -> Iterator[tuple[str, str]]:
    """(group, name) of every name in any of the shapes that datasets have."""
    if isinstance(names, dict):
        places = list(names.values())
        if places and all(isinstance(place, int | float) and not isinstance(place, bool) for place in places):
            names = sorted(names, key=names.__getitem__) if len(set(places)) == len(places) else ()
        else:
            for inner, part in names.items():
                yield from _flat(part, str(inner))
            return
    if isinstance(names, list | tuple):
        for name in names:
            yield from _flat("" if name is None else name, group)
    elif names is not None:
        yield group, str(names)


def depth_maps(features: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the cameras that see depth, which policies do not read."""
    pictures = (key for key, feature in features.items() if feature["dtype"] in ("image", "video"))
    return tuple(key.removeprefix(IMAGE_PREFIX) for key in pictures if _is_depth(features[key]))


def _is_depth(feature: Mapping[str, Any]) -> bool:
    """The feature is marked as a depth map, as LeRobot marks them."""
    marks = (("info", "is_depth_map"), ("info", "video.is_depth_map"), ("video_info", "video.is_depth_map"))
    return any(isinstance(feature.get(part), dict) and feature[part].get(name) for part, name in marks)


def set_digest(folder: Path) -> str:
    """Tells a set of `vla ground-data` or `vla talk-data` from another one in its place: of its questions, and of some
    of its pictures."""
    import numpy as np

    digest = hashlib.blake2b(digest_size=8)
    for name in ("questions.json", "talk.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    if (folder / "images.npy").is_file():  # what is no set is told where it is read
        images = np.load(folder / "images.npy", mmap_mode="r")
        digest.update(repr(images.shape).encode())
        digest.update(np.ascontiguousarray(images[:: max(1, len(images) // 32)]))
    return digest.hexdigest()


def require_grounding_set(folder: Path) -> None:
    """ValueError naming the remedy unless `vla ground-data` wrote this folder."""
    if not (folder / "questions.json").is_file():
        raise ValueError(f"{folder} is no grounding set; make one with `vla ground-data --out {quoted(folder)}`")
