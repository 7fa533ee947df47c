"""policies.serving.batching: who waits is answered in one forward pass, with the actions they would have had alone."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from policies.serving.batching import Answer, Batcher
from tests.vla.toy_backbone import toy_observation, toy_vla
from vla.core.types import ActionSpec, Observation, PolicySpec
from vla.model.policy import VLAPolicy


class Gated:
    """Holds the first batch until told, and notes the size of each; a bad instruction fails the whole batch."""

    spec = PolicySpec(ActionSpec(("x", "y"), (-1.0,) * 2, (1.0,) * 2, 20.0))

    def __init__(self, act: Callable[[Observation], np.ndarray] | None = None) -> None:
        self.policy = self
        self.open = threading.Event()
        self.sizes: list[int] = []
        self._act = act

    def reset(self, env_ids: Sequence[int] | None = None) -> None: ...

    def act(self, obs: Observation) -> np.ndarray:
        self.open.wait(5)
        self.sizes.append(obs.batch_size)
        if "bad" in obs.instruction:
            raise ValueError("bad instruction")
        if self._act is not None:
            return self._act(obs)
        value = obs.proprio[:, :1] + obs.images["front"].mean((1, 2, 3))[:, None]
        value = np.where(np.array(obs.instruction)[:, None] == "nan", np.nan, value)
        return np.tile(value[:, None], (1, 3, 2))


def request(index: int, *, text: str = "go", size: int = 4) -> Observation:
    return Observation({"front": np.full((1, size, 4, 3), index, np.uint8)}, np.full((1, 2), index, np.float32), [text])


def answers(served: object, requests: Sequence[Observation], *, max_batch: int = 16) -> list[Answer | Exception]:
    """All asked while a first request keeps the policy busy."""

    async def play() -> list[Answer | Exception]:
        batcher = Batcher(max_batch=max_batch)
        try:
            first = asyncio.ensure_future(batcher.act(served, requests[0]))
            await asyncio.sleep(0.02)
            others = [asyncio.ensure_future(batcher.act(served, obs)) for obs in requests[1:]]
            await asyncio.sleep(0.02)
            served.open.set()
            return await asyncio.gather(first, *others, return_exceptions=True)
        finally:
            batcher.close()

    return asyncio.run(play())


def test_those_who_wait_share_one_forward_pass() -> None:
    served = Gated()
    got = answers(served, [request(i) for i in range(6)])
    assert served.sizes == [1, 5]
    assert [answer.actions[0, 0] for answer in got] == [2 * i for i in range(6)]
    assert [answer.batch_size for answer in got] == [1, 5, 5, 5, 5, 5]
    assert all(answer.actions.shape == (3, 2) for answer in got)


def test_batches_are_bounded_and_in_order() -> None:
    served = Gated()
    got = answers(served, [request(i) for i in range(8)], max_batch=3)
    assert served.sizes == [1, 3, 3, 1] and [answer.actions[0, 0] for answer in got] == [2 * i for i in range(8)]
    served = Gated()
    answers(served, [request(i) for i in range(3)], max_batch=1)
    assert served.sizes == [1, 1, 1]
    with pytest.raises(ValueError, match="max_batch must be at least 1"):
        Batcher(max_batch=0)


def test_other_image_sizes_make_another_batch() -> None:
    served = Gated()
    got = answers(served, [request(i, size=4 + i % 2) for i in range(5)])
    assert sorted(served.sizes) == [1, 2, 2] and [answer.actions[0, 0] for answer in got] == [2 * i for i in range(5)]


def test_one_bad_request_costs_the_others_nothing() -> None:
    served = Gated()
    got = answers(served, [request(0), request(1), request(2, text="bad"), request(3), request(4, text="nan")])
    assert isinstance(got[2], ValueError) and "NaN" in str(got[4])
    assert [got[i].actions[0, 0] for i in (0, 1, 3)] == [0, 2, 6]
    assert served.sizes == [1, 4, 1, 1, 1, 1]  # together, then each alone


def test_a_real_policy_acts_the_same_alone_and_in_company() -> None:
    torch.manual_seed(0)
    policy = VLAPolicy(toy_vla().eval())
    many = toy_observation(batch=7)
    many.instruction = [["pick up the red cube", "pick green", "blue cube"][i % 3] for i in range(7)]
    served = Gated(policy.act)
    served.spec = policy.spec
    ones = [many.select([i]) for i in range(7)]
    got = np.stack([answer.actions for answer in answers(served, ones)])
    assert served.sizes == [1, 6]
    np.testing.assert_allclose(got, np.concatenate([policy.act(one) for one in ones]), atol=1e-6)
    assert np.ptp(got[:, 0], axis=0).max() > 1e-3  # they differ from one another


def test_who_hangs_up_is_not_computed() -> None:
    async def play() -> list[int]:
        served, batcher = Gated(), Batcher()
        first = asyncio.ensure_future(batcher.act(served, request(0)))
        gone = asyncio.ensure_future(batcher.act(served, request(1)))
        kept = asyncio.ensure_future(batcher.act(served, request(2)))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0)
        served.open.set()
        await asyncio.gather(first, kept)
        batcher.close()
        return served.sizes

    assert asyncio.run(play()) == [1, 1]


def test_health_tells_a_policy_that_is_stuck(monkeypatch):
    monkeypatch.setattr("policies.serving.batching.STUCK_S", 0.05)
    served, said = Gated(), []

    async def play() -> None:
        batcher = Batcher()
        said.append(batcher.health())
        asked = asyncio.ensure_future(batcher.act(served, request(1)))
        await asyncio.sleep(0.1)
        said.append(batcher.health())
        served.open.set()
        await asked
        await asyncio.sleep(0.1)  # an idle server is not a stuck one
        said.append(batcher.health())
        batcher.close()

    asyncio.run(play())
    assert [status for status, _ in said] == [200, 503, 200]
    assert said[1][1] == "the policy has not answered for 0 s\n"
