"""Meta-World's tasks through our contract: suites, seeds, chunks, frames, experts, workers."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec

import numpy as np
import pytest

import envs.adapters.adapter_worlds
from envs import make_vec
from envs.adapters.metaworld_env import MetaworldWorlds, default_push
from envs.adapters.metaworld_suites import HORIZON, group_rates, metaworld_suites, phrasings_of, task_names
from envs.evaluation.evaluate import evaluate
from envs.experts.registry import make_expert
from envs.registry import all_suite_names, load_suite
from envs.sim.render_options import RenderOptions
from tests.envs.geometry import backproject
from vla.core.paths import SIM_CONFIGS
from vla.core.types import VecEnv

needs_metaworld = pytest.mark.skipif(find_spec("metaworld") is None, reason="the extra 'metaworld' is not installed")
PUSH = "metaworld-push"


@pytest.fixture(scope="module")
def two():
    worlds = MetaworldWorlds(load_suite(PUSH), 2, render=RenderOptions(image_size=32))
    yield worlds
    worlds.close()


def test_the_suites_are_the_published_groups_and_every_task() -> None:
    suites = metaworld_suites()
    assert set(suites) <= set(all_suite_names()) and len(suites) == 56
    sizes = {g: len(suites[f"metaworld-{g}"].tasks) for g in ("mt50", "mt10", "easy", "medium", "hard", "very-hard")}
    assert sizes == {"mt50": 50, "mt10": 10, "easy": 28, "medium": 11, "hard": 6, "very-hard": 5}
    assert load_suite(PUSH).tasks == ("push",) and load_suite(PUSH).horizon == 500
    with pytest.raises(ValueError, match=PUSH):
        load_suite("metaworld-pusj")


def test_every_task_has_its_own_words_and_held_out_ones_made_of_known_words() -> None:
    groups = tomllib.loads((SIM_CONFIGS / "metaworld.toml").read_text())
    words = [phrasings_of(task) for task in task_names()]
    every = [text for phrasings in words for texts in phrasings.values() for text in texts]
    assert len(every) == len(set(every)) == 200, "a phrasing means one task only"
    known = {word for phrasings in words for text in phrasings["train"] for word in text.split()}
    assert not {word for phrasings in words for text in phrasings["heldout"] for word in text.split()} - known
    assert sum(map(len, groups.values())) == 50


def test_the_published_average_is_of_the_groups_not_of_the_tasks() -> None:
    easy = set(load_suite("metaworld-easy").tasks)
    rates = group_rates({task: float(task in easy) for task in task_names()})
    assert rates == {"easy": 1.0, "medium": 0.0, "hard": 0.0, "very-hard": 0.0, "average": 0.25}
    assert load_suite("metaworld-mt50").summary(dict.fromkeys(task_names(), 0.5))["group_rates"]["average"] == 0.5
    assert load_suite(PUSH).summary({"push": 1.0}) == {}
    with pytest.raises(ValueError, match="all fifty"):
        group_rates({"push": 1.0})


def test_a_missing_extra_is_named_before_any_worker_starts(monkeypatch) -> None:
    monkeypatch.setattr(envs.adapters.adapter_worlds, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"needs metaworld: `\./run setup metaworld`"):
        make_vec(PUSH, 1)
    with pytest.raises(ValueError, match=r"needs robosuite: `\./run setup robosuite`"):
        make_vec("robosuite-door", 1)


@needs_metaworld
def test_task_names_are_metaworlds() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {f"{task}-v3" for task in task_names()} == set(ALL_V3_ENVIRONMENTS)


@needs_metaworld
def test_a_seed_is_an_episode_whatever_was_played_before(two: MetaworldWorlds) -> None:
    first = two.reset(seeds=[7, 8])
    frames = {name: image.copy() for name, image in first.images.items()}
    two.step_chunk(np.full((2, 12, 4), 0.7, np.float32))
    other = two.reset(seeds=[8, 7])
    for k in (0, 1):
        assert np.array_equal(first.privileged[k], other.privileged[1 - k])
        assert first.instruction[k] == other.instruction[1 - k]
        for name in two.cameras:
            # The software renderer rounds the odd pixel the other way.
            assert np.abs(frames[name][k].astype(int) - other.images[name][1 - k]).max() <= 1
            assert not np.array_equal(frames[name][k], frames[name][1 - k])
    assert not np.array_equal(first.privileged[0], first.privileged[1])
    assert set(first.instruction) <= set(phrasings_of("push")["train"])
    assert not set(two.alternative_instructions()) & set(phrasings_of("push")["train"])


@needs_metaworld
def test_proprio_is_hand_and_fingers_and_the_goal_is_not_hidden(two: MetaworldWorlds) -> None:
    two.render_images = False
    obs = two.reset(seeds=[3, 4])
    assert np.array_equal(obs.proprio, obs.privileged[:, :4])
    assert obs.privileged[:, 36:39].any(axis=1).all(), "push without its goal cannot be solved"
    chunk = np.zeros((2, 10, 4), np.float32)
    chunk[0, :, 2], chunk[1, :, 0] = 1, -5  # beyond the bounds: clipped, not faster
    moved = two.step_chunk(chunk).obs.proprio[:, :3] - obs.proprio[:, :3]
    assert 0.03 < moved[0, 2] < 0.11 and abs(moved[0, 0]) < 0.01
    assert -0.11 < moved[1, 0] < -0.03
    two.render_images = True


@needs_metaworld
def test_a_chunk_is_its_single_steps(two: MetaworldWorlds) -> None:
    two.render_images = False
    chunk = np.random.default_rng(0).uniform(-1, 1, (2, 6, 4)).astype(np.float32)
    two.reset(seeds=[3, 3])
    whole = two.step_chunk(chunk)
    assert whole.n_steps.tolist() == [6, 6] and not whole.terminated.any() and not whole.truncated.any()
    two.reset(seeds=[3, 3])
    for c in range(6):
        single = two.step_chunk(chunk[:, c : c + 1])
    assert np.array_equal(single.obs.privileged, whole.obs.privileged)
    two.render_images = True


@needs_metaworld
def test_success_ends_inside_a_chunk_and_the_horizon_truncates(two: MetaworldWorlds) -> None:
    two.render_images = False
    obs = two.reset(seeds=[0, 1])
    expert = make_expert(PUSH, 2)
    while not two.over[0]:
        action = expert.act(obs)
        action[1] = 0
        result = two.step_chunk(np.repeat(action, 3, axis=1))
        obs = result.obs
    assert result.terminated.tolist() == [True, False] and result.reward.tolist() == [1, 0]
    two.elapsed[1] = HORIZON - 1
    result = two.step_chunk(np.zeros((2, 4, 4), np.float32))
    assert result.n_steps.tolist() == [0, 1] and result.truncated.tolist() == [False, True]
    two.reset(seeds=[2], env_ids=[1])
    for _ in range(100):  # Meta-World itself refuses to go on after 500: an episode must not outlive that
        result = two.step_chunk(np.zeros((2, 5, 4), np.float32))
    assert result.truncated[1] and result.n_steps[1] == 5
    two.render_images = True


@needs_metaworld
def test_frames_are_metaworlds_own_but_for_shadows_and_the_right_way_up(two: MetaworldWorlds) -> None:
    baseline, drawn = default_push(32)
    baseline._env.seed(5)
    baseline._env.reset()
    obs = two.reset(seeds=[5, 6])
    still = np.zeros(4)
    theirs = [frame.astype(float) for frame in baseline.step(still)]
    ours = two.step_chunk(still.astype(np.float32)[None, None].repeat(2, axis=0)).obs
    front, wrist = (ours.images[name][0].astype(float) for name in ("front", "wrist"))
    assert drawn() == 2
    assert np.abs(front - theirs[0][::-1, ::-1]).mean() < 17 < np.abs(front - theirs[0]).mean()
    assert np.abs(wrist - theirs[1]).mean() < 17 < np.abs(wrist - theirs[1][::-1]).mean()
    assert obs.images["front"].shape == (2, 32, 32, 3)
    baseline.close()


@needs_metaworld
def test_a_group_plays_each_task_once_in_as_many_seeds_and_its_expert_solves_it() -> None:
    suite = load_suite("metaworld-hard")
    worlds = MetaworldWorlds(suite, 2, render=RenderOptions(image_size=16))
    worlds.render_images = False
    tasks = [[worlds.reset(seeds=[seed, seed]) and worlds.episodes[0].task][0] for seed in range(60, 66)]
    assert tasks == list(suite.tasks)
    worlds.reset(seeds=[1, 1], tasks=["push", "assembly"])
    assert [episode.task for episode in worlds.episodes] == ["push", "assembly"]
    report = evaluate(make_expert("metaworld-hard", 2), worlds, range(60, 66))
    assert report.successes == 6
    worlds.close()


@needs_metaworld
def test_depth_and_calibration_find_the_table() -> None:
    worlds = MetaworldWorlds(load_suite(PUSH), 1, render=RenderOptions(image_size=32, depth=True, calibration=True))
    obs = worlds.reset(seeds=[4])
    for name in worlds.cameras:
        points = backproject(obs.depth[name][0], obs.intrinsics[name][0], obs.extrinsics[name][0])
        assert (np.abs(points[..., 2] - 0.0) < 0.005).mean() > 0.3, name
    worlds.close()


@needs_metaworld
def test_make_vec_spreads_it_over_a_worker() -> None:
    env = make_vec(PUSH, 1, num_workers=1, image_size=16)
    try:
        assert isinstance(env, VecEnv) and env.action_spec.dim == 4 and env.cameras == ("front", "wrist")
        obs = env.reset(seeds=[3000])
        assert obs.images["wrist"].shape == (1, 16, 16, 3) and obs.images["wrist"].any()
        assert env.tasks == ["push"]
        assert env.step_chunk(np.zeros((1, 2, 4), np.float32)).n_steps.tolist() == [2]
    finally:
        env.close()
