"""Pictures of ROS messages, sensor_msgs Image and CompressedImage, as uint8 RGB."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_LAYOUTS: dict[str, tuple[int, tuple[int, int, int]]] = {
    "rgb8": (3, (0, 1, 2)), "bgr8": (3, (2, 1, 0)), "8UC3": (3, (2, 1, 0)), "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)), "8UC4": (4, (2, 1, 0)), "mono8": (1, (0, 0, 0)), "8UC1": (1, (0, 0, 0)),
}  # fmt: skip
"""Encoding -> bytes of a pixel, and which of them are red, green and blue. 8UC3 is OpenCV's order (cv_bridge)."""


def picture_of(message: Mapping[str, Any]) -> NDArray[np.uint8]:
    """(H, W, 3) RGB. ValueError naming the encoding or format that is not read, or what is damaged."""
    data = _bytes(message.get("data"))
    if "format" in message:
        return _decompressed(data, str(message["format"]))
    encoding = str(message.get("encoding"))
    if encoding not in _LAYOUTS:
        raise ValueError(
            f"its encoding is '{encoding}', which is not read (depth, or more than eight bits): publish one of "
            f"{', '.join(_LAYOUTS)}"
        )
    size, channels = _LAYOUTS[encoding]
    height, width, step = (int(message.get(name, 0)) for name in ("height", "width", "step"))
    if height < 1 or width < 1 or step < width * size or len(data) < height * step:
        raise ValueError(f"its picture of {width}x{height} pixels, {step} bytes a line, has {len(data)} bytes")
    lines = np.frombuffer(data, np.uint8, count=height * step).reshape(height, step)  # they may be padded
    pixels = lines[:, : width * size].reshape(height, width, size)
    return np.ascontiguousarray(pixels[..., list(channels)])


def _decompressed(data: bytes, format: str) -> NDArray[np.uint8]:
    """JPEG and PNG hold their colours as they are, whatever order `format` says that the camera had."""
    if "compressedDepth" in format:
        raise ValueError(f"its format is '{format}': depth is not read")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("RGB", "L", "RGBA"):
                raise ValueError(f"its picture has mode {image.mode}: only eight bits a channel are read")
            return np.asarray(image.convert("RGB"))
    except OSError:
        raise ValueError(f"its picture ('{format}', {len(data)} bytes) cannot be decoded") from None


def _bytes(data: Any) -> bytes:
    """A uint8[] field: base64 in rosbridge's JSON, bytes in its CBOR; lists are allowed, too."""
    if isinstance(data, str):
        try:
            return base64.b64decode(data, validate=True)
        except binascii.Error:
            raise ValueError("its data are not base64") from None
    if isinstance(data, bytes):
        return data
    return np.asarray([] if data is None else data, np.uint8).tobytes()
