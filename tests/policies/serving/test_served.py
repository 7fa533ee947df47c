"""Several policies in one server, chosen by path or key; newer checkpoints while clients stay; metrics; limits; TLS."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from policies.serving import wire
from policies.serving.client import PolicyClient
from policies.serving.network import tls_context
from policies.serving.policy_slot import PolicySlot, by_name
from policies.serving.server import Limits, PolicyServer, serve_in_thread
from tests.policies.serving.test_server import SPEC, get, wait_for
from tests.vla.processing.test_processor import make
from vla.core.compatibility import require_same
from vla.core.types import ActionSpec, Observation, PolicySpec

OBSERVATION = {"images": {"front": np.full((4, 4, 3), 9, np.uint8)}, "state": np.zeros(2), "prompt": "go"}


class Constant:
    """Always the same number; as a checkpoint would give it, with a description of itself."""

    def __init__(self, value: float, *, spec: ActionSpec = SPEC) -> None:
        self.value, self.spec = value, PolicySpec(spec, 5, 2, ("front",), 2)

    def reset(self, env_ids: object = None) -> None: ...

    def act(self, obs: Observation) -> np.ndarray:
        return np.full((obs.batch_size, 5, self.spec.action_spec.dim), self.value)


def checkpoint(folder: Path, value: float, *, names: str = "abc") -> Path:
    """Write what `load` below reads, committed as our checkpoints are, by the replacement of config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "value").write_text(f"{value}{names}")
    config = json.dumps({"checkpoint": {"files": {"value": f"{value}{names}"}}})
    (folder / "new").write_text(config)
    (folder / "new").replace(folder / "config.json")
    return folder


def load(folder: Path) -> Constant:
    text = (folder / "value").read_text()
    if text == "broken":
        raise ValueError(f"{folder}/value is not the file that was saved (its hash differs)")
    names = tuple(text[-3:])
    return Constant(float(text[:-3]), spec=ActionSpec(names, (-1.0,) * 3, (1.0,) * 3, 20.0))


@pytest.fixture
def two(tmp_path) -> PolicyServer:
    """Policies 1 and 2 from folders."""
    served = {name: PolicySlot.of_folder(checkpoint(tmp_path / name, v), load=load) for name, v in (("a", 1), ("b", 2))}
    with serve_in_thread(PolicyServer(served, port=0, reload_s=0.05)) as server:
        yield server


def first_action(client: PolicyClient, **extra: object) -> float:
    return float(client.infer(OBSERVATION | extra)["actions"][0, 0])


def test_a_policy_is_chosen_by_path_or_by_key(two: PolicyServer) -> None:
    with PolicyClient(two.uri) as default, PolicyClient(two.uri + "/b") as other:
        assert default.metadata["policies"] == ["a", "b"] and other.metadata["policy"] == "b"
        assert first_action(default) == 1 and first_action(other) == 2
        assert first_action(default, policy="b") == 2 and first_action(other, policy="a") == 1
        assert first_action(default) == 1  # for that observation only
        for wrong in ("c", 3):
            with pytest.raises(RuntimeError, match="policy: expected one of a, b, got"):
                default.infer(OBSERVATION | {"policy": wrong})
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"/c is not where .*HTTP 404: no policy is called so; known: a, b"):
        PolicyClient(two.uri + "/c", timeout_s=60)
    assert time.monotonic() - start < 30, "it will not appear by waiting"


def test_clients_get_what_is_meant_to_be_played_or_all_of_it(tmp_path) -> None:
    served = {
        "own": PolicySlot.of_folder(checkpoint(tmp_path / "a", 1), load=load),
        "longer": PolicySlot.of_folder(checkpoint(tmp_path / "b", 2), load=load, n_action_steps=4),
    }
    with serve_in_thread(PolicyServer(served, port=0)) as server:
        with PolicyClient(server.uri, whole_chunks=False) as plain, PolicyClient(server.uri) as whole:
            known = {name: plain.metadata[name] for name in ("chunk_size", "n_action_steps", "control_hz")}
            assert known == {"chunk_size": 5, "n_action_steps": 2, "control_hz": 20.0}
            assert plain.spec.n_action_steps == whole.spec.n_action_steps == 2
            obs = Observation({"front": np.zeros((1, 4, 4, 3), np.uint8)}, np.zeros((1, 2), np.float32), ["go"])
            assert plain.act(obs).shape == (1, 2, 3) and whole.act(obs).shape == (1, 5, 3)
            for extra, length in (({"policy": "longer"}, 4), ({"policy": "longer", "whole_chunk": True}, 5)):
                assert whole.infer(OBSERVATION | extra)["actions"].shape == (length, 3)
            with pytest.raises(RuntimeError, match="whole_chunk: expected true or false, got int"):
                plain.infer(OBSERVATION | {"whole_chunk": 1})
    with pytest.raises(ValueError, match=r"n_action_steps must be in 1..5 \(the chunk size\), got 6"):
        PolicySlot.of_folder(tmp_path / "a", load=load, n_action_steps=6)


