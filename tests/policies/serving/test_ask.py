"""Asking over a server: answered by policies that talk, refused politely by others, and no action waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from policies.serving.batching import Batcher
from policies.serving.client import PolicyClient
from policies.serving.narrated_client import NarratedClient
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from vla.core.types import ActionSpec, Observation, PolicySpec
from vla.language.talking import ACCOUNT, CANNOT, Said, ask

SPEC = PolicySpec(ActionSpec(("x", "y"), (-1.0,) * 2, (1.0,) * 2, 20.0), 2, 2, ("front",), 2, talks=True)


class Echo:
    """Acts, and says a question again, a letter a step. It notes what it did in which order."""

    def __init__(self, *, talks: bool = True) -> None:
        self.policy, self.spec = self, SPEC if talks else PolicySpec(SPEC.action_spec, 2, 2, ("front",), 2)
        self.did: list[str] = []
        self.step: threading.Event | None = None

    def reset(self, env_ids: Sequence[int] | None = None) -> None: ...

    def act(self, obs: Observation) -> np.ndarray:
        self.did.append("act")
        return np.zeros((obs.batch_size, 2, 2), np.float32)

    def speech(self, obs: Observation, questions: Sequence[str]) -> Letters:
        if questions[0] == "crash":
            raise KeyError("two\nlines")
        return Letters(self, questions[0], float(obs.proprio[0, 0]))


class Letters:
    def __init__(self, echo: Echo, text: str, sure: float) -> None:
        self.echo, self.text, self.sure, self.told = echo, text, sure, 0

    def step(self) -> bool:
        if self.echo.step is not None:
            self.echo.step.wait(5)
        self.told += 1
        self.echo.did.append("letter")
        return self.told == len(self.text)

    def said(self) -> list[Said]:
        return [Said(self.text[: self.told], self.sure)]


def observation() -> dict[str, object]:
    return {
        "images": {"front": np.zeros((4, 4, 3), np.uint8)}, "state": np.array([0.25, 0], np.float32), "prompt": "go",
    }  # fmt: skip


def test_client_asks_and_acts_on_one_connection() -> None:
    with serve_in_thread(PolicyServer(Echo(), port=0)) as server, PolicyClient(server.uri) as client:
        assert client.metadata["talks"] is True and client.spec.talks
        assert client.ask("which object?", observation()) == Said("which object?", 0.25)
        assert client.infer(observation())["actions"].shape == (2, 2)
        two = Observation({"front": np.zeros((2, 4, 4, 3), np.uint8)}, np.full((2, 2), 0.5, np.float32), ["go"] * 2)
        assert ask(client, two, ["a", "bc"]) == [Said("a", 0.5), Said("bc", 0.5)]
        assert 'outcome="asked"' in server.metrics.text(clients=1, waiting_requests=0)


def test_who_cannot_talk_refuses_in_one_line_and_goes_on_acting() -> None:
    with serve_in_thread(PolicyServer(Echo(talks=False), port=0)) as server, PolicyClient(server.uri) as client:
        assert "talks" not in client.metadata and not client.spec.talks
        with pytest.raises(RuntimeError, match="this policy cannot talk: .*--talk") as refused:
            client.ask("what are you doing?", observation())
        assert "\n" not in str(refused.value)
        assert client.infer(observation())["actions"].shape == (2, 2)
        with pytest.raises(ValueError, match="cannot talk"):
            NarratedClient(server.uri, account_s=0.1)


@pytest.mark.parametrize(("question", "problem"), [(7, "must be text"), ("", "must say"), ("a" * 401, "at most 400")])
def test_a_bad_question_costs_an_error_and_not_the_connection(question: object, problem: str) -> None:
    with serve_in_thread(PolicyServer(Echo(), port=0)) as server, PolicyClient(server.uri) as client:
        with pytest.raises(RuntimeError, match=problem):
            client.infer({**observation(), "ask": question})
        with pytest.raises(ValueError, match=problem):
            client.ask(question, observation())  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="policy failed: KeyError"):
            client.ask("crash", observation())
        assert client.ask("ok", observation()).text == "ok"


def test_a_server_that_takes_a_question_for_an_order_is_told() -> None:
    """Stock openpi servers ignore the key and act."""
    client = PolicyClient.__new__(PolicyClient)
    client.uri = "ws://stock"
    client.infer = lambda message: {"actions": np.zeros((2, 2))}  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="does not answer questions"):
        client.ask("which object?", observation())


def test_an_action_waits_for_one_token_at_most() -> None:
    served = Echo()
    served.step = threading.Event()
    obs = Observation({"front": np.zeros((1, 4, 4, 3), np.uint8)}, np.zeros((1, 2), np.float32), ["go"])

    async def play() -> Said:
        batcher = Batcher()
        try:
            said = asyncio.ensure_future(batcher.ask(served, obs, "a long answer"))
            await asyncio.sleep(0.02)  # it is at its first letter
            acted = asyncio.ensure_future(batcher.act(served, obs))
            await asyncio.sleep(0.02)
            served.step.set()
            await acted
            return await said
        finally:
            batcher.close()

    assert asyncio.run(play()).text == "a long answer"
    assert served.did.index("act") == 1 and served.did.count("letter") == len("a long answer")


def test_who_hangs_up_does_not_hold_up_those_behind() -> None:
    served = Echo()
    obs = Observation({"front": np.zeros((1, 4, 4, 3), np.uint8)}, np.zeros((1, 2), np.float32), ["go"])

    async def play() -> Said:
        batcher = Batcher()
        try:
            gone = asyncio.ensure_future(batcher.ask(served, obs, "x" * 300))
            await asyncio.sleep(0)
            gone.cancel()
            return await asyncio.wait_for(batcher.ask(served, obs, "me"), 5)
        finally:
            batcher.close()

    assert asyncio.run(play()).text == "me"
    assert served.did.count("letter") < 300


def test_a_newer_checkpoint_may_talk_or_no_longer() -> None:
    assert PolicySlot(Echo()).metadata["talks"] is True
    assert "talks" not in PolicySlot(Echo(talks=False)).metadata


def test_narrated_client_tells_accounts_beside_its_actions() -> None:
    with serve_in_thread(PolicyServer(Echo(), port=0)) as server:
        client = NarratedClient(server.uri, account_s=0.01)
        obs = Observation({"front": np.zeros((1, 4, 4, 3), np.uint8)}, np.ones((1, 2), np.float32), ["go"])
        told = []
        for _ in range(200):
            client.act(obs)
            told += [client.account] if client.account else []
            if len(told) >= 2:
                break
            threading.Event().wait(0.01)
        client.close()
    assert told[:2] == [Said(ACCOUNT, 1.0)] * 2
    assert CANNOT.count("\n") == 0
