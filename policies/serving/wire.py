"""The bytes on the wire: openpi's msgpack-numpy dialect, with a decoder hardened against untrusted input.

An ndarray travels as the map {b"__ndarray__": True, b"data": bytes, b"dtype": dtype.str, b"shape": [..]} and a numpy
scalar as {b"__npgeneric__": True, b"data": item, b"dtype": dtype.str}; the marker keys are *bytes*. Everything else is
plain msgpack. There is no pickle anywhere, so a frame can carry data but never code.
Source of the dialect: Physical-Intelligence/openpi, packages/openpi-client, msgpack_numpy.py.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

MAX_FRAME_BYTES = 32 * 2**20
"""Largest frame either side accepts: four uncompressed 1080p images with room to spare."""
MAX_NDIM = 8
MAX_DEPTH = 8
"""Deepest nesting of maps and lists, the outermost being 1. An observation needs 2."""
MAX_NODES = 100_000
"""Most map entries and list elements in one frame: 32 MiB of one-byte empty lists would become gigabytes of objects."""
MAX_ITEMS = 4096
"""Most entries of one map or list. msgpack allocates the *declared* length before it has seen a single element."""
MAX_TEXT_BYTES = 64 * 2**10
"""Longest string (an instruction, a key)."""

_ARRAY_KEYS = frozenset({b"__ndarray__", b"data", b"dtype", b"shape"})
_SCALAR_KEYS = frozenset({b"__npgeneric__", b"data", b"dtype"})
_WIDE = ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")
# np.dtype() only ever sees a string found here: its own grammar (records, objects, datetimes) is no input format.
_DTYPES = {"|b1", "|i1", "|u1"} | {order + kind for order in "<>" for kind in _WIDE}


class WireError(ValueError):
    """A frame that is not valid, or a value that has no place on the wire. The message is one line."""


def one_line(value: object, *, limit: int = 4000) -> str:
    """`value` as a single printable line of at most `limit` characters, for error frames and logs.

    Keep the default limit when quoting another program's message, since its end names the remedy.
    """
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def pack(value: Any) -> bytes:
    """`value` (dicts, lists, scalars, strings, numpy arrays) as one frame; WireError where it has no encoding."""
    try:
        frame = msgpack.packb(value, default=_encode)
    except WireError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"cannot be sent: {one_line(error)}") from error
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(f"frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}: send smaller images")
    return frame


def unpack(frame: bytes) -> Any:
    """The value in `frame`; arrays come back writable, contiguous and in native byte order. Any fault: WireError."""
    if not isinstance(frame, bytes | bytearray | memoryview):
        raise WireError(f"expected a binary msgpack frame, got {type(frame).__name__}")
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(f"frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    counter = _NodeCounter()
    try:
        value = _unpack(frame, counter)
    except Exception as error:  # the trust boundary: whatever a hostile frame provokes in msgpack or numpy is one error
        place = _place(frame)
        raise WireError(f"{place}: {_reason(error)}" if place else f"malformed frame: {_reason(error)}") from error
    _check(value, "", 1)
    return value


def _unpack(frame: bytes | bytearray | memoryview, counter: _NodeCounter) -> Any:
    return msgpack.unpackb(
        frame,
        raw=False,
        strict_map_key=True,
        object_hook=counter.map_hook,
        list_hook=counter.list_hook,
        max_str_len=MAX_TEXT_BYTES,
        max_bin_len=MAX_FRAME_BYTES,
        max_array_len=MAX_ITEMS,
        max_map_len=MAX_ITEMS,
        max_ext_len=MAX_FRAME_BYTES,  # so that the hook says what was there
        ext_hook=_refuse_ext,
    )


def _encode(value: object) -> dict[bytes, Any]:
    """The msgpack encoding of numpy arrays and scalars. WireError for other types and dtypes."""
    if not isinstance(value, np.ndarray | np.generic):
        raise WireError(f"cannot be sent: a {type(value).__name__} has no encoding; make it numpy or plain Python")
    if value.dtype.str not in _DTYPES:
        raise WireError(f"cannot be sent: dtype {value.dtype} is not one of bool, int, uint, float (up to 64 bits)")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


class _NodeCounter:
    """Decoding hooks of one frame. They run while msgpack parses, so a bomb is refused before it has grown."""

    def __init__(self) -> None:
        self.nodes = 0

    def map_hook(self, node: dict[Any, Any]) -> Any:
        self._count(len(node))
        if b"__ndarray__" in node:
            return _decode_array(node)
        if b"__npgeneric__" in node:
            return _decode_scalar(node)
        return node

    def list_hook(self, node: list[Any]) -> list[Any]:
        self._count(len(node))
        return node

    def _count(self, children: int) -> None:
        self.nodes += 1 + children
        if self.nodes > MAX_NODES:
            raise WireError(f"frame holds more than {MAX_NODES} values: send numbers as arrays")


def _decode_array(node: dict[Any, Any]) -> NDArray[Any]:
    if node.keys() != _ARRAY_KEYS or node[b"__ndarray__"] is not True:
        raise WireError("array: expected exactly the keys __ndarray__ (true), data, dtype, shape")
    dtype, data, shape = _dtype(node[b"dtype"]), node[b"data"], node[b"shape"]
    if not isinstance(data, bytes):
        raise WireError(f"array: data must be binary, got {type(data).__name__}")
    if not isinstance(shape, list) or len(shape) > MAX_NDIM:
        raise WireError(f"array: shape must be a list of at most {MAX_NDIM} sizes")
    # type() and not isinstance(): True is an int, and no size.
    if not all(type(size) is int and 0 <= size <= MAX_FRAME_BYTES for size in shape):
        raise WireError(f"array: shape must hold sizes from 0 to {MAX_FRAME_BYTES}, got {one_line(shape, limit=80)}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise WireError(f"array: shape {shape} of {dtype} does not fit {len(data)} bytes")
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    if dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise WireError("array: a bool is neither 0 nor 1")
    # A copy, because frombuffer's view of `bytes` is read-only and torch refuses to share those quietly.
    return array.astype(dtype.newbyteorder("="), order="C", copy=True)


def _decode_scalar(node: dict[Any, Any]) -> np.generic:
    if node.keys() != _SCALAR_KEYS or node[b"__npgeneric__"] is not True:
        raise WireError("scalar: expected exactly the keys __npgeneric__ (true), data, dtype")
    dtype, data = _dtype(node[b"dtype"]), node[b"data"]
    allowed = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}[dtype.kind]
    if type(data) not in allowed:
        raise WireError(f"scalar: {type(data).__name__} data does not fit dtype {dtype}")
    with np.errstate(over="ignore"):
        return dtype.type(data)


def _dtype(name: object) -> np.dtype[Any]:
    if not isinstance(name, str) or name not in _DTYPES:
        raise WireError(f"dtype {one_line(name, limit=40)!r} is not allowed: bool, int, uint or float up to 64 bits")
    return np.dtype(name)


def _refuse_ext(code: int, data: bytes) -> None:
    raise WireError(f"msgpack extension type {code} is not allowed")


def _check(value: object, place: str, depth: int) -> None:
    """WireError naming the key under which something lies that a frame may not hold."""
    if isinstance(value, msgpack.Timestamp):
        raise WireError(f"{_key(place)}: a msgpack timestamp is not allowed: send numbers")
    if not isinstance(value, dict | list):
        return
    if depth > MAX_DEPTH:
        raise WireError(f"{_key(place)}: nested deeper than {MAX_DEPTH} levels")
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        _check(child, _join(place, key), depth + 1)


def _reason(error: Exception) -> str:
    """msgpack's errors in words; some of its have none."""
    text = one_line(error)
    if isinstance(error, msgpack.StackError):
        return f"nested deeper than {MAX_DEPTH} levels"
    if isinstance(error, msgpack.ExtraData):
        return "bytes follow after the end of the message"
    if isinstance(error, msgpack.FormatError):
        return "not msgpack"
    if isinstance(error, msgpack.OutOfData) or "incomplete input" in text:
        return "the frame ends before the message does"
    if isinstance(error, UnicodeDecodeError):
        return f"a string is not UTF-8 ({error.reason} at byte {error.start})"
    if key := re.match(r"([\w.]+) is not allowed for map key", text):
        return f"a key must be a string, not {key[1]}"
    if over := re.fullmatch(r"(\d+) exceeds max_(\w+)_len\((\d+)\)", text):
        what = {"str": "string of {} bytes", "bin": "binary of {} bytes", "array": "list of {} entries",
                "map": "map of {} entries", "ext": "msgpack extension type of {} bytes"}[over[2]]  # fmt: skip
        return f"{what.format(over[1])}, at most {over[3]} allowed"
    if isinstance(error, WireError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(frame: bytes | bytearray | memoryview) -> str:
    """The key, "a/b" for one in nested maps, at which a frame that cannot be decoded is broken; "" for none.

    The frame is gone through again, entry by entry of its maps, until one cannot be decoded. Only for faults.
    """
    data, path, at = bytes(frame), "", 0
    try:
        for _ in range(MAX_DEPTH):
            if at >= len(data) or not _is_map(data[at]):
                break
            walk = msgpack.Unpacker(max_buffer_size=MAX_FRAME_BYTES, raw=True, strict_map_key=False)
            walk.feed(data[at:])
            broken = None
            for _ in range(min(walk.read_map_header(), MAX_ITEMS)):
                key = walk.unpack()
                start = at + walk.tell()
                try:
                    walk.skip()
                except Exception:
                    broken = key, start
                    break
                if not _decodes(data[start : at + walk.tell()]):
                    broken = key, start
                    break
            if broken is None or (isinstance(broken[0], bytes) and broken[0] in _ARRAY_KEYS | _SCALAR_KEYS):
                break
            name, at = broken
            path = _join(path, name.decode("utf-8", "replace") if isinstance(name, bytes) else name)
    except Exception:  # the place is an aid; the fault itself is what matters
        pass
    return path


def _decodes(part: bytes) -> bool:
    """One entry of a map, decoded by itself under the same limits."""
    counter = _NodeCounter()
    try:
        _unpack(part, counter)
    except Exception:
        return False
    return True


def _is_map(first: int) -> bool:
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)


def _join(place: str, key: object) -> str:
    """ "images" and "front" -> "images/front"."""
    return "/".join(part for part in (place, one_line(key, limit=60)) if part)


def _key(place: str) -> str:
    return one_line(place, limit=200) or "frame"