def test_whole_and_played_chunks_share_a_batch() -> None:
    """The same chunk is computed for both; only the part that is sent differs."""
    gate, sizes = threading.Event(), []

    class Waits(Constant):
        def act(self, obs: Observation) -> np.ndarray:
            gate.wait(10)
            sizes.append(obs.batch_size)
            return super().act(obs)

    one = PolicySlot(Waits(1))
    with serve_in_thread(PolicyServer({"one": one}, port=0)) as server, contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(connect(server.uri, proxy=None)) for _ in range(3)]
        for socket_, whole in zip(sockets, (False, True, False), strict=True):
            socket_.recv(timeout=5)
            socket_.send(wire.pack(OBSERVATION | {"whole_chunk": whole}))
        wait_for(lambda: server._batcher.waiting == 2)
        gate.set()
        lengths = [len(wire.unpack(socket_.recv(timeout=5))["actions"]) for socket_ in sockets]
    assert lengths == [2, 5, 2] and sizes == [1, 2]


def test_names_of_policies() -> None:
    assert by_name(["runs/a", "pick=runs/b/best"]) == {"a": Path("runs/a"), "pick": Path("runs/b/best")}
    assert by_name(["runs/lr=1e-3/policy"]) == {"policy": Path("runs/lr=1e-3/policy")}
    with pytest.raises(ValueError, match="two policies are called 'best': write NAME=y/best"):
        by_name(["x/best", "y/best"])
    for name in ("metrics=x", "a b=x", "a/b=x"):
        with pytest.raises(ValueError, match="cannot name a policy"):
            by_name([name])


def test_a_newer_checkpoint_is_served_on_the_same_connection(two: PolicyServer, tmp_path) -> None:
    with PolicyClient(two.uri) as client:
        assert first_action(client) == 1
        checkpoint(tmp_path / "a", 7)
        wait_for(lambda: first_action(client) == 7)
        connection = client._connection
        checkpoint(tmp_path / "a", 8)
        wait_for(lambda: first_action(client) == 8)
        assert client._connection is connection
    assert 'bascule_reloads_total{outcome="ok",policy="a"} 2' in metrics(two)


def test_what_cannot_replace_a_policy_does_not(two: PolicyServer, tmp_path, caplog) -> None:
    with PolicyClient(two.uri) as client:
        checkpoint(tmp_path / "a", 9, names="xyz")  # other actions: a connected robot would misread them
        wait_for(lambda: 'outcome="refused",policy="a"' in metrics(two))
        assert first_action(client) == 1 and "another action_spec: restart the server" in caplog.text
        (tmp_path / "a" / "value").write_text("broken")
        (tmp_path / "a" / "config.json").write_text('{"checkpoint": {"files": {"value": "?"}}}')
        wait_for(lambda: 'outcome="failed",policy="a"' in metrics(two))
        assert first_action(client) == 1 and "stays as it was" in caplog.text and "hash differs" in caplog.text
        checkpoint(tmp_path / "a", 3)  # the copy is finished
        wait_for(lambda: first_action(client) == 3)
        shutil.rmtree(tmp_path / "a")
        wait_for(lambda: "holds no checkpoint any more: was it deleted, or moved?" in caplog.text)
        time.sleep(0.1)
        assert first_action(client) == 3 and caplog.text.count("holds no checkpoint any more") == 1


NAMES = ("x", "y")


def named(names: tuple[str, ...] | None) -> Constant:
    policy = Constant(1)
    policy.spec = replace(policy.spec, proprio_names=names)
    return policy


