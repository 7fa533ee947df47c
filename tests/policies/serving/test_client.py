"""policies.serving.client against real servers: ours, one written by hand in openpi's manner, and servers that
misbehave."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgpack
import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve
from websockets.utils import accept_key

from policies.serving import wire
from policies.serving.client import PolicyClient
from policies.serving.server import Limits, PolicyServer, serve_in_thread
from vla.core.types import ActionSpec, Observation, Policy, PolicySpec

ROOT = Path(__file__).resolve().parents[3]
SPEC = ActionSpec(names=("dx", "gripper"), low=(-1.0, 0.0), high=(1.0, 1.0), control_hz=20.0)


class EchoPolicy:
    """(1, 3, 2): every action repeats [state sum, mean of the front view]; the prompt "slow" takes half a second."""

    def __init__(self, spec: ActionSpec = SPEC) -> None:
        self.spec = PolicySpec(spec, cameras=("front",))

    def reset(self, env_ids: Sequence[int] | None = None) -> None: ...

    def act(self, obs: Observation) -> np.ndarray:
        if obs.instruction == ["slow"]:
            time.sleep(0.5)
        action = np.stack([obs.proprio.sum(1), obs.images["front"].mean((1, 2, 3))], axis=1)
        return np.repeat(action[:, None], 3, axis=1).astype(np.float32)


def serving(port: int = 0, **options: object) -> contextlib.AbstractContextManager[PolicyServer]:
    spec = options.pop("action_spec", SPEC)
    return serve_in_thread(PolicyServer(EchoPolicy(spec), port=port, **options))


def observations(batch: int = 1) -> Observation:
    return Observation(
        images={"front": np.stack([np.full((4, 5, 3), i + 1, np.uint8) for i in range(batch)])},
        proprio=np.arange(batch * 3, dtype=np.float32).reshape(batch, 3),
        instruction=[f"task {i}" for i in range(batch)],
        privileged=np.zeros((batch, 9), np.float32),
    )


MESSAGE = {"images": {"front": np.zeros((4, 5, 3), np.uint8)}, "state": np.ones(3, np.float32), "prompt": "go"}


@contextlib.contextmanager
def handmade(handler: Callable[[ServerConnection], None], **options: object) -> Iterator[str]:
    """A websocket server whose conduct the test writes itself."""
    with serve(handler, "127.0.0.1", 0, compression=None, max_size=None, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join(5)


def test_client_is_a_policy_for_one_world_and_for_several() -> None:
    with serving(metadata={"policy": "echo"}) as server, PolicyClient(server.uri) as client:
        assert isinstance(client, Policy)
        assert client.metadata["policy"] == "echo" and client.spec.action_spec == SPEC
        one = client.act(observations())
        assert one.shape == (1, 3, 2) and one.dtype == np.float32 and one[0, 0].tolist() == [3, 1]
        client.reset([0])
        three = client.act(observations(3))
        assert three.shape == (3, 3, 2) and three[:, 1].tolist() == [[3, 1], [12, 2], [21, 3]]
        answer = client.infer(MESSAGE)
        assert answer["actions"].shape == (3, 2) and answer["server_timing"]["infer_ms"] > 0
        assert len(client.latencies_ms) == 5 and client.latencies_ms.maxlen is not None
        assert all(0 < ms < 5000 for ms in client.latencies_ms)
        assert client.latencies_ms[-1] >= answer["server_timing"]["infer_ms"]


def test_uri_without_scheme() -> None:
    with serving() as server, PolicyClient(f"127.0.0.1:{server.port}") as client:
        assert client.uri == server.uri and client.infer(MESSAGE)["actions"][0, 0] == 3


def test_server_errors_are_one_line_and_cost_nothing() -> None:
    with serving() as server, PolicyClient(server.uri) as client:
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=f"policy server at {server.uri}: prompt: expected a string"
            ) as caught:
                client.infer(MESSAGE | {"prompt": 3})
            assert "\n" not in str(caught.value)
        connection = client._connection
        assert client.infer(MESSAGE)["actions"][0, 0] == 3
        assert client._connection is connection  # still the first
        with pytest.raises(ValueError, match="cannot be sent"):
            client.infer(MESSAGE | {"state": object()})
        assert client.infer(MESSAGE)["actions"][0, 0] == 3


def test_api_key_is_sent_and_its_absence_explained_without_retries() -> None:
    with serving(api_key="k3y") as server:
        with PolicyClient(server.uri, api_key="k3y") as client:
            assert client.infer(MESSAGE)["actions"][0, 0] == 3
        for key in (None, "wrong"):
            start = time.monotonic()
            with pytest.raises(
                ConnectionError, match=f"{server.uri} refused this client .HTTP 401: send the header .*: pass the api"
            ):
                PolicyClient(server.uri, api_key=key, timeout_s=5)
            assert time.monotonic() - start < 30  # it does not hang


def free_port() -> int:
    with serving() as server:
        return server.port


def test_nobody_there() -> None:
    uri, start = f"ws://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(ConnectionError, match=f"{uri} in 0.3 s .*is `vla serve` running there") as caught:
        PolicyClient(uri, timeout_s=0.3)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 30  # it does not hang
    with pytest.raises(ValueError, match="expected ws://HOST:PORT"):
        PolicyClient("http://127.0.0.1:1")
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        PolicyClient(uri, timeout_s=0)


def test_waits_for_a_server_that_is_still_starting() -> None:
    port = free_port()
    clients: list[PolicyClient] = []
    thread = threading.Thread(target=lambda: clients.append(PolicyClient(f"ws://127.0.0.1:{port}", timeout_s=5)))
    thread.start()
    time.sleep(0.2)
    with serving(port):
        thread.join(5)
        assert clients and clients[0].infer(MESSAGE)["actions"][0, 0] == 3
        clients[0].close()


def test_reconnects_after_the_server_restarts() -> None:
    with serving() as server:
        client = PolicyClient(server.uri, timeout_s=3)
        assert client.infer(MESSAGE)["actions"][0, 0] == 3
    client.timeout_s = 0.2
    with pytest.raises(ConnectionError, match="is `vla serve` running"):
        client.infer(MESSAGE)
    client.timeout_s = 3
    with serving(server.port):
        assert client.infer(MESSAGE)["actions"][0, 0] == 3
        assert client.act(observations(2)).shape == (2, 3, 2)
    # The other order too: the server comes back only while the client is already asking.
    timer_done = threading.Event()

    def come_back() -> None:
        time.sleep(0.3)
        with serving(server.port):
            timer_done.wait(5)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        assert client.infer(MESSAGE)["actions"][0, 0] == 3
    finally:
        timer_done.set()
        thread.join(5)
        client.close()


SLOW_SERVER = """
import sys, time
import numpy as np
from policies.serving.server import PolicyServer
from vla.core.types import ActionSpec, PolicySpec
class P:
    spec = PolicySpec(ActionSpec(("dx", "gripper"), (-1.0, 0.0), (1.0, 1.0), 20.0), cameras=("front",))
    def reset(self, env_ids=None): pass
    def act(self, obs):
        print("busy", flush=True)
        time.sleep(float(sys.argv[2]))
        return np.full((1, 3, 2), float(sys.argv[3]))
