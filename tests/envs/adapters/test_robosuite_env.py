"""robosuite's tasks through our contract: the expert, seeds, chunks, frames, workers."""

from __future__ import annotations

import gc
from importlib.util import find_spec

import numpy as np
import pytest

from bascule.catalogue import list_suites
from envs import make_vec
from envs.adapters.robosuite_env import RobosuiteWorlds, default_lift
from envs.adapters.robosuite_fast_step import LeanStep
from envs.adapters.robosuite_suites import SUITES
from envs.evaluation.evaluate import evaluate
from envs.experts.registry import make_expert
from envs.registry import all_suite_names, load_suite
from envs.sim.frustum_culling import Culling
from envs.sim.render_options import RenderOptions
from tests.envs.geometry import backproject
from vla.core.types import VecEnv

needs_robosuite = pytest.mark.skipif(find_spec("robosuite") is None, reason="the extra 'robosuite' is not installed")
LIFT = "robosuite-lift"


@pytest.fixture(scope="module")
def two():
    worlds = RobosuiteWorlds(SUITES[LIFT], 2, render=RenderOptions(image_size=32))
    yield worlds
    worlds.close()


def test_the_suites_are_listed_with_or_without_robosuite() -> None:
    assert set(SUITES) <= set(all_suite_names()) and load_suite(LIFT).tasks == ("lift",)
    assert set(SUITES) <= {row[0] for row in list_suites()[2]}
    for suite in SUITES.values():
        assert len(suite.train) >= 5 and not set(suite.train) & set(suite.heldout)
        assert suite.swapped not in (*suite.train, *suite.heldout)
    with pytest.raises(ValueError, match=LIFT):
        load_suite("robosuite-lif")


@needs_robosuite
def test_the_expert_lifts(two: RobosuiteWorlds) -> None:
    two.render_images = False
    report = evaluate(make_expert(LIFT, 2), two, range(3000, 3004), suite=LIFT)
    two.render_images = True
    assert report.successes == 4 and report.mean_steps < 60


@needs_robosuite
@pytest.mark.parametrize("suite", ["robosuite-stack", "robosuite-can", "robosuite-square", "robosuite-door"])
def test_the_expert_solves(suite: str) -> None:
    worlds = RobosuiteWorlds(SUITES[suite], 1, render=RenderOptions(image_size=16))
    worlds.render_images = False
    expert = make_expert(suite, 1)
    assert evaluate(expert, worlds, [3001], suite=suite).successes == 1
    worlds.close()


@needs_robosuite
def test_the_door_stays_shut_unless_its_handle_is_turned() -> None:
    worlds = RobosuiteWorlds(SUITES["robosuite-door"], 1, render=RenderOptions(image_size=16))
    worlds.render_images = False
    obs, expert = worlds.reset(seeds=[3000]), make_expert("robosuite-door", 1)
    latch_before_it_moved = 0.0
    while not worlds.over[0]:
        obs = worlds.step_chunk(expert.act(obs)).obs
        latch, hinge = obs.privileged[0, 12:14]
        if hinge < 0.05:
            latch_before_it_moved = max(latch_before_it_moved, latch)
    assert hinge > 0.3 and latch_before_it_moved > 1.0
    worlds.close()


@needs_robosuite
def test_a_seed_is_an_episode_and_leaves_numpys_generator_alone(two: RobosuiteWorlds) -> None:
    np.random.seed(5)
    expected = np.random.RandomState(5).rand(3)
    first = two.reset(seeds=[7, 8])
    frames = {name: image.copy() for name, image in first.images.items()}
    assert np.array_equal(np.random.rand(3), expected)
    other = two.reset(seeds=[8, 7])
    for k in (0, 1):
        assert np.array_equal(first.privileged[k], other.privileged[1 - k])
        assert np.array_equal(first.proprio[k], other.proprio[1 - k])
        assert first.instruction[k] == other.instruction[1 - k]
        for name in two.cameras:
            assert np.array_equal(frames[name][k], other.images[name][1 - k])
            assert not np.array_equal(frames[name][k], frames[name][1 - k])
    assert not np.array_equal(first.privileged[0], first.privileged[1])
    with pytest.raises(ValueError, match="unknown task .fly"):
        two.reset(seeds=[1, 2], tasks=["lift", "fly"])


@needs_robosuite
def test_a_chunk_is_its_single_steps_and_actions_mean_what_they_say(two: RobosuiteWorlds) -> None:
    two.render_images = False
    obs = two.reset(seeds=[3, 3])
    before = obs.proprio[0, :3].copy()
    chunk = np.zeros((2, 6, 7), np.float32)
    chunk[:, :, 1], chunk[:, :, 6] = 0.5, -1
    whole = two.step_chunk(chunk)
    moved = whole.obs.proprio[0, :3] - before
    # To the side only. Each step's goal is 2.5 cm from where the hand then is, and the hand has to get going first.
    assert 0.02 < moved[1] < 0.15 and abs(moved[0]) < 0.01 and abs(moved[2]) < 0.01
    assert whole.n_steps.tolist() == [6, 6] and not whole.terminated.any() and not whole.truncated.any()
    two.reset(seeds=[3, 3])
    for c in range(6):
        single = two.step_chunk(chunk[:, c : c + 1])
    assert np.allclose(single.obs.proprio, whole.obs.proprio, atol=1e-6)
    two.render_images = True