def test_clients_know_the_names_of_the_state_and_no_other_order_replaces_it(tmp_path) -> None:
    made = [NAMES, NAMES, NAMES[::-1]]
    slot = PolicySlot.of_folder(checkpoint(tmp_path / "a", 1), load=lambda folder: named(made.pop(0)))
    with serve_in_thread(PolicyServer({"a": slot}, port=0)) as server, PolicyClient(server.uri) as client:
        assert client.spec.proprio_names == NAMES
        robot = PolicySpec(SPEC, None, None, ("front",), 2, NAMES)
        require_same(client, robot, where="robot")
        with pytest.raises(ValueError, match="reads the state as x, y, the robot tells it as y, x"):
            require_same(client, replace(robot, proprio_names=NAMES[::-1]), where="robot")
        with pytest.raises(ValueError, match="the policy reads the state x, y, the robot reports a, b"):
            require_same(client, replace(robot, proprio_names=("a", "b")), where="robot")
    slot.refresh()
    with pytest.raises(TypeError, match="another proprio_names: restart the server"):
        slot.refresh()
    assert "proprio_names" not in PolicySlot(named(None)).metadata


def metrics(server: PolicyServer) -> str:
    status, body = get(server, "/metrics")
    assert status == 200
    return body.decode()


def test_metrics_count_what_happened(two: PolicyServer) -> None:
    with PolicyClient(two.uri + "/b") as client:
        for _ in range(3):
            first_action(client)
        with contextlib.suppress(RuntimeError):
            client.infer({})
        text = metrics(two)
        assert "bascule_clients 1\n" in text
    assert 'bascule_requests_total{outcome="ok",policy="b"} 3\n' in text
    assert 'bascule_requests_total{outcome="refused",policy="b"} 1\n' in text
    assert 'bascule_connections_total{outcome="accepted"} 1\n' in text
    assert 'bascule_inference_seconds_bucket{le="+Inf"} 3\n' in text and "bascule_inference_seconds_count 3\n" in text
    assert "process_resident_memory_bytes" in text
    for line in text.splitlines():  # the format itself: NAME{LABELS} NUMBER
        name, _, value = line.rpartition(" ")
        assert line.startswith("# ") or (name and float(value) >= 0)


def serving(**options: object) -> contextlib.AbstractContextManager[PolicyServer]:
    return serve_in_thread(PolicyServer(Constant(1), port=0, **options))


def test_metrics_need_the_key() -> None:
    with serving(api_key="k") as server:
        assert get(server, "/metrics")[0] == 401 and get(server, "/healthz")[0] == 200


def test_places_are_limited_and_given_back() -> None:
    with serving(limits=Limits(clients=2)) as server:
        with PolicyClient(server.uri), PolicyClient(server.uri):
            with pytest.raises(InvalidStatus) as caught:
                connect(server.uri, proxy=None)
            assert caught.value.response.status_code == 503
            assert get(server, "/healthz")[0] == 200
        wait_for(lambda: not server._clients.total())
        with PolicyClient(server.uri) as client:
            assert first_action(client) == 1


def test_a_silent_handshake_is_cut() -> None:
    with serving(limits=Limits(handshake_s=0.2)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            sock.settimeout(5)
            start = time.monotonic()
            while sock.recv(4096):
                pass
            assert time.monotonic() - start < 30  # it does not hang


def test_a_message_in_ever_new_fragments_is_cut() -> None:
    with serving(limits=Limits(message_s=0.3)) as server, connect(server.uri, compression=None, proxy=None) as ws:
        ws.recv(timeout=5)

        def drip() -> object:
            for _ in range(200):  # answers pings between the fragments, so those do not find it out
                yield b"\x01"
                time.sleep(0.02)

        with pytest.raises(ConnectionClosed) as caught:
            ws.send(drip())
            ws.recv(timeout=5)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1008
        wait_for(lambda: not server._clients.total())
        with PolicyClient(server.uri) as client:
            assert first_action(client) == 1


def test_a_frame_that_drips_is_cut_by_the_pings() -> None:
    with serving(limits=Limits(ping_s=0.2)) as server:
        with connect(server.uri, compression=None, proxy=None) as ws:
            ws.recv(timeout=5)
            ws.socket.sendall(b"\x82\xff" + (1000).to_bytes(8, "big") + b"\0" * 4)
            for _ in range(100):
                if not server._clients.total():
                    break
                with contextlib.suppress(OSError):
                    ws.socket.sendall(b"\x01")
                time.sleep(0.05)
            assert not server._clients.total()


def test_idle_clients_are_let_go() -> None:
    with serving(limits=Limits(idle_s=0.2)) as server, connect(server.uri, proxy=None) as ws:
        ws.recv(timeout=5)
        with pytest.raises(ConnectionClosed):
            ws.recv(timeout=5)


def test_fragments_that_come_in_time_are_one_message() -> None:
    frame = wire.pack(OBSERVATION)
    with serving() as server, connect(server.uri, compression=None, proxy=None) as ws:
        ws.recv(timeout=5)
        ws.send(frame[i : i + 100] for i in range(0, len(frame), 100))
        assert wire.unpack(ws.recv(timeout=5))["actions"][0, 0] == 1


def test_64_megabytes_are_refused() -> None:
    with serving() as server:
        with connect(server.uri, compression=None, proxy=None) as ws:
            ws.recv(timeout=5)
            with pytest.raises(ConnectionClosed) as caught:
                ws.send(bytes(64 * 2**20))
                ws.recv(timeout=10)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
        with PolicyClient(server.uri) as client:
            assert first_action(client) == 1


def test_fifty_clients_at_once() -> None:
    wrong: list[object] = []
    with serving() as server:

        def drive(index: int) -> None:
            try:
                with PolicyClient(server.uri, timeout_s=20) as client:
                    for _ in range(10):
                        if first_action(client) != 1:
                            wrong.append(index)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=drive, args=(i,)) for i in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert wrong == [] and 'bascule_requests_total{outcome="ok",policy="default"} 500' in metrics(server)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command for a throw-away certificate")