server = PolicyServer(P(), port=int(sys.argv[1]))
server.run(on_ready=lambda: print(server.port, flush=True))
"""


def test_a_server_killed_in_the_middle_of_a_chunk_is_asked_again() -> None:
    def start(port: int, seconds: float, answer: float) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", SLOW_SERVER, str(port), str(seconds), str(answer)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        return process, int(process.stdout.readline())

    first, port = start(0, 60, 1)
    second: list[subprocess.Popen[str]] = []

    def replace() -> None:
        assert first.stdout.readline() == "busy\n"  # it has the observation, and will never answer
        first.kill()
        first.wait()
        second.append(start(port, 0, 2)[0])

    thread = threading.Thread(target=replace)
    try:
        with PolicyClient(f"ws://127.0.0.1:{port}", timeout_s=20) as client:
            thread.start()
            assert client.infer(MESSAGE)["actions"][0, 0] == 2
    finally:
        thread.join(20)
        for process in (first, *second):
            process.kill()


def test_refuses_to_go_on_with_another_policy() -> None:
    with serving() as server:
        client = PolicyClient(server.uri, timeout_s=2)
    other = ActionSpec(names=("gripper", "dx"), low=(0.0, -1.0), high=(1.0, 1.0), control_hz=20.0)
    with serving(server.port, action_spec=other):
        with pytest.raises(RuntimeError, match="another policy .action_spec changed.: make a new PolicyClient"):
            client.infer(MESSAGE)
        with PolicyClient(server.uri) as fresh:
            assert fresh.spec.action_spec == other
    client.close()


def test_late_answer_is_never_taken_for_the_next_one() -> None:
    with serving() as server, PolicyClient(server.uri, timeout_s=2) as client:
        client.timeout_s = 0.2
        slow = MESSAGE | {"prompt": "slow", "state": np.full(3, 100, np.float32)}
        with pytest.raises(ConnectionError, match="in 0.2 s"):
            client.infer(slow)
        client.timeout_s = 3
        assert client.infer(MESSAGE)["actions"][0, 0] == 3  # and not 300
        assert len(client.latencies_ms) == 1


def test_deadline_holds_when_the_server_stops_reading() -> None:
    """A frozen process: its kernel keeps the connection up, but nobody empties the socket."""
    release = threading.Event()

    def frozen(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        request = b""
        while b"\r\n\r\n" not in request:
            request += peer.recv(4096)
        key = re.search(rb"Sec-WebSocket-Key: (\S+)", request, re.IGNORECASE)[1].decode()
        head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        peer.sendall(f"{head}Sec-WebSocket-Accept: {accept_key(key)}\r\n\r\n".encode() + b"\x82\x01\x80")  # metadata {}
        release.wait(10)
        peer.close()

    big = MESSAGE | {"images": {"front": np.zeros((2000, 4000, 3), np.uint8)}}  # more than the kernel buffers
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=frozen, args=(listener,), daemon=True)
        thread.start()
        client = PolicyClient(f"ws://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5)
        start = time.monotonic()
        try:
            with pytest.raises(ConnectionError, match="no answer"):
                client.infer(big)
            assert time.monotonic() - start < 30  # it does not hang
        finally:
            release.set()
            client.close()
            thread.join(5)


def test_stock_openpi_server_conduct() -> None:
    """Its bytes built with msgpack alone; on a bad observation it sends a traceback as text and closes with 1011."""
    actions = np.arange(8, dtype=np.float64).reshape(4, 2)
    node = {b"__ndarray__": True, b"data": actions.tobytes(), b"dtype": "<f8", b"shape": actions.shape}

    def openpi(ws: ServerConnection) -> None:
        ws.send(msgpack.packb({"reset_pose": [0, 0]}))
        for frame in ws:
            if msgpack.unpackb(frame)["prompt"] == "bad":
                ws.send("Traceback (most recent call last):\n  File x\nKeyError: 'state'")
                ws.close(1011, "see previous frame")
                return
            ws.send(msgpack.packb({"actions": node, "server_timing": {"infer_ms": 1.0}}))

    with handmade(openpi) as uri, PolicyClient(uri, timeout_s=3) as client:
        assert client.metadata == {"reset_pose": [0, 0]} and client.spec.action_spec is None
        assert np.array_equal(client.infer(MESSAGE)["actions"], actions)
        with pytest.raises(RuntimeError, match="KeyError: 'state'") as caught:
            client.infer(MESSAGE | {"prompt": "bad"})
        assert "\n" not in str(caught.value)
        chunk = client.act(observations())  # on a new connection
        assert chunk.dtype == np.float32 and np.array_equal(chunk[0], actions)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"\xc1", "cannot read"),
        (msgpack.packb([1]), "sent a list, expected a map"),
        (wire.pack({"actions": np.zeros((2, 3, 4))}), r"actions: expected shape \(C, A\), got \(2, 3, 4\)"),
        (wire.pack({"actions": np.zeros((0, 3))}), r"actions: expected shape \(C, A\), got \(0, 3\)"),
        (wire.pack({"actions": np.array([[np.inf]])}), r"actions: its answer of shape \(1, 1\) holds NaN or infinity"),
        (wire.pack({"actions": [[1.0]]}), "actions: expected an array .C, A. of numbers, got list"),
        (wire.pack({"action": 1}), "its answer holds no 'actions', only action"),
    ],
)
def test_a_servers_nonsense_never_reaches_the_robot(reply: bytes, expected: str) -> None:
    def nonsense(ws: ServerConnection) -> None:
        ws.send(wire.pack({}))
        for _ in ws:
            ws.send(reply)

    with handmade(nonsense) as uri, PolicyClient(uri) as client, pytest.raises(RuntimeError, match=expected):
        client.act(observations())


def test_a_servers_words_arrive_to_their_end() -> None:
    """The remedy is the end of a message: nothing of it is cut, as text or behind an HTTP status."""
    words = "the observation is wrong, " + "and wrong again, " * 100 + "so send the right one"

    def answer(ws: ServerConnection) -> None:
        ws.send(wire.pack({}))
        for _ in ws:
            ws.send(words)

    with handmade(answer) as uri, PolicyClient(uri) as client, pytest.raises(RuntimeError, match="the right one$"):
        client.infer(MESSAGE)
    with serving(limits=Limits(clients=1)) as server, PolicyClient(server.uri):
        with pytest.raises(
            ConnectionError, match="HTTP 503: all 1 places are taken.: it is there, but takes nobody now"
        ):
            PolicyClient(server.uri, timeout_s=0.3)
        with pytest.raises(ConnectionError, match="HTTP 404: no policy is called so; known: default"):
            PolicyClient(f"{server.uri}/other", timeout_s=0.3)


def test_threads_take_turns() -> None:
    with serving() as server, PolicyClient(server.uri) as client:
        wrong: list[object] = []
        connection = client._connection

        def work(value: int) -> None:
            for _ in range(20):
                got = client.infer(MESSAGE | {"state": np.full(3, value, np.float32)})["actions"][0, 0]
                wrong.extend([] if got == 3 * value else [got])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert not wrong and len(client.latencies_ms) == 80
        assert client._connection is connection  # nobody's turn was cut short


def test_close_is_final_and_repeatable() -> None:
    with serving() as server:
        with PolicyClient(server.uri) as client:
            pass
        client.close()
        with pytest.raises(ConnectionError, match="is closed"):
            client.infer(MESSAGE)


def test_import_is_light() -> None:
    """A robot's client loads no torch, and of ours only what it needs."""
    script = (
        "import sys\nimport policies.serving.client, policies.serving.wire, websockets.sync.client\n"
        "heavy = {'torch', 'transformers', 'mujoco', 'lerobot'} & set(sys.modules)\n"
        "print(sorted(heavy), sorted(m for m in sys.modules if m.startswith(('vla.', 'policies.'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    own = ["policies.serving", "policies.serving.client", "policies.serving.wire"]
    core = ["vla.core", "vla.core.config", "vla.core.disk", "vla.core.types", "vla.core.waiting"]
    others = ["vla.language", "vla.language.talking", "vla.processing"]
    others += ["vla.processing.cameras", "vla.processing.cameras.camera_map"]
    assert done.stdout.strip() == f"[] {[*own, *core, *others]}"


@pytest.mark.parametrize(
    ("scheme", "port", "error", "message"),
    [
        ("wss", None, ConnectionError, "does not speak TLS: write ws:// instead of wss://"),
        ("ws", 99999, ValueError, "'ws://127.0.0.1:99999' is not a websocket address: Port out of range 0-65535"),
        ("ws", "x", ValueError, "'ws://127.0.0.1:x' is not a websocket address: Port could not be cast"),
    ],
)
def test_addresses_that_cannot_be(scheme, port, error, message):
    with serving() as server, pytest.raises(error, match=message) as caught:
        PolicyClient(f"{scheme}://127.0.0.1:{port or server.port}", timeout_s=5)
    assert "\n" not in str(caught.value)
