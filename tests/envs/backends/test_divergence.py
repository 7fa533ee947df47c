"""nan_guards: a simulation that blows up ends its episode, says so, and leaves every other world alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest

from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.backends.cpu_worlds import TabletopWorlds
from envs.evaluation.evaluate import evaluate
from envs.make import worlds_class
from envs.registry import load_suite
from envs.sim.divergence import diverged
from envs.sim.render_options import RenderOptions
from vla.core.types import ActionChunk, Observation, PolicySpec

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers inherit it
from cursed_worlds import CURSED, LAST_STEP, CursedWorlds  # noqa: E402

PICK = "tabletop-pick"
STEPS = np.random.default_rng(0).uniform(-1, 1, (3, 6, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def _log_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it is called


@pytest.fixture(scope="module")
def twins() -> tuple[TabletopWorlds, TabletopWorlds]:
    return blind(3), blind(3)


def blind(num_worlds: int) -> TabletopWorlds:
    worlds = TabletopWorlds(load_suite(PICK), num_worlds, render=RenderOptions(image_size=16))
    worlds.render_images = False
    return worlds


def test_mujoco_hides_a_divergence_and_we_do_not():
    """The reason for all this: without the check, the state after a divergence is finite and looks like any other."""
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><joint/><geom size='.1'/></body></worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_step(model, data)
    assert not diverged(data)
    data.qvel[0] = float("nan")
    mujoco.mj_step(model, data, 4)
    assert np.isfinite(data.qpos).all() and np.isfinite(data.qvel).all() and diverged(data)
    mujoco.mj_resetData(model, data)
    assert not diverged(data)
    data.qpos[0] = float("inf")
    assert diverged(data), "not stepped yet"


@pytest.mark.parametrize(("name", "value"), [("qvel", 1e9), ("qvel", float("nan")), ("qpos", float("inf"))])
def test_a_world_that_blows_up_is_truncated_and_flagged_and_the_others_never_notice(twins, name, value):
    hurt, twin = twins
    for one in (hurt, twin):
        one.reset(seeds=[1, 2, 3])
        one.step_chunk(STEPS)
    before = hurt.observation()
    getattr(hurt.data[1], name)[3] = value
    broken, whole = hurt.step_chunk(STEPS), twin.step_chunk(STEPS)
    assert broken.diverged.tolist() == broken.truncated.tolist() == [False, True, False]
    assert not broken.terminated.any() and not broken.info["success"].any() and not broken.reward.any()
    assert broken.n_steps.tolist() == [6, 1, 6] and not whole.diverged.any()
    # What is shown of the lost world was seen before it was lost (the hand's target has moved by one action).
    assert np.array_equal(broken.obs.proprio[1, :3], before.proprio[1, :3])
    assert np.isfinite(broken.obs.proprio).all() and np.isfinite(broken.obs.privileged).all()
    again = hurt.step_chunk(STEPS)
    twin.step_chunk(STEPS)
    assert again.n_steps.tolist() == [6, 0, 6] and not again.diverged.any() and not again.truncated.any()
    for one in (hurt, twin):
        one.reset(seeds=[9], env_ids=[1])
    mine, theirs = hurt.step_chunk(STEPS), twin.step_chunk(STEPS)
    assert mine.n_steps.tolist() == [6, 6, 6], "after a reset it plays as if nothing had been"
    for a, b in zip(hurt.data, twin.data, strict=True):
        assert np.array_equal(a.qpos, b.qpos) and np.array_equal(a.qvel, b.qvel)
    assert np.array_equal(mine.obs.privileged, theirs.obs.privileged)


def test_workers_report_it_and_an_evaluation_counts_it_as_a_failure():
    env = MujocoVecEnv(load_suite(PICK), CursedWorlds, 2, num_workers=1, render=RenderOptions(image_size=16))
    try:
        env.reset(seeds=[1, CURSED])
        pids, step = env.worker_pids, env.step_chunk(STEPS[:2])
        assert step.diverged.tolist() == step.truncated.tolist() == [False, True]
        assert step.n_steps.tolist() == [6, LAST_STEP] and not step.worker_restarted.any()
        env.set_rendering(False)
        report = evaluate(Still(), env, [CURSED - 1, CURSED, CURSED + 1])
        assert (report.episodes, report.successes, report.diverged) == (3, 0, 1)
        assert report.to_dict()["diverged"] == 1 and env.worker_pids == pids
    finally:
        env.close()


class Still:
    """A policy that holds the arm where it is."""

    spec = PolicySpec()

    def reset(self, env_ids=None) -> None: ...

    def act(self, obs: Observation) -> ActionChunk:
        return np.zeros((obs.batch_size, 30, 4), np.float32)


@pytest.mark.parametrize("suite", ["robosuite-lift", "metaworld-reach"])
def test_adapted_worlds_do_the_same(suite):
    if importlib.util.find_spec(suite.partition("-")[0]) is None:
        pytest.skip(f"needs {suite.partition('-')[0]}")
    chosen = load_suite(suite)
    worlds = worlds_class(chosen)(chosen, 2, render=RenderOptions(image_size=16))
    worlds.render_images = False
    chunk = np.zeros((2, 3, worlds.action_spec.dim), np.float32)
    worlds.reset(seeds=[1, 2])
    before = worlds.step_chunk(chunk)
    assert not before.diverged.any()
    worlds._scene(1)[2].qvel[3] = 1e9
    hurt = worlds.step_chunk(chunk)
    assert hurt.diverged.tolist() == hurt.truncated.tolist() == [False, True]
    assert hurt.n_steps.tolist() == [3, 1] and not hurt.terminated.any()
    assert np.array_equal(hurt.obs.proprio[1], before.obs.proprio[1])
    worlds.reset(seeds=[3], env_ids=[1])
    fresh = worlds.step_chunk(chunk)
    assert not fresh.diverged.any() and fresh.n_steps.tolist() == [3, 3]
    worlds.close()