@needs_robosuite
def test_success_ends_inside_a_chunk_and_the_horizon_truncates(two: RobosuiteWorlds) -> None:
    two.render_images = False
    obs = two.reset(seeds=[3000, 3001])
    expert = make_expert(LIFT, 2)
    while not two.over[0]:
        action = expert.act(obs)
        action[1] = [0, 0, 0, 0, 0, 0, -1]
        result = two.step_chunk(np.repeat(action, 2, axis=1))
        obs = result.obs
    assert result.terminated.tolist() == [True, False] and result.reward.tolist() == [1, 0]
    assert result.info["success"].tolist() == [True, False]
    two.elapsed[1] = two.horizon - 1
    result = two.step_chunk(np.zeros((2, 4, 7), np.float32))
    assert result.n_steps.tolist() == [0, 1] and result.truncated.tolist() == [False, True]
    assert not result.terminated.any()
    two.render_images = True


@needs_robosuite
def test_frames_show_this_instant_and_robosuites_cameras() -> None:
    env, frames = default_lift(32)
    drawn = frames()
    theirs = env.step(np.zeros(7))[0]
    gc.collect()
    assert frames() - drawn == 2, "robosuite's own Lift draws both cameras at every step"
    env.sim._render_context_offscreen.gl_ctx.free()  # what a collected second context does to it
    env.step(np.zeros(7))
    with pytest.raises(RuntimeError, match="draws nothing"):
        frames()
    env.close()
    worlds = RobosuiteWorlds(SUITES[LIFT], 1, render=RenderOptions(image_size=32))
    obs = worlds.reset(seeds=[4])
    images = {name: image[0].astype(float) for name, image in obs.images.items()}
    # Another cube position and no mirrors, but the same view the right way up (robosuite's are upside down).
    upright = theirs["agentview_image"][::-1].astype(float)
    assert np.abs(images["front"] - upright).mean() < 20 < np.abs(images["front"] - upright[::-1]).mean()
    chunk = np.zeros((1, 8, 7), np.float32)
    chunk[:, :, 2] = 1
    after = worlds.step_chunk(chunk).obs
    assert all(np.abs(after.images[name][0] - images[name]).mean() > 1 for name in worlds.cameras)
    worlds.close()


@needs_robosuite
def test_depth_and_calibration_find_the_table() -> None:
    worlds = RobosuiteWorlds(SUITES[LIFT], 1, render=RenderOptions(image_size=32, depth=True, calibration=True))
    obs = worlds.reset(seeds=[4])
    for name in worlds.cameras:
        points = backproject(obs.depth[name][0], obs.intrinsics[name][0], obs.extrinsics[name][0])
        assert (np.abs(points[..., 2] - 0.8) < 0.005).mean() > 0.3, name
    worlds.close()


@needs_robosuite
def test_make_vec_spreads_it_over_a_worker() -> None:
    env = make_vec(LIFT, 1, num_workers=1, image_size=16)
    try:
        assert isinstance(env, VecEnv) and env.action_spec.dim == 7 and env.cameras == ("front", "wrist")
        obs = env.reset(seeds=[3000])
        assert obs.images["wrist"].shape == (1, 16, 16, 3) and obs.images["wrist"].any()
        assert obs.instruction[0] in SUITES[LIFT].train and env.alternative_instructions() == [SUITES[LIFT].swapped]
        assert env.step_chunk(np.zeros((1, 2, 7), np.float32)).n_steps.tolist() == [2]
    finally:
        env.close()


@needs_robosuite
def test_a_lean_step_is_robosuites_own_to_the_last_bit(two: RobosuiteWorlds) -> None:
    two.render_images = False
    rng, lean = np.random.default_rng(0), two._steps
    assert all(isinstance(step, LeanStep) for step in lean)
    two._steps = [lean[0], two._envs[1].step]
    try:
        for seed in (3, 4):  # a second episode: resets renew what the lean step has hold of
            two.reset(seeds=[seed, seed])
            for _ in range(6):
                action = rng.uniform(-1, 1, (1, 5, 7)).astype(np.float32)
                action[..., 2] -= 0.5  # down onto the table: contacts are in it
                two.step_chunk(np.repeat(action, 2, axis=0))
            states = [np.concatenate([env.sim.data.qpos, env.sim.data.qvel]) for env in two._envs]
            assert np.array_equal(*states) and two._envs[0].cur_time == two._envs[1].cur_time
    finally:
        two._steps, two.render_images = lean, True


@needs_robosuite
def test_what_is_left_out_of_a_picture_would_not_have_been_in_it(two: RobosuiteWorlds, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    two.reset(seeds=[5, 6])
    left_out, all_of_it = 0, lambda self, data, camera: np.ones(len(data.geom_xpos), bool)
    real = Culling.in_sight
    for _ in range(4):
        two.step_chunk(rng.uniform(-1, 1, (2, 6, 7)).astype(np.float32))
        culled = two.images.copy()
        _, model, data = two._scene(0)
        left_out += sum((~real(Culling(model), data, model.camera(name).id)).sum() for name in two._their_names)
        with monkeypatch.context() as patch:
            patch.setattr(Culling, "in_sight", all_of_it)
            two._render([0, 1])
        assert np.array_equal(two.images, culled)
    assert left_out > 4 * len(two._their_names) * 30, "most of the robot is out of sight, and was drawn"
