"""policies.serving.wire: byte compatibility with openpi's dialect, and a decoder that survives anything."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc

import msgpack
import numpy as np
import pytest

from policies.serving import wire
from vla.runtime.machine import resident_bytes

DTYPES = ["bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))]
DTYPES += ["float16", "float32", "float64"]


def array_map(array: np.ndarray, **changes: object) -> dict[bytes, object]:
    """Write an array as openpi's client does, by hand; `changes` spoil a field (None removes it)."""
    node = {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": list(array.shape)}
    for key, value in changes.items():
        name = {"flag": b"__ndarray__"}.get(key, key.encode())
        node[name] = value
    return {key: value for key, value in node.items() if value is not None}


def observation() -> dict[str, object]:
    rng = np.random.default_rng(0)
    return {
        "images": {"front": rng.integers(0, 256, (6, 5, 3), dtype=np.uint8), "wrist": np.zeros((4, 4, 3), np.uint8)},
        "state": rng.normal(size=7).astype(np.float32),
        "prompt": "pick up the red cube",
        "step": np.int64(3),
        "flags": [True, None, 2.5, b"raw"],
    }


@pytest.mark.parametrize("name", DTYPES)
def test_arrays_and_scalars_round_trip(name: str) -> None:
    for shape in [(), (0,), (3,), (2, 3), (2, 0, 4), (1,) * 8]:
        array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2, dtype=name)
        back = wire.unpack(wire.pack(array))
        assert back.dtype == array.dtype and back.shape == array.shape and np.array_equal(back, array)
        assert back.flags.writeable and back.flags.c_contiguous
    scalar = np.dtype(name).type(1)
    assert wire.unpack(wire.pack([scalar]))[0] == scalar


def test_bytes_are_openpis_dialect_both_ways() -> None:
    image, state = np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.array([0.5, -1], np.float32)
    by_hand = msgpack.packb(
        {
            "observation/image": array_map(image),
            "observation/state": array_map(state),
            "prompt": "do it",
            "n": {b"__npgeneric__": True, b"data": 4, b"dtype": "<i8"},
        }
    )
    ours = wire.pack({"observation/image": image, "observation/state": state, "prompt": "do it", "n": np.int64(4)})
    assert ours == by_hand
    back = wire.unpack(by_hand)
    assert np.array_equal(back["observation/image"], image) and np.array_equal(back["observation/state"], state)
    assert back["prompt"] == "do it" and back["n"] == 4 and isinstance(back["n"], np.int64)


def test_non_contiguous_and_big_endian_arrays() -> None:
    strided = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-1]
    assert np.array_equal(wire.unpack(wire.pack(strided)), strided)
    back = wire.unpack(wire.pack(np.array([1, 256], ">i2")))
    assert back.dtype == np.int16 and back.dtype.isnative and back.tolist() == [1, 256]


