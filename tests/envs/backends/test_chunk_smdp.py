"""chunk_smdp: a chunk executed is its control steps executed one by one, whatever ends the episode, and where."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from envs.backends.cpu_worlds import TabletopWorlds
from envs.experts.pick_place import TabletopExpert
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from vla.core.types import StepResult

SEEDS = [100, 11, 7]
"""Played to success, to a failure (the wrong object is lifted), and until time runs out."""


@dataclass
class Played:
    """Single control steps of all worlds: (T, 3, ...)."""

    actions: list[np.ndarray] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    qpos: list[np.ndarray] = field(default_factory=list)


def build() -> TabletopWorlds:
    worlds = TabletopWorlds(load_suite("tabletop-pick"), 3, render=RenderOptions(image_size=16))
    worlds.render_images = False
    worlds.reset(seeds=SEEDS)
    return worlds


def state(worlds: TabletopWorlds) -> np.ndarray:
    return np.stack([np.concatenate([data.qpos, data.qvel, data.ctrl, [data.time]]) for data in worlds.data])


@pytest.fixture(scope="module")
def singles() -> Played:
    worlds, expert, played = build(), TabletopExpert(3), Played()
    named = worlds.state.goal_object[1].copy()
    other = worlds.episodes[1].swapped_goals[0].object
    while not worlds.over.all():
        worlds.state.goal_object[1] = other
        action = expert.act(worlds.observation())[:, :1].copy()
        worlds.state.goal_object[1] = named
        action[2] = [[0.01, 0.0, 0.0, 1.0]]
        played.actions.append(action[:, 0])
        played.results.append(worlds.step_chunk(action))
        played.qpos.append(state(worlds))
    return played


@pytest.mark.parametrize("size", [3, 7, 16])
def test_a_chunk_is_its_single_steps(singles, size):
    worlds, horizon = build(), len(singles.actions)
    assert horizon == worlds.horizon
    ends = np.array(
        [next(t for t, r in enumerate(singles.results) if (r.terminated | r.truncated)[i]) for i in (0, 1, 2)]
    )
    assert ((ends + 1) % size != 0).sum() >= 2, "episodes must end inside chunks"
    actions = np.stack([*singles.actions, *[singles.actions[-1]] * size], axis=1)
    for first in range(0, horizon, size):
        whole = worlds.step_chunk(actions[:, first : first + size])
        steps = singles.results[first : first + size]
        assert np.array_equal(state(worlds), singles.qpos[min(first + size, horizon) - 1]), "to the last bit"
        assert np.array_equal(whole.reward, np.sum([one.reward for one in steps], axis=0))
        assert np.array_equal(whole.n_steps, np.sum([one.n_steps for one in steps], axis=0))
        for name in ("terminated", "truncated"):
            assert np.array_equal(getattr(whole, name), np.any([getattr(one, name) for one in steps], axis=0)), name
        for name in ("success", "wrong_object"):
            assert np.array_equal(whole.info[name], np.any([one.info[name] for one in steps], axis=0)), name
        assert np.array_equal(whole.obs.proprio, steps[-1].obs.proprio)
        assert np.array_equal(whole.obs.privileged, steps[-1].obs.privileged)
        assert not (whole.terminated & whole.truncated).any()
        # Nothing is executed after the end: n is counted from the chunk's first step to the episode's last.
        assert np.array_equal(whole.n_steps, np.clip(ends + 1 - first, 0, size))
    assert worlds.over.all()


def test_every_kind_of_end_was_played(singles):
    total = {name: np.sum([getattr(r, name) for r in singles.results], axis=0) for name in ("terminated", "truncated")}
    assert total["terminated"].tolist() == [1, 1, 0] and total["truncated"].tolist() == [0, 0, 1]
    assert np.sum([r.reward for r in singles.results], axis=0).tolist() == [1, 0, 0]
    assert np.sum([r.info["wrong_object"] for r in singles.results], axis=0).tolist() == [0, 1, 0]
