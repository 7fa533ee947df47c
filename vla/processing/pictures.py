"""Pictures as policies read them, uint8 RGB in 0..255: the one place that converts other kinds or refuses them.

Datasets, robots' cameras, the policy server and the LeRobot plugin all pass through here, so that a picture means the
same in training and in use. The range is never guessed from a single picture: a dark frame would be scaled differently
from a bright one. Imports no torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_OVERSHOOT = 0.02
"""Float pictures may leave 0..1 by this much, as resampling filters overshoot; they are clipped."""
_DEEP_MODES = ("I", "F")
"""Pillow's modes of more than eight bits begin so: I, I;16, I;16B, I;16L, F."""


def to_uint8_picture(array: Any, *, name: str) -> NDArray[np.uint8]:
    """(..., H, W, 3) uint8 RGB of one picture or a batch. ValueError naming `name` where that would be a guess.

    uint8 is returned as it is. Floats must lie in 0..1 and are multiplied by 255. Wider integers must lie in 0..255,
    but uint16 is refused: whether it counts to 255 or 65535, or measures millimetres, cannot be seen in a picture.
    A single grey picture, (H, W) or (H, W, 1), becomes three equal channels; a fourth (alpha) channel is dropped.
    """
    values = np.asarray(array)
    return _to_uint8(_to_rgb(values, name), name)


def _to_rgb(values: NDArray[Any], name: str) -> NDArray[Any]:
    """(..., H, W, 3) of the layouts that are unambiguous."""
    if values.dtype.kind not in "uifb":
        raise ValueError(f"camera '{name}' must be an array of numbers (H, W, 3), got {values.dtype}")
    if values.size == 0:
        raise ValueError(f"camera '{name}' has an empty picture, shape {values.shape}")
    if values.ndim == 2:
        values = values[..., None]
    channels = values.shape[-1] if values.ndim >= 3 else 0
    if channels == 1:
        return np.broadcast_to(values, (*values.shape[:-1], 3))
    if channels == 4:
        return values[..., :3]
    if channels != 3:
        first = values.ndim >= 3 and values.shape[-3] in (1, 3)
        hint = ", channels first: transpose it" if first else ""
        raise ValueError(f"camera '{name}' must have the shape (H, W, 3), got {values.shape}{hint}")
    return values


def _to_uint8(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        raise ValueError(
            f"camera '{name}' gives 16-bit pictures (depth in millimetres?), policies read uint8 RGB: "
            "convert it to 8 bits, or leave this camera out"
        )
    if values.dtype.kind == "b":
        raise ValueError(f"camera '{name}' gives true and false, policies read uint8 RGB: multiply it by 255")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"camera '{name}' has NaN or infinity in its picture")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
            raise ValueError(
                f"camera '{name}' gives {values.dtype} values from {low:g} to {high:g}: floats must be in 0..1 "
                "(or send uint8 in 0..255)"
            )
        return (values.astype(np.float32) * 255).round().clip(0, 255).astype(np.uint8)
    if low < 0 or high > 255:
        raise ValueError(
            f"camera '{name}' gives {values.dtype} values from {low} to {high}, pictures are uint8 in 0..255"
        )
    return values.astype(np.uint8)


def is_black(picture: NDArray[np.uint8]) -> bool:
    """True if no value of a picture, or of a batch of them (..., H, W, 3), is above 1: nothing can be seen in it. So
    are floats in 0..1 that were cast to uint8."""
    return bool(picture[..., ::8, ::8, :].max() <= 1) and bool(picture.max() <= 1)


def black_picture(camera: str) -> str:
    """The line that tells it."""
    return (
        f"camera '{camera}' shows black, no value of 255 is above 1: is it covered, or were floats in 0..1 cast to "
        "uint8 (multiply them by 255)?"
    )


def check_eight_bits(mode: str, what: str) -> None:
    """ValueError if a picture of this Pillow mode has more than eight bits per channel, where converting clips to 255.

    `what` names the feature and the place, as in "feature 'observation.images.depth' holds ... at episode 0, frame 0".
    """
    if mode.startswith(_DEEP_MODES):
        raise ValueError(
            f"{what} of more than 8 bits (Pillow mode {mode}; depth in millimetres?), policies read 8-bit RGB: choose "
            "the other cameras (vla train --cameras), or set is_depth_map in the feature's info in meta/info.json"
        )


def resize(image_BHWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """To a square of `size` pixels; antialiased, so that shrinking averages. One matrix product per axis."""
    rows, columns = (_resampling(length, size) for length in image_BHWC.shape[1:3])
    batch, height, width = image_BHWC.shape[:3]
    lines = rows @ image_BHWC.reshape(batch, height, width * 3).astype(np.float32)  # (B, size, W * 3)
    out = columns @ lines.reshape(batch, size, width, 3)  # over the last two axes: (B, size, size, 3)
    return out.round().clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=32)
def _resampling(length: int, size: int) -> NDArray[np.float32]:
    """(size, length): weights of a triangle filter, as wide as a new pixel, about each new pixel's centre.

    What torch and Pillow call bilinear with antialiasing; tests hold it to torch's.
    """
    scale = length / size
    support = max(scale, 1.0)
    weights = np.zeros((size, length))
    for i in range(size):
        centre = scale * (i + 0.5)
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        distance = np.abs(np.arange(first, last) - centre + 0.5) / support
        weights[i, first:last] = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
