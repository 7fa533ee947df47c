"""policies.serving.server over real sockets: openpi's protocol by hand-written bytes, and every way a client can be
wrong."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from policies.serving import wire
from policies.serving.layouts import LAYOUTS, Layout, ObservationReader
from policies.serving.server import Limits, PolicyServer, serve_in_thread
from vla.core.types import ActionSpec, Observation, PolicySpec

SPEC = ActionSpec(names=("dx", "dy", "gripper"), low=(-1.0,) * 3, high=(1.0,) * 3, control_hz=20.0)
CAMERAS = ("front", "wrist")
CHUNK = 4


class SumPolicy:
    """Deterministic in everything it is shown: step k, component a = state sum + mean of both views + prompt length."""

    def __init__(self) -> None:
        self.spec = PolicySpec(SPEC, cameras=CAMERAS, proprio_dim=3)
        self.resets = 0
        self.threads: set[int] = set()
        self.delay_s = 0.0
        self.busy = 0
        self.most_busy = 0

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        self.resets += 1

    def act(self, obs: Observation) -> np.ndarray:
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        self.threads.add(threading.get_ident())
        time.sleep(self.delay_s)
        prompt = obs.instruction[0]
        length = np.array([len(text) for text in obs.instruction])[:, None, None]
        value = obs.proprio.sum(1) + obs.images["front"].mean((1, 2, 3)) + 2 * obs.images["wrist"].mean((1, 2, 3))
        actions = value[:, None, None] + length + np.arange(CHUNK)[None, :, None] + np.zeros((1, 1, SPEC.dim))
        self.busy -= 1
        if prompt == "crash":
            raise KeyError("two\nlines")
        if prompt == "nan":
            actions[0, 1, 2] = np.nan
        if prompt == "narrow":
            actions = actions[..., :2]
        return actions  # float64 on purpose: the server answers float32


def observation(prompt: str = "lift", **changes: object) -> dict[str, object]:
    """Native layout; its actions begin at 6 + 10 + 2 * 20 + len(prompt)."""
    images = {"front": np.full((8, 6, 3), 10, np.uint8), "wrist": np.full((5, 5, 3), 20, np.uint8)}
    return {"images": images, "state": np.array([1, 2, 3], np.float32), "prompt": prompt} | changes


PATIENT = Limits(handshake_s=300.0)
FIRST_ACTION = 6 + 10 + 2 * 20 + len("lift")


@contextlib.contextmanager
def serving(policy: SumPolicy | None = None, **options: object) -> Iterator[PolicyServer]:
    server = PolicyServer(policy or SumPolicy(), **{"port": 0} | options)
    with serve_in_thread(server):
        yield server


@contextlib.contextmanager
def talking(server: PolicyServer, **options: object) -> Iterator[ClientConnection]:
    """A bare websocket, metadata frame already read."""
    with connect(server.uri, compression=None, max_size=None, proxy=None, **options) as ws:
        ws.metadata = wire.unpack(ws.recv(timeout=5))
        yield ws


def wait_for(happens: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def ask(ws: ClientConnection, frame: object) -> object:
    ws.send(frame if isinstance(frame, bytes | str) else wire.pack(frame))
    reply = ws.recv(timeout=5)
    return reply if isinstance(reply, str) else wire.unpack(reply)


@pytest.fixture(scope="module")
def shared() -> Iterator[PolicyServer]:
    """One server for the tests that only send it things: each thereby also shows that it survived the others."""
    with serving(layout=LAYOUTS["libero"], metadata={"policy": "sum"}) as server:
        yield server


def assert_alive(server: PolicyServer) -> None:
    with talking(server) as ws:
        assert ask(ws, observation())["actions"][0, 0] == FIRST_ACTION


def test_metadata_then_answers(shared: PolicyServer) -> None:
    with talking(shared) as ws:
        assert ws.metadata["policy"] == "sum" and ws.metadata["cameras"] == ["front", "wrist"]
        assert ws.metadata["action_spec"]["names"] == ["dx", "dy", "gripper"]
        assert ws.metadata["observation_keys"]["state"] == ["observation/state", "state"]
        first, second = ask(ws, observation()), ask(ws, observation("lift it"))
    assert first["actions"].shape == (CHUNK, 3) and first["actions"].dtype == np.float32
    assert first["actions"][:, 0].tolist() == [FIRST_ACTION + k for k in range(CHUNK)]
    assert second["actions"][0, 0] == FIRST_ACTION + 3
    assert set(first["policy_timing"]) == {"infer_ms"} and set(first["server_timing"]) == {"infer_ms"}
    assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]
    # openpi's ActionChunkBroker slices every array of the answer by control step: only the actions may be one.
    assert all(type(v) is float for part in ("policy_timing", "server_timing") for v in second[part].values())


def test_hand_built_openpi_libero_frame(shared: PolicyServer) -> None:
    def array(a: np.ndarray) -> dict[bytes, object]:
        return {b"__ndarray__": True, b"data": a.tobytes(), b"dtype": a.dtype.str, b"shape": a.shape}

    frame = msgpack.packb(
        {
            "observation/image": array(np.full((4, 4, 3), 10, np.uint8)),
            "observation/wrist_image": array(np.full((4, 4, 3), 20, np.uint8)),
            "observation/state": array(np.array([1.0, 2.0, 3.0])),
            "prompt": "lift",
            "some/extra": 1,
        }
    )
    with connect(shared.uri, compression=None, max_size=None, proxy=None) as ws:
        assert isinstance(msgpack.unpackb(ws.recv(timeout=5)), dict)
        ws.send(frame)
        reply = msgpack.unpackb(ws.recv(timeout=5))
    actions = reply["actions"]
    assert actions[b"__ndarray__"] is True and actions[b"dtype"] == "<f4" and actions[b"shape"] == [CHUNK, 3]
    assert np.frombuffer(actions[b"data"], "<f4")[0] == FIRST_ACTION


IMAGE = np.zeros((4, 4, 3), np.uint8)
BAD = {
    "missing camera": ({"images": {"front": IMAGE}}, "missing key 'observation/wrist_image' or 'images/wrist'; got"),
    "images not a map": ({"images": 3}, "'images/front'"),
    "image a list": ({"images": {"front": [1], "wrist": IMAGE}}, "images/front: expected an array (H, W, 3) of uint8"),
    "float image of 0..255": (
        {"images": {"front": IMAGE.astype(np.float32) + 200, "wrist": IMAGE}},
        "images/front: camera 'images/front' gives float32 values from 200 to 200: floats must be in 0..1",
    ),
    "image beyond 255": ({"images": {"front": IMAGE.astype(np.int32) + 300, "wrist": IMAGE}}, "images/front: "),
    "16-bit image": ({"images": {"front": IMAGE.astype(np.uint16), "wrist": IMAGE}}, "gives 16-bit pictures"),
    "NaN image": ({"images": {"front": IMAGE * np.float32(np.nan), "wrist": IMAGE}}, "has NaN or infinity"),
    "depth": (
        {"images": {"front": np.zeros((4, 4, 1), np.uint16), "wrist": IMAGE}},
        "images/front: camera 'images/front' gives 16-bit pictures",
    ),
    "CHW image": (
        {"images": {"front": np.zeros((3, 8, 9), np.uint8), "wrist": IMAGE}},
        "images/front: expected (H, W, 3) uint8, got (3, 8, 9) uint8; send height, width, channel order",
    ),
    "empty image": ({"images": {"front": IMAGE[:0], "wrist": IMAGE}}, "images/front: expected (H, W, 3)"),
    "wide state": ({"state": np.zeros(4)}, "state: expected shape (3,), got (4,)"),
    "flat state": ({"state": np.zeros((1, 3))}, "state: expected shape (3,), got (1, 3)"),
    "list state": ({"state": [1, 2, 3]}, "state: expected an array (3,) of numbers, got list"),
    "bool state": ({"state": np.ones(3, bool)}, "state: expected an array (3,) of numbers, got bool"),
    "NaN state": ({"state": np.array([0, np.nan, 0])}, "state: value 1 is NaN or infinite"),
    "overflowing state": ({"state": np.array([0, 0, 1e300])}, "state: value 2 is NaN or infinite"),
    "prompt a number": ({"prompt": 7}, "prompt: expected a string, got int"),
    "prompt None": ({"prompt": None}, "prompt: expected a string, got NoneType"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_observation_gets_one_line_naming_the_key_and_the_connection_stays(shared: PolicyServer, case: str) -> None:
    changes, expected = BAD[case]
    with talking(shared) as ws:
        reply = ask(ws, observation(**changes))
        assert isinstance(reply, str) and expected in reply and "\n" not in reply
        assert ask(ws, observation())["actions"][0, 0] == FIRST_ACTION


@pytest.mark.parametrize("key", ["state", "prompt", "images"])
def test_missing_key_is_named(shared: PolicyServer, key: str) -> None:
    message = observation()
    del message[key]
    with talking(shared) as ws:
        reply = ask(ws, message)
    assert isinstance(reply, str) and reply.startswith("missing key") and key.rstrip("s") in reply and "got " in reply


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("hello", "expected a binary msgpack frame, got a text frame"),
        (b"", "malformed frame"),
        (b"\xc1garbage", "malformed frame"),
        (wire.pack([1, 2]), "expected an observation map, got list"),
        (msgpack.packb({"state": {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [0]}}), "not allowed"),
    ],
)
def test_garbage_frame_is_answered(shared: PolicyServer, frame: bytes | str, expected: str) -> None:
    with talking(shared) as ws:
        reply = ask(ws, frame)
        assert isinstance(reply, str) and expected in reply and "\n" not in reply
        assert ask(ws, observation())["actions"][0, 0] == FIRST_ACTION


def test_failing_policy_answers_with_text_and_never_with_bad_actions(shared: PolicyServer) -> None:
    with talking(shared) as ws:
        assert ask(ws, observation("crash")) == r"policy failed: KeyError: 'two\nlines'"
        assert "NaN" in ask(ws, observation("nan"))
        assert "expected actions of shape (1, C, 3), got (1, 4, 2)" in ask(ws, observation("narrow"))
        assert ask(ws, observation())["actions"][0, 0] == FIRST_ACTION


def test_oversize_frame_is_refused_and_the_server_lives(shared: PolicyServer) -> None:
    with talking(shared) as ws, pytest.raises(ConnectionClosed) as caught:
        ws.send(bytes(wire.MAX_FRAME_BYTES + 1))
        ws.recv(timeout=5)
    assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009  # message too big
    assert_alive(shared)


def test_mutated_frames_are_answered_on_one_connection(shared: PolicyServer) -> None:
    rng, good = random.Random(1), wire.pack(observation())
    with talking(shared) as ws:
        for _ in range(150):
            data = bytearray(good)
            for _ in range(3):
                data[rng.randrange(len(data))] = rng.randrange(256)
            reply = ask(ws, bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data))
            assert isinstance(reply, dict) or "\n" not in reply
        assert ask(ws, observation())["actions"][0, 0] == FIRST_ACTION


def test_rude_clients_do_not_hurt(shared: PolicyServer) -> None:
    for raw in (b"", b"\x00\xff" * 200, b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", shared.port), timeout=5) as sock:
            sock.sendall(raw)
    with talking(shared) as ws:  # asks and is gone before the answer
        ws.send(wire.pack(observation()))
        ws.socket.shutdown(socket.SHUT_RDWR)
    assert_alive(shared)


def test_browsers_are_kept_out(shared: PolicyServer) -> None:
    with pytest.raises(InvalidStatus) as caught:
        connect(shared.uri, origin="http://example.com", proxy=None)
    assert caught.value.response.status_code == 403


def get(server: PolicyServer, path: str) -> tuple[int, bytes]:
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        link.request("GET", path)
        response = link.getresponse()
        return response.status, response.read()
    finally:
        link.close()


def test_healthz(shared: PolicyServer) -> None:
    assert get(shared, "/healthz") == (200, b"OK\n")
    assert get(shared, "/elsewhere")[0] == 426  # a plain request where a websocket is spoken


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("size", [None, 2, 3_000_000])
def test_what_is_posted_is_answered_in_words(shared: PolicyServer, method: str, size: int | None) -> None:
    """A request with a body, as curl and requests send it, gets status 405 and a line, where the websockets library
    closes the connection without an answer."""
    link = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=5)
    with contextlib.closing(link):
        with contextlib.suppress(ConnectionError):  # the answer may come before all of it is sent
            link.request(method, "/infer", body=None if size is None else b"{" * size)
        response = link.getresponse()
        body = response.read().decode()
    assert response.status == 405 and response.headers["Allow"] == "GET"
    assert body.startswith(f"a policy is not asked by {method}: this server speaks websocket (openpi's protocol)")
    assert "policies.serving.client.PolicyClient" in body and body.count("\n") == 1
    assert_alive(shared)


def test_a_post_that_comes_in_pieces_or_in_chunks_is_answered(shared: PolicyServer) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=5) as sock:
        for part in (b"POST / HT", b"TP/1.1\r\nHost: x\r\ntransfer-Encoding: chunked\r", b"\n\r\n2\r\n{}\r\n0\r\n\r\n"):
            sock.sendall(part)
            time.sleep(0.02)
        assert sock.recv(100).startswith(b"HTTP/1.1 405 Method Not Allowed\r\n")
    with socket.create_connection(("127.0.0.1", shared.port), timeout=5) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\n")  # and no more
    assert_alive(shared)


def test_api_key() -> None:
    with serving(api_key="s3cret") as server:
        assert get(server, "/healthz") == (200, b"OK\n")  # probes carry no key
        for headers in (
            {},
            {"Authorization": "Api-Key wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Api-Key s3cret2"},
            [("Authorization", "Api-Key s3cret"), ("Authorization", "Api-Key wrong")],
        ):
            with pytest.raises(InvalidStatus) as caught:
                connect(server.uri, additional_headers=headers, proxy=None)
            assert caught.value.response.status_code == 401
        with talking(server, additional_headers={"Authorization": "Api-Key s3cret"}) as ws:
            assert ask(ws, observation())["actions"][0, 0] == FIRST_ACTION


def test_refuses_to_face_the_network_without_a_key() -> None:
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "robot.local"):
        with pytest.raises(ValueError, match="set an api key .vla serve --api-key KEY. or bind 127.0.0.1"):
            PolicyServer(SumPolicy(), host=host)
    PolicyServer(SumPolicy(), host="0.0.0.0", api_key="k")
    assert PolicyServer(SumPolicy(), host="localhost").uri == "ws://127.0.0.1:8000"
    for key in ("", "two words", "clé", "a\nb"):
        with pytest.raises(ValueError, match="api_key must be printable ASCII"):
            PolicyServer(SumPolicy(), api_key=key)


def test_bad_configuration_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="2 views, none of them for camera c: this policy reads a, b, c"):
        ObservationReader(("a", "b", "c"), layout=LAYOUTS["libero"])
    with pytest.raises(ValueError, match="none of them for camera front"):
        ObservationReader(("front",), layout=Layout(("observation/image",), cameras=("top",)))
    with pytest.raises(ValueError, match="cannot be sent"):
        PolicyServer(SumPolicy(), metadata={"policy": SumPolicy()})


def test_flat_native_keys_are_accepted() -> None:
    flat = observation()
    images = flat.pop("images")
    obs = ObservationReader(CAMERAS).read(flat | {f"images/{name}": image for name, image in images.items()})
    assert list(obs.images) == ["front", "wrist"] and obs.images["front"].shape == (1, 8, 6, 3)
    assert obs.proprio.dtype == np.float32 and obs.proprio.shape == (1, 3) and obs.instruction == ["lift"]


def test_slow_policy_serves_clients_in_turn_on_one_thread_and_keeps_the_loop_free() -> None:
    policy = SumPolicy()
    policy.delay_s = 0.15
    with serving(policy, max_batch=1) as server, contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(talking(server)) for _ in range(3)]
        for i, ws in enumerate(sockets):
            ws.send(wire.pack(observation("lift" + i * "!")))
        wait_for(lambda: policy.busy)
        assert get(server, "/healthz") == (200, b"OK\n")
        assert sockets[0].ping().wait(timeout=1)
        assert policy.busy == 1  # answered while the policy was still at work
        replies = [wire.unpack(ws.recv(timeout=5))["actions"][0, 0] for ws in sockets]
    assert replies == [FIRST_ACTION + i for i in range(3)]  # each client got its own
    assert policy.most_busy == 1 and len(policy.threads) == 1


def test_policy_is_reset_for_a_lone_client_only() -> None:
    policy = SumPolicy()
    with serving(policy) as server:
        with talking(server), talking(server):
            assert policy.resets == 1
        wait_for(lambda: not server._clients.total())
        with talking(server):
            assert policy.resets == 2
