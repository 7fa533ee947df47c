"""The replay: returns of whole episodes, room for the newest, and what is written is read back."""

from __future__ import annotations

import pytest
import torch

from rl.offline.replay import Replay, Step, mixed
from tests.rl.offline.stub import STEPS, seen


def step(number: int, *, reward: float = 0.0, discount: float = 0.9, executed: int = STEPS) -> Step:
    return Step(seen([number]), torch.full((STEPS, 2), float(number)), executed, reward, discount, seen([number]))


def test_returns_are_discounted_to_the_end_of_the_episode() -> None:
    replay = Replay(10)
    replay.add_episode([step(0, discount=0.5), step(1, discount=0.25), step(2, reward=1.0, discount=0.0)])
    replay.add_episode([step(3), step(3)])
    rows = replay.rows(torch.arange(5))
    back = {int(n): float(r) for n, r in zip(rows.now.proprio_BP.argmax(1), rows.returned_B, strict=True)}
    assert back == {0: 0.125, 1: 0.25, 2: 1.0, 3: 0.0}


def test_targets_go_on_some_chunks_later_or_at_the_end() -> None:
    replay = Replay(10, n_step=2)
    replay.add_episode([step(0, discount=0.5), step(1, discount=0.25), step(2, reward=1.0, discount=0.0)])
    replay.add_episode([step(3, discount=0.5)])
    rows = replay.rows(torch.arange(4))
    told = zip(
        rows.now.proprio_BP.argmax(1), rows.after.proprio_BP.argmax(1), rows.reward_B, rows.discount_B, strict=True
    )
    assert [tuple(map(float, row)) for row in told] == [
        (0, 1, 0, 0.125), (1, 2, 0.25, 0), (2, 2, 1, 0), (3, 3, 0, 0.5)
    ]  # fmt: skip


def test_what_was_not_executed_is_not_learnt_from() -> None:
    replay = Replay(2)
    replay.add_episode([step(1, executed=1)])
    rows = replay.rows(torch.tensor([0]))
    assert rows.executed_Bn.tolist() == [[True, False]] and rows.action_BnA[0, 1].tolist() == [0.0, 0.0]


def test_the_oldest_make_place() -> None:
    replay = Replay(3)
    for number in (0, 1, 2, 3):
        replay.add_episode([step(number)])
    held = replay.rows(torch.arange(replay.size)).now.proprio_BP.argmax(1)
    assert sorted(held.tolist()) == [1, 2, 3]


def test_it_is_read_back_as_it_was_written() -> None:
    replay, again = Replay(5), Replay(5)
    replay.add_episode([step(0), step(1, reward=1.0, discount=0.0)])
    again.load({name: tensor.clone() for name, tensor in replay.tensors().items()})
    for one in (replay, again):
        one.add_episode([step(2)])
    a, b = (one.sample(20, torch.Generator().manual_seed(0)) for one in (replay, again))
    assert torch.equal(a.action_BnA, b.action_BnA) and torch.equal(a.now.proprio_BP, b.now.proprio_BP)
    assert torch.equal(a.returned_B, b.returned_B)


def test_batches_of_two_replays_are_joined() -> None:
    one, other = Replay(2), Replay(2)
    one.add_episode([step(0)])
    other.add_episode([step(3)])
    generator = torch.Generator()
    both = mixed(one.sample(2, generator), other.sample(3, generator))
    assert both.now.proprio_BP.argmax(1).tolist() == [0, 0, 3, 3, 3] and len(both.returned_B) == 5


def test_an_empty_one_says_so() -> None:
    with pytest.raises(ValueError, match="empty"):
        Replay(3).sample(1, torch.Generator())
