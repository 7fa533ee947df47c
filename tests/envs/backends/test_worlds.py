"""The tabletop worlds: determinism, chunk semantics, rules, workers."""

from __future__ import annotations

import numpy as np
import pytest

from envs import make_vec
from envs.backends.cpu_worlds import TabletopWorlds
from envs.experts.pick_place import TabletopExpert
from envs.registry import load_suite
from envs.tabletop.episodes import sample_episode
from envs.tabletop.scene import SCENES
from envs.tabletop.suites import suite_names
from vla.core.types import VecEnv

PICK = "tabletop-pick"


def build(suite: str = PICK, n: int = 2, *, render: bool = False, **overrides: object) -> TabletopWorlds:
    worlds = TabletopWorlds(load_suite(suite), n, **overrides)
    worlds.render_images = render
    return worlds


def run_expert(worlds: TabletopWorlds, seeds: range) -> np.ndarray:
    worlds.reset(seeds=seeds)
    expert = TabletopExpert(worlds.num_envs)
    success = np.zeros(worlds.num_envs, bool)
    while not worlds.over.all():
        success |= worlds.step_chunk(expert.act(worlds.observation())).info["success"]
    return success


@pytest.mark.parametrize("suite", ["tabletop-pick", "tabletop-place", "tabletop-mixed"])
def test_the_expert_solves_every_suite(suite: str) -> None:
    assert run_expert(build(suite, 12), range(100, 112)).sum() >= 11


def test_a_seed_is_an_episode_whatever_the_world_or_the_phrasing() -> None:
    suite, scene = load_suite("tabletop-mixed"), SCENES["tabletop"]
    for seed in range(30):
        first = sample_episode(suite, scene, seed)
        other = sample_episode(suite, scene, seed, phrasings="heldout")
        assert first == sample_episode(suite, scene, seed)
        assert (first.poses, first.target, first.colors) == (other.poses, other.target, other.colors)
        assert first.instruction != other.instruction
        assert first.swapped_instruction != first.instruction
    assert sample_episode(suite, scene, 1) != sample_episode(suite, scene, 2)
    two = build(n=3)
    two.reset(seeds=[5, 9, 5])
    assert np.array_equal(two.privileged()[0], two.privileged()[2])
    assert not np.array_equal(two.privileged()[0], two.privileged()[1])


def test_heldout_phrasings_are_new_sentences_of_known_words() -> None:
    suite, scene = load_suite("tabletop-mixed"), SCENES["tabletop"]
    train = [sample_episode(suite, scene, s).instruction for s in range(600)]
    heldout = [sample_episode(suite, scene, s, phrasings="heldout").instruction for s in range(200)]
    assert not set(train) & set(heldout)
    assert {w for text in heldout for w in text.split()} <= {w for text in train for w in text.split()}


def test_a_chunk_is_its_single_steps() -> None:
    rng = np.random.default_rng(0)
    chunk = rng.uniform(-1, 1, (2, 8, 4)).astype(np.float32)
    whole, single = build(), build()
    whole.reset(seeds=[3, 4])
    single.reset(seeds=[3, 4])
    whole.step_chunk(chunk)
    for c in range(8):
        single.step_chunk(chunk[:, c : c + 1])
    for a, b in zip(whole.data, single.data, strict=True):
        assert np.array_equal(a.qpos, b.qpos)


def test_success_inside_a_chunk_stops_the_world_there() -> None:
    worlds = build(n=1)
    worlds.reset(seeds=[100])
    expert = TabletopExpert(1)
    while not worlds.over[0]:
        # eight steps of the same expert command: the episode must end inside some chunk
        before = int(worlds.elapsed[0])
        result = worlds.step_chunk(np.repeat(expert.act(worlds.observation()), 3, axis=1))
        assert result.n_steps[0] == worlds.elapsed[0] - before
    assert not (result.terminated[0] and result.truncated[0])
    qpos = worlds.data[0].qpos.copy()
    after = worlds.step_chunk(np.ones((1, 8, 4), np.float32))
    assert after.n_steps[0] == 0 and np.array_equal(worlds.data[0].qpos, qpos)
    assert not after.info["success"][0] and after.reward[0] == 0


