"""policies.chunking.queues: exact values of the queue and of ACT's weighting."""

from __future__ import annotations

import numpy as np
import pytest

from policies.chunking.queues import ActionQueue, TemporalEnsemble


def chunk_of(start: float, length: int = 4, dim: int = 2, batch: int = 1) -> np.ndarray:
    """(batch, length, dim): step k of world b is 100 b + start + k, in every component."""
    steps = start + np.arange(length, dtype=np.float32)[None, :, None] + 100 * np.arange(batch)[:, None, None]
    return np.broadcast_to(steps, (batch, length, dim)).astype(np.float32)


def test_queue_plays_the_first_n_actions_then_asks() -> None:
    queue = ActionQueue(3)
    assert queue.needs_chunk().tolist() == [True]
    queue.push(chunk_of(0, length=4))
    played = []
    while not queue.needs_chunk()[0]:
        action = queue.pop()
        assert action.shape == (1, 2) and action.dtype == np.float32
        played.append(action[0, 0])
    assert played == [0, 1, 2]  # the fourth action of the chunk is never executed
    with pytest.raises(ValueError, match="world 0 has no action left"):
        queue.pop()


def test_queue_keeps_a_timeline_per_world() -> None:
    queue = ActionQueue(2, num_envs=3)
    queue.push(chunk_of(0, batch=3))
    assert queue.pop()[:, 0].tolist() == [0, 100, 200]
    queue.reset([1])
    assert queue.needs_chunk().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="world 1"):
        queue.pop()
    queue.push(chunk_of(50), [1])
    assert queue.remaining.tolist() == [1, 2, 1]
    assert queue.pop([2, 0])[:, 0].tolist() == [201, 1]
    assert queue.needs_chunk().tolist() == [True, False, True]
    assert queue.pop([1])[:, 0].tolist() == [50]


def test_queue_push_replaces_what_was_left_and_copies() -> None:
    queue, chunk = ActionQueue(2), chunk_of(7)
    queue.push(chunk_of(0))
    queue.pop()
    queue.push(chunk)
    chunk[:] = -1
    assert [queue.pop()[0, 0], queue.pop()[0, 0]] == [7, 8]


def test_queue_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="n_action_steps must be at least 1"):
        ActionQueue(0)
    with pytest.raises(ValueError, match="set n_action_steps to at most 4"):
        ActionQueue(5).push(chunk_of(0, length=4))
    with pytest.raises(ValueError, match=r"expected a chunk of shape \(2, C, A\)"):
        ActionQueue(1, num_envs=2).push(chunk_of(0))
    for ids in ([2], [0, 0], [-1], []):
        with pytest.raises(ValueError, match=r"distinct worlds in 0\.\.1"):
            ActionQueue(1, num_envs=2).push(chunk_of(0, batch=max(len(ids), 1)), ids)


def test_ensemble_weights_the_oldest_chunk_most() -> None:
    ensemble = TemporalEnsemble(decay=0.5)
    ensemble.push(np.array([[[0.0], [10.0], [20.0]]], np.float32))
    assert ensemble.pop()[0, 0] == 0
    ensemble.push(np.array([[[1.0], [2.0], [3.0]]], np.float32))
    w = np.exp(-0.5)
    np.testing.assert_allclose(ensemble.pop(), [[(10 + 1 * w) / (1 + w)]], rtol=1e-6)
    ensemble.push(np.array([[[5.0], [6.0], [7.0]]], np.float32))
    np.testing.assert_allclose(ensemble.pop(), [[(20 + 2 * w + 5 * w * w) / (1 + w + w * w)]], rtol=1e-6)
    # The first chunk (three actions, three steps ago) is now spent: the second is the oldest and takes weight 1.
    np.testing.assert_allclose(ensemble.pop(), [[(3 + 6 * w) / (1 + w)]], rtol=1e-6)
    np.testing.assert_allclose(ensemble.pop(), [[7]], rtol=1e-6)
    assert ensemble.needs_chunk().tolist() == [True]


def test_ensemble_matches_a_table_of_all_predictions() -> None:
    """The textbook form: a (time, time + C) table of predictions, one column averaged per step."""
    rng, steps, length, decay = np.random.default_rng(0), 12, 5, 0.1
    ensemble = TemporalEnsemble(decay)
    table = np.full((steps, steps + length, 3), np.nan)
    for t in range(steps):
        chunk = rng.normal(size=(1, length, 3)).astype(np.float32)
        table[t, t : t + length] = chunk[0]
        ensemble.push(chunk)
        rows = table[:, t][~np.isnan(table[:, t]).any(axis=1)]
        weights = np.exp(-decay * np.arange(len(rows)))
        np.testing.assert_allclose(ensemble.pop()[0], (weights[:, None] * rows).sum(0) / weights.sum(), rtol=1e-5)


def test_ensemble_without_decay_is_the_mean_and_worlds_are_apart() -> None:
    ensemble = TemporalEnsemble(decay=0.0, num_envs=2)
    ensemble.push(chunk_of(0, batch=2))
    ensemble.push(chunk_of(10), [1])
    assert ensemble.pop()[:, 0].tolist() == [0, (100 + 10) / 2]
    ensemble.reset([1])
    assert ensemble.needs_chunk().tolist() == [False, True]
    assert ensemble.pop([0])[:, 0].tolist() == [1]
    with pytest.raises(ValueError, match="world 1 has no action left"):
        ensemble.pop()
    with pytest.raises(ValueError, match="decay"):
        TemporalEnsemble(decay=-1)
