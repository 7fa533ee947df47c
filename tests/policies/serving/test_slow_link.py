"""A robot, its policy's server and a slow link between them: the loop plays on while the next chunk is on its way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from policies.control.controller import ControlConfig, control
from policies.control.guards import GuardConfig
from policies.serving import wire
from policies.serving.client import PolicyClient
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from tests.policies.control.toy_robot import SPEC, Says, Slide
from vla.core.types import ActionSpec, PolicySpec

SLOW = ActionSpec(SPEC.names, SPEC.low, SPEC.high, 20.0)
CHUNK = [[0.1, 0.01, -1.0]] * 24


class SlowSlide(Slide):
    action_spec = SLOW


@contextlib.contextmanager
def link(port: int, delay_s: float) -> Iterator[str]:
    """Where to find what listens on `port`, every byte taking `delay_s` each way."""
    listening, found, writers = threading.Event(), {}, []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                loop.call_later(delay_s, writer.write, data)
        loop.call_later(delay_s, writer.close)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        writers.extend([writer, there[1]])
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    async def run() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        found.update(port=server.sockets[0].getsockname()[1], loop=asyncio.get_running_loop(), stop=asyncio.Event())
        listening.set()
        await found["stop"].wait()
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert listening.wait(10)
    try:
        yield f"ws://127.0.0.1:{found['port']}"
    finally:
        found["loop"].call_soon_threadsafe(found["stop"].set)
        thread.join(10)


@pytest.fixture(scope="module")
def server() -> Iterator[PolicyServer]:
    """Two policies that give 24 actions, of which 8 are meant to be played."""
    served = {
        name: PolicySlot(
            Says([[sign * x, sign * dy, grip] for x, dy, grip in CHUNK], PolicySpec(SLOW, 24, 8, ("front",), 2))
        )
        for name, sign in (("there", 1), ("back", -1))
    }
    with serve_in_thread(PolicyServer(served, port=0)) as server:
        yield server


@pytest.mark.parametrize(("name", "direction"), [("there", 1), ("back", -1)])
def test_a_controller_does_not_run_dry_at_200_ms_and_20_hz(server: PolicyServer, name: str, direction: int) -> None:
    held, answers = held_ticks(server, name, direction, whole_chunks=True)
    assert held == 0 and answers >= 3
    if direction > 0:  # as it was: what is meant to be played lasts 8 steps, an answer takes 5
        held, _ = held_ticks(server, name, direction, whole_chunks=False)
        assert held >= 4


def held_ticks(server: PolicyServer, name: str, direction: int, *, whole_chunks: bool) -> tuple[int, int]:
    """Ticks in which the robot had to wait once it had begun to move; answers."""
    limits = GuardConfig(max_observation_age_s=5, max_action_age_s=5)
    with link(server.port, 0.1) as uri, PolicyClient(f"{uri}/{name}", whole_chunks=whole_chunks) as client:
        assert client.spec.n_action_steps == 8 and client.spec.action_spec == SLOW
        robot = SlowSlide()
        config = ControlConfig(duration_s=2.2, guards=limits)
        report = control(robot, client, config)
        assert min(client.latencies_ms) >= 200, "the link is as slow as it says"
    assert report.ended == "time" and set(report.guards) <= {"stale_action"}
    moving = direction * np.array(robot.sent)[:, 1] > 0
    began = int(np.argmax(moving))
    assert began >= 3 and moving.any(), "it stands until the first answer"
    return int((~moving[began:]).sum()), report.answers


def test_answers_that_come_twice_are_not_taken_for_the_next_ones(caplog: pytest.LogCaptureFixture) -> None:
    """A relay that repeats every answer: the robot was told what fitted ever older observations."""

    def twice(connection: ServerConnection) -> None:
        connection.send(wire.pack({}))
        for frame in connection:
            answer = wire.pack({"actions": np.full((1, 2), wire.unpack(frame)["state"][0])})
            connection.send(answer)
            connection.send(answer)

    server = serve(twice, "127.0.0.1", 0, compression=None)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with contextlib.closing(PolicyClient(f"ws://127.0.0.1:{server.socket.getsockname()[1]}")) as client:
        said = []
        for k in range(5):
            said.append(client.infer({"state": np.full(3, k, np.float32)})["actions"][0, 0])
            time.sleep(0.05)  # as between two decisions of a robot
    server.shutdown()
    thread.join(5)
    assert said == [0, 1, 2, 3, 4]
    assert sum("answers that nobody asked for" in line for line in caplog.messages) == 1