def test_tls(tmp_path) -> None:
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command = ["openssl", "req", "-x509", *kind, "-keyout", key, "-out", certificate, *subject]
    subprocess.run(command, check=True, capture_output=True)
    with serving(tls=tls_context(certificate, key)) as server:
        assert server.uri.startswith("wss://")
        with PolicyClient(server.uri, tls=ssl.create_default_context(cafile=certificate)) as client:
            assert first_action(client) == 1
        with pytest.raises(ConnectionError, match="certificate verify failed.*pass its certificate as tls"):
            PolicyClient(server.uri)  # nobody vouches for it
        with pytest.raises(ConnectionError):
            PolicyClient(server.uri.replace("wss", "ws"), timeout_s=0.3)
    with pytest.raises(ValueError, match="cannot read the certificate"):
        tls_context(str(tmp_path / "none.pem"))


def test_the_key_policy_is_heeded_where_only_one_is_served(tmp_path) -> None:
    served = {"arm": PolicySlot.of_folder(checkpoint(tmp_path / "a", 1), load=load)}
    with serve_in_thread(PolicyServer(served, port=0)) as server, PolicyClient(server.uri) as client:
        assert first_action(client, policy="arm") == first_action(client, policy=client.metadata["policy"]) == 1
        for wrong in ("b", 3, ["arm"], None):
            with pytest.raises(RuntimeError, match="policy: expected one of arm, got"):
                client.infer(OBSERVATION | {"policy": wrong})


class Reads(Constant):
    """With a processor that reads six words, as a checkpoint's policy has one."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.processor = make()


def test_the_answer_says_what_of_a_prompt_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    with serve_in_thread(PolicyServer(Reads(), port=0)) as server, PolicyClient(server.uri) as client:
        assert "warnings" not in client.infer(OBSERVATION | {"prompt": "pick up the red cube"})
        for _ in range(2):
            answer = client.infer(OBSERVATION | {"prompt": "pick up the red cube " * 250})
            assert answer["actions"].shape == (2, 3) and len(answer["warnings"]) == 1
            assert "cut after 6 tokens, all that the policy reads" in answer["warnings"][0]
        black = {"images": {"front": np.ones((4, 4, 3), np.uint8)}, "prompt": "pick up the red cube"}
        (line,) = client.infer(OBSERVATION | black)["warnings"]
        assert line.startswith("camera 'front' shows black, no value of 255 is above 1: is it covered, or were floats")
        obs = Observation({"front": np.ones((1, 4, 4, 3), np.uint8)}, np.zeros((1, 2), np.float32), ["cube " * 7])
        caplog.clear()
        for _ in range(2):
            client.act(obs)
        told = [message for message in caplog.messages if "cut after" in message]
        assert sum("'front' shows black" in message for message in caplog.messages) == 1
        assert len(told) == 1 and told[0].startswith(f"policy server at {server.uri}: the instruction 'cube cube")


@pytest.mark.parametrize(
    ("name", "now"), [("proprio_names", ["y", "x"]), ("proprio_dim", 3), ("memory_frames", 4), ("depth", True)]
)
def test_refuses_to_go_on_with_a_policy_that_reads_something_else(name, now) -> None:
    """A server that comes back with the state in another order would act on joints taken for one another."""
    client = object.__new__(PolicyClient)
    client.uri, client.metadata = "ws://there", {"proprio_names": ["x", "y"], "proprio_dim": 2}
    client.check_same(dict(client.metadata))
    with pytest.raises(RuntimeError, match=f"another policy .{name} changed.: make a new PolicyClient"):
        client.check_same(client.metadata | {name: now})
