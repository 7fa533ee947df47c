"""How a policy server ends: by `stop`, by Ctrl-C, inside a loop of its caller's, and with a request half received."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from policies.serving.server import PolicyServer
from tests.policies.serving.test_server import (
    FIRST_ACTION,
    PATIENT,
    SumPolicy,
    ask,
    assert_alive,
    observation,
    serving,
    talking,
)


def test_stop_closes_clients_with_going_away_and_frees_the_port() -> None:
    others = [t for t in threading.enumerate() if t.name == "policy-server"]
    with serving() as server, talking(server) as ws:
        server.stop()
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(timeout=5)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001
        server.stop()
    server.stop()
    assert [t for t in threading.enumerate() if t.name == "policy-server"] == others
    with serving(port=server.port) as again:
        assert_alive(again)
        with (
            pytest.raises(OSError, match=r"cannot listen on 127.0.0.1:\d+ .*choose another --port"),
            serving(port=again.port),
        ):
            pass


def test_run_inside_a_main_thread_ends_quietly_on_ctrl_c() -> None:
    script = (
        "import numpy as np\n"
        "from policies.serving.server import PolicyServer\n"
        "from vla.core.types import ActionSpec, PolicySpec\n"
        "class P:\n"
        "    spec = PolicySpec(ActionSpec(('x',), (-1,), (1,), 10), cameras=('front',))\n"
        "    def reset(self, env_ids=None): pass\n"
        "    def act(self, obs): return np.zeros((1, 1, 1))\n"
        "server = PolicyServer(P(), port=0)\n"
        "server.run(on_ready=lambda: print(server.uri, flush=True))\n"
        "print('done', flush=True)\n"
    )
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        uri = process.stdout.readline().strip()
        with connect(uri, proxy=None) as ws:
            ws.recv(timeout=5)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 0 and out == "done\n" and "Traceback" not in err


def test_run_also_works_inside_a_callers_thread_with_its_own_loop() -> None:
    """A test or notebook that has an event loop of its own may still hold a server on a thread."""

    async def main() -> float:
        with serving() as server:

            def once() -> float:
                with talking(server) as ws:
                    return float(ask(ws, observation())["actions"][0, 0])

            return await asyncio.to_thread(once)

    assert asyncio.run(main()) == FIRST_ACTION


def test_half_a_request_does_not_delay_the_end():
    server = PolicyServer(SumPolicy(), port=0, limits=PATIENT)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,), daemon=True)
    thread.start()
    assert ready.wait(60.0)
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        with connect(server.uri) as whole:  # by then the half one has been taken in
            whole.recv()
        server.stop()
        thread.join(60.0)
        assert not thread.is_alive()