BASE = np.arange(6, dtype=np.float32).reshape(2, 3)
MALFORMED = {
    "object dtype": array_map(BASE, dtype="|O"),
    "record dtype": array_map(BASE, dtype="f4,f4"),
    "string dtype": array_map(BASE, dtype="<U6"),
    "datetime dtype": array_map(BASE, dtype="<M8[s]"),
    "complex dtype": array_map(BASE, dtype="<c8"),
    "dtype name outside the dialect": array_map(BASE, dtype="float32"),
    "dtype of another type": array_map(BASE, dtype=["f4"]),
    "too few bytes": array_map(BASE, data=BASE.tobytes()[:-1]),
    "too many bytes": array_map(BASE, data=BASE.tobytes() + b"\0" * 4),
    "text data": array_map(BASE, data="x" * 24),
    "nine dimensions": array_map(BASE, shape=[2, 3] + [1] * 7),
    "negative size": array_map(BASE, shape=[-2, -3]),
    "huge size, no bytes": array_map(BASE, shape=[0, 2**62], data=b""),
    "bool size": array_map(BASE, shape=[True, 6]),
    "float size": array_map(BASE, shape=[2.0, 3.0]),
    "shape not a list": array_map(BASE, shape=6),
    "flag false": array_map(BASE, flag=False),
    "flag 1": array_map(BASE, flag=1),
    "no data": array_map(BASE, data=None),
    "no shape": array_map(BASE, shape=None),
    "an extra key": array_map(BASE, extra=1),
    "bool 2": array_map(np.array([True]), data=b"\2"),
    "scalar overflow": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"},
    "scalar kind": {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<i4"},
    "scalar text": {b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"},
    "scalar object": {b"__npgeneric__": True, b"data": 1, b"dtype": "|O"},
    "extension type": msgpack.ExtType(5, b"x"),
    "timestamp": msgpack.Timestamp(1, 2),
    "integer key": {1: 2},
    "long text": "x" * (wire.MAX_TEXT_BYTES + 1),
    "long list": [0] * (wire.MAX_ITEMS + 1),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_each_malformed_value_is_a_wire_error(case: str) -> None:
    frame = msgpack.packb({"images": {"front": MALFORMED[case]}})
    with pytest.raises(wire.WireError) as caught:
        wire.unpack(frame)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("case", ["too few bytes", "too many bytes"])
def test_a_size_that_does_not_fit_is_told_in_full(case: str) -> None:
    with pytest.raises(wire.WireError, match=r"shape \[2, 3\] of float32 does not fit (23|28) bytes"):
        wire.unpack(msgpack.packb(MALFORMED[case]))


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x81", b"\x01\x02", b"\xa2\xff\xfe", "text", None, 3])
def test_what_is_no_frame_is_a_wire_error(frame: object) -> None:
    with pytest.raises(wire.WireError):
        wire.unpack(frame)


def test_depth_is_capped() -> None:
    def nested(levels: int) -> object:
        value: object = 0
        for _ in range(levels):
            value = [value]
        return value

    assert wire.unpack(msgpack.packb(nested(wire.MAX_DEPTH))) == nested(wire.MAX_DEPTH)
    for levels in (wire.MAX_DEPTH + 1, 400):
        with pytest.raises(wire.WireError, match="nested deeper"):
            wire.unpack(msgpack.packb(nested(levels)))
    with pytest.raises(wire.WireError):
        wire.unpack(b"\x91" * 100_000 + b"\x00")


def test_small_frames_cannot_allocate_much() -> None:
    bombs = [
        (b"\xdc" + struct.pack(">H", 4096) + b"\x90" * 4096) * 1,  # 4096 empty lists: allowed, and small
        b"\xdd" + struct.pack(">I", 2**32 - 1),  # claims four billion elements
        (b"\xdd" + struct.pack(">I", wire.MAX_ITEMS)) * 1000,  # lists in lists, each claiming the most
        b"\xdc\x10\x00" + (b"\xdc\x10\x00" + b"\x90" * 4096) * 4096,  # 16 million empty lists in 16 MiB
        b"\xc6" + struct.pack(">I", 2**32 - 1) + b"x",  # claims 4 GiB of bytes
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            start = time.perf_counter()
            try:
                wire.unpack(bomb)
            except wire.WireError:
                pass
            else:
                assert bomb is bombs[0]
            assert time.perf_counter() - start < 30, "it hangs"
        assert tracemalloc.get_traced_memory()[1] < 150 * 2**20
    finally:
        tracemalloc.stop()


def test_frame_size_is_capped_on_both_sides() -> None:
    with pytest.raises(wire.WireError, match="over the limit.*smaller images"):
        wire.pack(np.zeros(wire.MAX_FRAME_BYTES, np.uint8))
    with pytest.raises(wire.WireError, match="over the limit"):
        wire.unpack(bytes(wire.MAX_FRAME_BYTES + 1))


@pytest.mark.parametrize(
    "value",
    [np.array([None]), np.array(["text"]), np.array([1j]), np.datetime64("2020-01-01"), object(), {1, 2}, 2**70],
)
def test_what_has_no_encoding_is_refused_before_sending(value: object) -> None:
    with pytest.raises(wire.WireError):
        wire.pack({"x": value})


def test_one_line_is_one_line() -> None:
    assert wire.one_line("a\nb\t c\r\x07") == "a b c ?"
    assert len(wire.one_line("x" * 10_000, limit=50)) == 50


def mutate(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at] = rng.choice([0x00, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xC4, 0xC7, 0xD6, 0xDD, 0xDF, 0xFF])
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            del data[at : at + rng.randrange(1, 9)]
        else:  # copy one stretch over another: real keys in wrong places
            source = rng.randrange(len(data) or 1)
            data[at : at + 12] = data[source : source + 12]
    return bytes(data)


def assert_plain(value: object) -> None:
    """Only what the wire knows may come out of the decoder."""
    if isinstance(value, np.ndarray | np.generic):
        assert value.dtype.kind in "biuf"
    elif isinstance(value, dict):
        for key, child in value.items():
            assert isinstance(key, str | bytes)
            assert_plain(child)
    elif isinstance(value, list):
        for child in value:
            assert_plain(child)
    else:
        assert value is None or type(value) in (bool, int, float, str, bytes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [3000, pytest.param(120_000, marks=pytest.mark.slow)])
def test_mutated_frames_decode_or_raise_wire_error(count: int) -> None:
    """No crash, no hang, memory flat. All 120,000: pytest -m slow tests/policies/serving/test_wire.py."""
    rng = random.Random(0)
    small = {"images": {"front": np.zeros((2, 1, 3), np.uint8)}, "state": np.ones(2, np.float32), "n": np.float32(1)}
    seeds = [wire.pack(observation()), wire.pack(small), wire.pack(np.eye(2))]
    refused, slowest, early = 0, 0.0, None
    for i in range(count):
        frame = mutate(seeds[i % len(seeds)], rng)
        start = time.perf_counter()
        try:
            assert_plain(wire.unpack(frame))
        except wire.WireError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
        slowest = max(slowest, time.perf_counter() - start)
        if i == count // 10:
            early = resident_bytes()
    assert count // 6 < refused < count  # both outcomes occur: the mutations are neither trivial nor hopeless
    assert slowest < 1.0
    assert resident_bytes() - early < 16 * 2**20
