"""Which earlier decisions are looked at: every rule against a slow reference, and the replay of demonstrations."""

from itertools import pairwise

import numpy as np
import pytest

from vla.model.config import MemoryConfig, ModulatorConfig, VLAConfig, model_problem
from vla.model.memory.recall import MOST_KEPT, Recall, redundant
from vla.model.memory.tokens import replayed


def unit_rows(count, seed, width=6):
    """A walk on the sphere that stands still now and then."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(count, width)) * (rng.random((count, 1)) < 0.6)
    walk = steps.cumsum(0) + rng.normal(size=width)
    return (walk / np.linalg.norm(walk, axis=1, keepdims=True)).astype(np.float32)


def slow_bank(keys, frames):
    """The bank after each of the decisions, from the rule in words: of all ways through the frames without one of them,
    the first excepted, the longest; of ways equally long the one without the newer frame."""
    kept, after = [], []
    for new in range(len(keys)):
        kept = [*kept, new]
        if len(kept) > frames:
            ways = [kept[:place] + kept[place + 1 :] for place in range(1, len(kept))]
            whole = length(keys, kept)
            kept = min(reversed(ways), key=lambda way: round(whole - length(keys, way), 4))
        after.append(list(kept))
    return after


def length(keys, way):
    return sum(float(np.linalg.norm(keys[b] - keys[a])) for a, b in pairwise(way))


def looked_at(config, keys):
    """Which decisions are looked at before each of the decisions."""
    recall, seen = Recall(config), []
    for number, key in enumerate(keys):
        seen.append([number - ago for ago, _ in recall.look()])
        assert seen[-1] == [row for _, row in recall.look()]
        recall.add(number, key)
    return seen


@pytest.mark.parametrize("frames", [1, 2, 4, 7])
@pytest.mark.parametrize("seed", range(5))
def test_the_bank_equals_a_slow_reference(frames, seed):
    keys = unit_rows(60, seed)
    assert looked_at(MemoryConfig(frames=frames), keys) == [[], *slow_bank(keys, frames)[:-1]]


def test_the_bank_keeps_what_differs_and_drops_what_stands_still():
    places = np.eye(4, dtype=np.float32)
    order = [0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    bank = looked_at(MemoryConfig(frames=4), places[order])[-1]
    assert [order[number] for number in bank] == [0, 1, 2, 3]
    assert 1 not in [order[number] for number in looked_at(MemoryConfig(frames=4, rule="uniform"), places[order])[-1]]


def test_the_newest_frame_is_taken_only_if_it_differs():
    keys = np.eye(3, dtype=np.float32)
    assert redundant(keys[[0, 1, 2, 2]]) == 3
    assert redundant(keys[[0, 0, 1, 2]]) == 1
    with pytest.raises(ValueError, match="single frame"):
        redundant(keys[:1])


def test_what_is_visited_twice_is_kept_twice_and_what_lies_on_the_way_is_not():
    """To and fro between two places with stops on the way, as between buttons: the turning points stay."""
    angles = np.repeat([0.0, 0.3, 0.6, 0.3, 0.0, 0.3, 0.6, 0.3, 0.0], 3)
    keys = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    for upto, turns in ((15, [0.0, 0.6, 0.0]), (21, [0.0, 0.6, 0.0, 0.6]), (27, [0.0, 0.6, 0.0, 0.6])):
        bank = looked_at(MemoryConfig(frames=len(turns)), keys[:upto])[-1]
        np.testing.assert_allclose(angles[bank], turns)


def test_uniform_frames_are_evenly_spaced_from_the_first_to_the_last():
    for number, seen in enumerate(looked_at(MemoryConfig(frames=4, rule="uniform"), unit_rows(50, 0))):
        wanted = np.linspace(0, number - 1, 4)
        assert not number or max(np.abs(np.array(seen)[:, None] - wanted).min(0)) <= 0.5
        assert len(seen) == min(4, number)
    assert looked_at(MemoryConfig(frames=3, rule="last"), unit_rows(9, 0))[-1] == [5, 6, 7]
    assert looked_at(MemoryConfig(frames=3, rule="current"), unit_rows(9, 0))[-1] == []


def test_an_endless_episode_keeps_a_bounded_number_of_rows():
    recall = Recall(MemoryConfig(frames=4, rule="uniform"))
    for number in range(5 * MOST_KEPT):
        recall.add(number, np.ones(1, np.float32))
    assert len(recall._kept) <= MOST_KEPT
    rows = [row for _, row in recall.look()]
    assert np.abs(np.array(rows) - np.linspace(0, 5 * MOST_KEPT - 1, 4)).max() <= 64


@pytest.mark.parametrize("rule", ["bank", "uniform", "last"])
def test_demonstrations_are_replayed_at_the_cadence_of_decisions_within_their_episode(rule):
    config, steps = MemoryConfig(frames=3, rule=rule), 4
    keys, episodes = unit_rows(70, 1), np.repeat([5, 2, 9], [31, 37, 2])
    frames, ages = replayed(config, keys, episodes, steps=steps)
    for frame in range(70):
        first = np.flatnonzero(episodes == episodes[frame])[0]
        before = list(range(first + (frame - first) % steps, frame + 1, steps))
        wanted = [before[number] for number in looked_at(config, keys[before])[-1]]
        assert frames[frame].tolist() == wanted + [-1] * (3 - len(wanted))
        assert ages[frame].tolist() == [frame - seen for seen in wanted] + [-1] * (3 - len(wanted))


def test_a_memory_that_nothing_fills_is_refused():
    for config, words in (
        (VLAConfig(memory=MemoryConfig(frames=0)), "at least one frame"),
        (VLAConfig(memory=MemoryConfig(), freeze_backbone=False), "frozen backbone"),
        (
            VLAConfig(memory=MemoryConfig(), modulators=ModulatorConfig(decoder=True)),
            "leave the modulators in the bridge",
        ),
    ):
        assert words in model_problem(config)
