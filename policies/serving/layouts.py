"""Observation layouts of clients: openpi's LIBERO, DROID and ALOHA layouts, the native one, and TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.core.config import decode, unknown
from vla.core.types import Observation
from vla.processing.pictures import to_uint8_picture

MAX_IMAGE_SIDE = 4096
_VIEW: dict[str, tuple[int, int] | None] = {"depth": None, "intrinsics": (3, 3), "extrinsics": (4, 4)}
"""Parts that a policy which reads depth is sent of every camera, and their shapes; None: that of the picture."""


@dataclass(frozen=True)
class Layout:
    """Keys on the wire; "a/b" may be a flat key or nested maps."""

    images: tuple[str, ...] = ()
    """One key for each camera of the policy, in its order. A layout may have more views than a policy reads."""
    cameras: tuple[str, ...] | None = None
    """The policy's cameras to which `images` belong, where its own order is not meant."""
    state: tuple[str, ...] = ("state",)
    """Joined, in this order, into the state that the policy reads."""
    prompt: str = "prompt"
    channels_first: bool = False
    """Images come as (3, H, W)."""

    def image_keys(self, cameras: Sequence[str]) -> dict[str, str]:
        """Camera of the policy -> key on the wire. ValueError where a camera has none."""
        if self.cameras is not None and len(self.cameras) != len(self.images):
            raise ValueError(f"a layout's cameras and images must be as many, got {self.cameras} and {self.images}")
        for what, names in (("cameras", self.cameras or ()), ("images", self.images), ("state", self.state)):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"a layout's {what} name '{twice[0]}' twice: each has one place")
        keys = dict(zip(self.cameras or cameras, self.images, strict=False))
        lacking = [camera for camera in cameras if camera not in keys]
        if lacking:
            raise ValueError(
                f"this layout has {len(self.images)} views, none of them for camera {', '.join(lacking)}: this policy "
                f"reads {', '.join(cameras)}"
            )
        return {camera: keys[camera] for camera in cameras}


LAYOUTS: dict[str, Layout] = {
    "libero": Layout(("observation/image", "observation/wrist_image"), state=("observation/state",)),
    "droid": Layout(
        ("observation/exterior_image_1_left", "observation/wrist_image_left"),
        state=("observation/joint_position", "observation/gripper_position"),
    ),
    "aloha": Layout(
        ("images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist", "images/cam_low"), channels_first=True
    ),
}
"""Layouts of openpi's clients. Source: Physical-Intelligence/openpi, src/openpi/policies and examples."""


_FORM = (
    "A layout has lists of keys on the wire and of cameras, and a prompt: images = ['camera/top', 'camera/hand'], "
    "cameras = ['front', 'wrist'] (the policy's, one for each), state = ['joints', 'gripper'] (joined), prompt = "
    "'task', channels_first = false"
)


