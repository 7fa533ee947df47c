"""Returns, advantages and labels of logged frames against a reading of the definition, and values of episodes that no
model has learnt from."""

import numpy as np
import pytest
import torch

from vla.data.findings import labelled_throughout, spread_successes
from vla.training.advantage.labels import _auc, good_ones
from vla.training.advantage.value import FAILURE, Outcomes, held_out_values

LENGTHS = (5, 3, 7, 2)
WON = (True, False, False, True)


def logs(lengths=LENGTHS, won=WON, early=0):
    """(success (F,), episode (F,)): success at the last frame, or `early` frames before it."""
    pairs = zip(lengths, won, strict=True)
    success = np.concatenate([np.arange(n) == n - 1 - early if w else np.zeros(n, bool) for n, w in pairs])
    return success, np.repeat(10 * np.arange(len(lengths)), lengths)


def slow(success, episode, value, steps):
    """Returns and advantages, frame by frame: each control step costs a share of 1 - FAILURE, failure the rest."""
    longest = max((episode == e).sum() for e in set(episode))
    cost = (1 - FAILURE) / longest
    returns, advantages = np.zeros(len(episode)), np.zeros(len(episode))
    for e in sorted(set(episode)):
        rows = list(np.flatnonzero(episode == e))
        wins = [k for k, row in enumerate(rows) if success[row]]
        decided = wins[0] + 1 if wins else len(rows)  # the number of steps until success, or the end
        for k, row in enumerate(rows):
            total = ahead = 0.0
            for j in range(k, decided):
                total -= cost
                ahead -= cost if j < k + steps else 0.0
            if not wins:
                total -= FAILURE
            returns[row] = total
            ahead = total if k + steps >= decided else ahead + value[rows[k + steps]]
            advantages[row] = ahead - value[row]
    return returns, advantages


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_returns_and_advantages_are_those_of_a_slow_reading(steps, early):
    success, episode = logs(early=early)
    value = np.random.default_rng(steps).uniform(-1, 0, len(episode))
    outcomes = Outcomes(success, episode)
    returns, advantages = slow(success, episode, value, steps)
    np.testing.assert_allclose(outcomes.returns_F, returns, atol=1e-12)
    np.testing.assert_allclose(outcomes.advantages_F(value, steps), advantages, atol=1e-12)
    assert outcomes.returns_F.min() == pytest.approx(-1) and outcomes.returns_F.max() <= 0
    assert outcomes.won_E.tolist() == list(WON)


@pytest.mark.parametrize("late", [0, 1])
def test_a_label_of_the_whole_episode_is_a_success_at_its_end(late):
    """Converters write it so, perhaps but for the first frame; an episode of one frame is its own end."""
    lengths, won = (20, 3, 17, 1), (True, False, False, True)
    episode = np.repeat(np.arange(4), lengths)
    begun = np.concatenate([np.arange(n) for n in lengths])
    spread = np.repeat(won, lengths) & ((begun >= late) | (episode == 3))
    last, _ = logs(lengths, won)
    told, wanted = Outcomes(spread, episode), Outcomes(last, episode)
    np.testing.assert_array_equal(told.returns_F, wanted.returns_F)
    assert labelled_throughout(spread, episode) == [0] and labelled_throughout(last, episode) == []
    half = (episode == 0) & (begun >= 10)  # a success that the robot rests in is one from its first frame on
    assert Outcomes(half, episode).left_F[0] == 11 and spread_successes(half, episode) == []


def test_a_true_value_leaves_no_advantage_where_nothing_is_random():
    success, episode = logs()
    outcomes = Outcomes(success, episode)
    np.testing.assert_allclose(outcomes.advantages_F(outcomes.returns_F, 2), 0, atol=1e-12)


def many(inputs, won, length=6):
    outcomes = Outcomes(*logs([length] * len(won), won))
    rows = torch.as_tensor(inputs, dtype=torch.float32).repeat_interleave(length, 0)
    return outcomes, held_out_values(rows, outcomes, folds=4, steps=60, seed=0)


def test_what_is_known_of_other_episodes_is_expected_and_what_is_not_is_not_learnt_by_heart():
    rng = np.random.default_rng(0)
    won = rng.random(48) < 0.5
    outcomes, told = many(np.stack([won, rng.random(48)], 1), won)  # the first number tells how it will end
    assert _auc(told, outcomes.won_E[outcomes.number_F]) > 0.98
    _, name_only = many(np.eye(48), won)  # each episode has a number of its own, which tells nothing of the others
    assert 0.2 < _auc(name_only[outcomes.elapsed_F == 0], won) < 0.8


def test_logs_that_tell_nothing_apart_are_refused():
    for won, words in (([True] * 12, "all 12 logged episodes succeeded"), ([False] * 12, "all 12 .* failed")):
        with pytest.raises(ValueError, match=words):
            many(np.zeros((12, 2)), won)
    with pytest.raises(ValueError, match="4 logged episodes are too few to judge them: record at least 8"):
        many(np.zeros((4, 2)), [True, False] * 2)


def test_the_threshold_is_each_tasks_own():
    advantage = np.array([*range(10), *(100 * np.arange(10))], float)
    good = good_ones(advantage, ["a"] * 10 + ["b"] * 10, 0.3)
    assert good.nonzero()[0].tolist() == [7, 8, 9, 17, 18, 19]
    assert good_ones(advantage, [""] * 20, 0.3).sum() == 6


def test_auc_counts_pairs():
    score, won = np.array([0.1, 0.5, 0.4, 0.9]), np.array([False, True, False, True])
    assert _auc(score, won) == 1.0 and _auc(-score, won) == 0.0
    assert _auc(np.array([1.0, 2.0, 3.0]), np.array([True, False, True])) == 0.5
