"""Two hundred malformed observations over a real websocket: each gets one line naming its key, and costs nothing."""

import msgpack
import numpy as np
import pytest

from policies.serving import wire
from policies.serving.client import PolicyClient
from tests.policies.serving.test_server import FIRST_ACTION, ask, assert_alive, observation, serving, talking

KEYS = ("images/front", "images/wrist", "state", "prompt")


def encoded(value):
    """The messages of `wire.pack` as plain maps that can be spoiled."""
    return msgpack.unpackb(wire.pack(value), strict_map_key=False)


def with_value(key, value):
    message = encoded(observation())
    *path, last = key.split("/")
    node = message
    for part in path:
        node = node[part]
    node[last] = value
    return msgpack.packb(message)


def array(shape=(4, 4, 3), dtype="|u1", **changes):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize if dtype in ("|u1", "<f4", "<f8", "<u2", "|b1") else 48
    node = {b"__ndarray__": True, b"data": bytes(size), b"dtype": dtype, b"shape": list(shape)}
    node |= {name.encode(): value for name, value in changes.items()}
    return {name: value for name, value in node.items() if value is not ...}


def deep(levels):
    value = 0
    for _ in range(levels):
        value = {"k": value}
    return value


def malformed():
    """Name -> (frame, the words of which one must be in the answer)."""
    good = wire.pack(observation())
    spoilt = {
        "short": array(data=bytes(7)), "long": array(data=bytes(4000)), "text data": array(data="x" * 48),
        "number data": array(data=3), "no data": array(data=...),
        "no shape": {name: value for name, value in array().items() if name != b"shape"},
        "object": array(dtype="|O"), "record": array(dtype="f4,f4"), "unicode": array(dtype="<U4"),
        "datetime": array(dtype="<M8[s]"), "complex": array(dtype="<c8"), "void": array(dtype="|V16"),
        "a name": array(dtype="uint8"), "a list for dtype": array(dtype="|u1") | {b"dtype": ["|u1"]},
        "negative": array() | {b"shape": [-4, -4, 3]}, "huge": array() | {b"shape": [2**40, 0, 3]},
        "nine dimensions": array() | {b"shape": [1] * 9}, "shape a number": array() | {b"shape": 48},
        "shape of floats": array() | {b"shape": [4.0, 4.0, 3.0]}, "shape of bools": array() | {b"shape": [True, 16, 3]},
        "flag false": array() | {b"__ndarray__": False}, "an extra field": array() | {b"more": 1},
        "scalar overflow": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"},
        "scalar text": {b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"},
        "extension": msgpack.ExtType(5, b"abc"), "timestamp": msgpack.Timestamp(1, 2),
        "deep": deep(9), "deeper": deep(200), "deepest": deep(480), "integer keys": {1: 2},
        "a list of 5000": [0] * 5000, "null": None, "a number": 7, "true": True, "a list": [1, 2, 3],
        "a map": {"a": 1}, "nothing": {}, "five dimensions": array((1, 2, 2, 4, 3)), "empty": array((0, 4, 3)),
        "bool": array(dtype="|b1", shape=(4, 4, 3)), "16 bits": array(dtype="<u2"),
        "nan": encoded(np.full((4, 4, 3), np.nan)), "vector of nan": encoded(np.full(3, np.nan)),
        "float of 255": encoded(np.full((4, 4, 3), 255.0)), "channels first": array((3, 8, 9)),
        "bytes": b"raw", "1 MB of text": "x" * 2**20, "bad text": array(data=None),
    }  # fmt: skip
    for key in KEYS:
        for name, value in spoilt.items():
            yield f"{key}: {name}", with_value(key, value), (key,)
    for key in KEYS:
        message = observation()
        node = message["images"] if key.startswith("images/") else message
        del node[key.rpartition("/")[2]]
        yield f"{key}: missing", wire.pack(message), (key,)
        place = good.index(key.rpartition("/")[2].encode())
        yield f"{key}: cut within", good[: place + len(key.rpartition("/")[2]) + 1], ("ends before", key)
    yield "nothing at all", b"", ("ends before",)
    yield "no msgpack", b"\xc1", ("not msgpack",)
    yield "stack", b"\x81\xa5state" + b"\x91" * 5000 + b"\x00", ("state",)
    yield "a list", msgpack.packb([1]), ("expected an observation map, got list",)
    yield "a number", msgpack.packb(1), ("expected an observation map, got int",)
    yield "two messages", good + good, ("bytes follow",)
    yield "bad utf-8", b"\x81\xa6prompt\xa2\xff\xfe", ("prompt",)
    yield "whole_chunk a word", wire.pack(observation(whole_chunk="yes")), ("whole_chunk",)
    yield "a text frame", "hello", ("binary",)


def test_every_malformed_frame_gets_one_line_that_names_its_key():
    cases = list(malformed())
    assert len(cases) >= 200
    wrong = []
    with serving() as server:
        with talking(server) as ws:
            for name, frame, words in cases:
                reply = ask(ws, frame)
                if name == "prompt: bytes" and not isinstance(reply, str):
                    continue
                fine = isinstance(reply, str) and "\n" not in reply and any(word in reply for word in words)
                if not fine or reply.endswith(":") or len(reply) > 600:
                    wrong.append((name, reply))
            assert wrong == []
            assert ask(ws, observation())["actions"][0, 0] == FIRST_ACTION, "the same connection"
        assert_alive(server)
    assert 'outcome="failed"' not in server.metrics.text(), "none of them reached the policy"


def test_pictures_of_0_to_1_are_scaled():
    with serving() as server, talking(server) as ws:
        images = {"front": np.full((8, 6, 3), 10 / 255, np.float32), "wrist": np.full((5, 5, 3), 20, np.int64)}
        assert ask(ws, observation(images=images))["actions"][0, 0] == pytest.approx(FIRST_ACTION)


def test_infer_of_something_else_than_a_dict_names_what_it_takes():
    with serving() as server, PolicyClient(server.uri, timeout_s=5) as client:
        with pytest.raises(ValueError, match="dict of images, state and prompt, got list; act takes an Observation"):
            client.infer([1])