def find_layout(name: str) -> Layout | None:
    """None for "native"; a named layout; or the TOML file `name`, with the fields of `Layout`. ValueError otherwise."""
    if name == "native":
        return None
    if name in LAYOUTS:
        return LAYOUTS[name]
    if not name.endswith(".toml"):
        raise ValueError(unknown(name, {*LAYOUTS, "native"}, "layout") + ", or a .toml file")
    try:
        return decode(Layout, tomllib.loads(Path(name).read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as problem:
        raise ValueError(f"{name} is no TOML: {problem}") from None
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}. {_FORM}") from None


class ObservationReader:
    """Checks one client's observation map and converts it to an Observation (B = 1). Every error names its key.

    Native keys: "images/<camera>" (H, W, 3), or grey (H, W), uint8 or floats in 0..1 (`vla.processing.pictures`),
    "state" (P,) numbers, "prompt" str; they work beside the layout's. Unknown keys are ignored. For a policy that
    reads depth also "depth/<camera>" (H, W) floats in metres, or whole numbers in millimetres, "intrinsics/<camera>"
    (3, 3) and "extrinsics/<camera>" (4, 4), as `vla.core.types.Observation` has them.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        *,
        proprio_dim: int | None = None,
        layout: Layout | None = None,
        depth: bool = False,
    ) -> None:
        self._cameras, self._proprio_dim, self._layout, self._depth = tuple(cameras), proprio_dim, layout, depth
        aliases = {} if layout is None else layout.image_keys(cameras)
        # The layout's first, so that the error for a missing key speaks the client's language.
        self._images = {camera: _distinct(aliases.get(camera), f"images/{camera}") for camera in cameras}
        self._state = [*dict.fromkeys([*([] if layout is None else [layout.state]), ("state",)])]
        self._prompt_keys = _distinct(None if layout is None else layout.prompt, "prompt")
        self.keys = {
            **{f"images/{camera}": keys for camera, keys in self._images.items()},
            "state": [" + ".join(parts) for parts in self._state],
            "prompt": self._prompt_keys,
            **({f"{part}/{camera}": [f"{part}/{camera}"] for part in _VIEW for camera in cameras} if depth else {}),
        }
        """Native key -> every key under which it is accepted."""

    def read(self, message: object) -> Observation:
        """The observation in `message`, batch size 1; ValueError with one line where it is not one."""
        if not isinstance(message, dict):
            raise ValueError(f"expected an observation map, got {type(message).__name__}")
        images = {camera: self._image(message, keys) for camera, keys in self._images.items()}
        views = {part: self._views(message, part) for part in _VIEW if self._depth}
        return Observation(images=images, proprio=self._proprio(message), instruction=[self._prompt(message)], **views)

    def unread(self, message: Mapping[str, Any], known: Collection[str]) -> str:
        """A line about single values in a message that nobody reads, as of a misspelt key or an option of the server's;
        "" where there are none. `known`: keys that others read. More views than are read are no matter."""
        read = {
            key.partition("/")[0] for keys in self.keys.values() for one in keys for key in (one, *one.split(" + "))
        }
        odd = [
            str(key)
            for key, value in message.items()
            if isinstance(value, bool | int | float | str)
            and key not in known
            and str(key).partition("/")[0] not in read
        ]
        return f"the message's {', '.join(odd[:5])} mean nothing here and are not read" if odd else ""

    def _views(self, message: dict[Any, Any], part: str) -> dict[str, np.ndarray]:
        """Camera -> depth (1, H, W), m, or a matrix (1, N, N)."""
        found = {}
        for camera in self._cameras:
            key, value = _find(message, [f"{part}/{camera}"])
            shape = _VIEW[part]
            if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or value.ndim != 2 or not value.size:
                raise ValueError(f"{key}: expected an array {shape or '(H, W)'} of numbers, got {_kind(value)}")
            if shape is not None and value.shape != shape:
                raise ValueError(f"{key}: expected shape {shape}, got {value.shape}")
            if max(value.shape) > MAX_IMAGE_SIDE:
                raise ValueError(f"{key}: {value.shape} is larger than {MAX_IMAGE_SIDE} pixels a side")
            unit = np.float32(0.001 if part == "depth" and value.dtype.kind in "iu" else 1)
            found[camera] = value.astype(np.float32)[None] * unit
        return found

    def _image(self, message: dict[Any, Any], keys: Sequence[str]) -> np.ndarray:
        key, value = _find(message, keys)
        first = self._layout is not None and self._layout.channels_first and key == keys[0]
        shape = "(3, H, W)" if first else "(H, W, 3)"
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{key}: expected an array {shape} of uint8, got {type(value).__name__}")
        channels = 0 if first else 2
        grey = value.ndim == 2 or (value.ndim == 3 and value.shape[channels] == 1)  # as cameras of robots may be
        plain = value.ndim == 3 and value.shape[channels] in (3, 4)
        if not (grey or plain) or value.size == 0:
            swapped = value.ndim == 3 and value.shape[2 - channels] == 3 != value.shape[channels]
            order = "channel, height, width" if first else "height, width, channel"
            hint = f"; send {order} order" if swapped else ""
            raise ValueError(f"{key}: expected {shape} uint8, got {value.shape} {value.dtype}{hint}")
        if max(value.shape) > MAX_IMAGE_SIDE:
            raise ValueError(f"{key}: {value.shape} is larger than {MAX_IMAGE_SIDE} pixels a side")
        try:
            picture = to_uint8_picture(value.transpose(1, 2, 0) if first and value.ndim == 3 else value, name=key)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        return np.ascontiguousarray(picture)[None]

    def _proprio(self, message: dict[Any, Any]) -> np.ndarray:
        for parts in self._state:
            if all(_lookup(message, key)[0] for key in parts):
                break
        else:
            # Nearest to what was meant: the first layout of which anything came.
            parts = next((p for p in self._state if any(_lookup(message, key)[0] for key in p)), self._state[0])
            if len(parts) == 1:
                _find(message, [keys[0] for keys in self._state])
            _find(message, [next(key for key in parts if not _lookup(message, key)[0])])
        width = "P" if self._proprio_dim is None else str(self._proprio_dim)
        state = np.concatenate([self._numbers(message, key, "N" if len(parts) > 1 else width) for key in parts])
        name = " + ".join(parts)
        if state.size == 0 or self._proprio_dim not in (None, state.size):
            raise ValueError(f"{name}: expected shape ({width},), got {state.shape}")
        return state[None]

    def _numbers(self, message: dict[Any, Any], key: str, width: str) -> np.ndarray:
        """One vector of finite numbers; where a state has several parts, a single number is one of length 1."""
        value = _lookup(message, key)[1]
        if width == "N" and isinstance(value, int | float | np.generic) and not isinstance(value, bool):
            value = np.asarray(value)[None]
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"{key}: expected an array ({width},) of numbers, got {got}")
        if value.ndim != 1:
            raise ValueError(f"{key}: expected shape ({width},), got {value.shape}")
        with np.errstate(over="ignore"):
            numbers = value.astype(np.float32)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{key}: value {int(np.flatnonzero(~np.isfinite(numbers))[0])} is NaN or infinite")
        return numbers

    def _prompt(self, message: dict[Any, Any]) -> str:
        key, value = _find(message, self._prompt_keys)
        if not isinstance(value, str):
            raise ValueError(f"{key}: expected a string, got {type(value).__name__}")
        return value


def _kind(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _distinct(alias: str | None, native: str) -> list[str]:
    return [native] if alias in (None, native) else [alias, native]


def _find(message: dict[Any, Any], keys: Sequence[str]) -> tuple[str, object]:
    for key in keys:
        found, value = _lookup(message, key)
        if found:
            return key, value
    raise ValueError(f"missing key {' or '.join(map(repr, dict.fromkeys(keys)))}; got {_list_keys(message)}")


def _lookup(message: Mapping[Any, Any], key: str) -> tuple[bool, object]:
    """`key` as a flat key, else "a/b" as a path through nested maps: (found, value)."""
    if key in message:
        return True, message[key]
    value: object = message
    for part in key.split("/"):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _list_keys(message: Mapping[Any, Any], limit: int = 12) -> str:
    names = []
    for key, value in message.items():
        children = value if isinstance(value, dict) and value else None
        names += [f"{key}/{child}" for child in children] if children else [str(key)]
    more = ", ..." if len(names) > limit else ""
    return (", ".join(sorted(names)[:limit]) + more) or "no keys"