def test_time_limit_truncates_and_does_not_terminate() -> None:
    worlds = build(n=1)
    worlds.reset(seeds=[7])
    result = worlds.step_chunk(np.zeros((1, worlds.horizon + 5, 4), np.float32))
    assert result.truncated[0] and not result.terminated[0] and result.n_steps[0] == worlds.horizon


def test_lifting_another_object_is_a_failure() -> None:
    worlds = build(n=1)
    worlds.reset(seeds=[11])
    state, named = worlds.state, worlds.episodes[0].goals[0].object
    other = worlds.episodes[0].swapped_goals[0].object
    assert other != named
    expert = TabletopExpert(1)
    while not worlds.over[0]:
        state.goal_object[0] = other  # the expert goes for `other` ...
        chunk = expert.act(worlds.observation())
        state.goal_object[0] = named  # ... and the rules still count the named one
        result = worlds.step_chunk(chunk)
    assert result.info["wrong_object"][0] and result.terminated[0] and not result.info["success"][0]
    assert result.reward[0] == 0


def test_objects_rest_on_the_table_and_the_arm_tracks_its_command() -> None:
    for suite in suite_names():
        worlds = build(suite, 8)
        worlds.reset(seeds=range(8))
        worlds.step_chunk(np.tile(np.array([0.5, 0.0, 0.0, 1.0], np.float32), (8, 6, 1)))
        height = worlds.state.objects[:, :, 2] - worlds.state.rest_height
        for world, episode in enumerate(worlds.episodes):
            height[world, episode.slots[0]] -= episode.first_floor  # a task may begin with its object in a box
        assert np.abs(height[worlds.state.active]).max() < 0.004
        grip = worlds.state.grip
        lead = worlds.proprio()[:, 3:6]
        assert np.isfinite(worlds.proprio()).all() and np.abs(lead).max() <= worlds.control.max_lead_m + 1e-6
        assert (grip[:, 0] > 0.56).all()


@pytest.mark.parametrize("chunk", [np.zeros((2, 8, 3)), np.zeros((3, 8, 4)), np.full((2, 1, 4), np.nan)])
def test_bad_chunks_are_refused(chunk: np.ndarray) -> None:
    worlds = build()
    worlds.reset(seeds=[0, 1])
    with pytest.raises(ValueError, match="action chunk"):
        worlds.step_chunk(chunk)


def test_workers_give_the_same_worlds_as_one_process() -> None:
    chunk = np.random.default_rng(1).uniform(-1, 1, (3, 8, 4)).astype(np.float32)
    env = make_vec(PICK, 3, num_workers=2)
    try:
        assert isinstance(env, VecEnv)
        local = build(n=3, render=True)
        here, there = local.reset(seeds=[1, 2, 3]), env.reset(seeds=[1, 2, 3])
        assert here.instruction == there.instruction
        for name in env.cameras:
            assert np.array_equal(here.images[name], there.images[name])
            assert here.images[name].std() > 10  # something is drawn
        a, b = local.step_chunk(chunk), env.step_chunk(chunk)
        assert np.array_equal(a.obs.proprio, b.obs.proprio) and np.array_equal(a.n_steps, b.n_steps)
        assert np.array_equal(a.obs.images["front"], b.obs.images["front"])
        one = env.reset(seeds=[9], env_ids=[1])  # the others go on undisturbed
        assert np.array_equal(one.proprio[[0, 2]], b.obs.proprio[[0, 2]])
        with pytest.raises(ValueError, match="action chunk"):
            env.step_chunk(np.full((3, 1, 4), np.nan, np.float32))
        assert env.step_chunk(chunk).n_steps.max() == 8  # an error does not break the workers
    finally:
        env.close()


def test_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="tabletop-pick"):
        make_vec("tabletop-pik", 1)
