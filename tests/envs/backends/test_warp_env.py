"""The Warp backend on Warp's CPU device, beside the CPU backend: same motion, same grasp, same images, same contract.

Warp compiles its kernels once (about a minute) and keeps them in its cache: $WARP_CACHE_PATH, or the user's.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest

from envs import make_vec
from envs.backends.cpu_worlds import TabletopWorlds
from envs.experts.registry import make_expert
from envs.make import episode_source
from envs.perturb.perturbation import Perturbation
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from envs.tabletop.suites import suite_names
from vla.core.types import VecEnv

pytest.importorskip("mujoco_warp", reason="the warp extra is not installed")
torch = pytest.importorskip("torch")

PICK = "tabletop-pick"
SEEDS = (101, 103)  # a can and a cube: nothing in them rolls
# float32 beside float64, and a contact solver that stops elsewhere. Measured over 100 control steps: 5e-7 rad until the
# fingers touch, then 1.4e-3 rad, objects 1.6 mm, slip 0.25 mm.
FREE_ARM_RAD, ARM_RAD, OBJECT_M, SLIP_M = 1e-5, 5e-3, 4e-3, 1e-3
# Of 255. Measured 0.15 to 0.21 for the same state; 1.3 in the wrist camera when a held object is 1 mm elsewhere.
SAME_STATE, MOVED_STATE, DEPTH_MEDIAN_M = 0.5, 2.5, 3e-4


def warp_env(n=2, suite=PICK, **options):
    return make_vec(suite, n, backend="warp", device="cpu", **options)


@pytest.fixture(scope="module")
def env():
    made = warp_env(depth=True, calibration=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def cpu():
    made = TabletopWorlds(load_suite(PICK), 2, render=RenderOptions(depth=True, calibration=True))
    yield made
    made.close()


def play_both(cpu, env, steps):
    """The scripted expert's actions in both backends: approach, grasp, lift, hold. The expert sees the CPU worlds;
    episodes are kept going after success. -> trajectories (steps, worlds, ...), success (backend, world), observations
    at both ends (CPU's, Warp's)."""
    start = copy.deepcopy(cpu.reset(seeds=SEEDS)), env.reset(seeds=SEEDS)
    expert = make_expert(PICK, 2)
    rows = {name: [] for name in ("arm", "arm_warp", "objects", "objects_warp", "grip", "grip_warp")}
    success = np.zeros((2, 2), bool)
    for step in range(steps):
        action = expert.act(cpu.observation())
        cpu.render_images = step == steps - 1
        env.set_rendering(step == steps - 1)
        for k, worlds in enumerate((cpu, env)):
            result = worlds.step_chunk(action)
            success[k] |= result.info["success"]
            worlds.over[:] = False
        rows["arm"].append([data.qpos[cpu.index.arm_qpos] for data in cpu.data])
        rows["arm_warp"].append(env.sim.qpos[:, :7].numpy().copy())
        rows["objects"].append(cpu.state.objects.copy())
        rows["objects_warp"].append(env.state.objects.numpy().copy())
        rows["grip"].append(cpu.state.grip.copy())
        rows["grip_warp"].append(env.state.grip.numpy().copy())
    end = copy.deepcopy(cpu.observation()), env.observation()
    return {name: np.array(values) for name, values in rows.items()}, success, start, end


@pytest.fixture(scope="module")
def both(env, cpu):
    return play_both(cpu, env, 40)


def check_motion(rows, active):
    arm = np.abs(rows["arm"] - rows["arm_warp"]).max((1, 2))
    assert arm[:8].max() < FREE_ARM_RAD and arm.max() < ARM_RAD
    away = np.linalg.norm(rows["objects"] - rows["objects_warp"], axis=-1)[:, active]
    assert away.max() < OBJECT_M
    assert (rows["objects"][-1] - rows["objects"][0])[active][:, 2].max() > 0.08  # something was lifted


def check_slip(rows, target):
    slips = []
    for suffix in ("", "_warp"):
        held = rows["objects" + suffix][:, np.arange(2), target] - rows["grip" + suffix]
        slips.append(np.linalg.norm(held[-1] - held[25], axis=-1))  # by then it is up
    assert np.abs(slips[0] - slips[1]).max() < SLIP_M and np.max(slips) < 0.006


def test_the_same_actions_move_both_backends_alike(both, cpu):
    rows, _, (here, there), _ = both
    assert here.instruction == there.instruction
    assert np.abs(here.proprio - there.proprio).max() < 1e-6
    assert np.abs(here.privileged - there.privileged).max() < 1e-6
    check_motion(rows, cpu.state.active)


def test_the_grasp_succeeds_on_both_with_the_same_slip(both, cpu):
    rows, success, _, _ = both
    assert success.all()
    check_slip(rows, cpu.state.goal_object[:, 0])


@pytest.mark.slow
def test_both_backends_agree_for_five_seconds(cpu, env):
    rows, success, _, _ = play_both(cpu, env, 100)
    assert success.all()
    check_motion(rows, cpu.state.active)
    check_slip(rows, cpu.state.goal_object[:, 0])


def test_images_depth_and_calibration_agree(both, env):
    for (here, there), bound in zip(both[2:], (SAME_STATE, MOVED_STATE), strict=True):
        assert list(here.images) == list(there.images) == list(env.cameras)
        for name in env.cameras:
            image, traced = here.images[name].astype(int), there.images[name].astype(int)
            assert there.images[name].dtype == np.uint8 and traced.shape == (2, 84, 84, 3)
            assert image.std() > 10 and np.abs(image - traced).mean() < bound
            assert np.median(np.abs(here.depth[name] - there.depth[name])) < DEPTH_MEDIAN_M
            assert np.allclose(here.intrinsics[name], there.intrinsics[name])
            assert np.abs(here.extrinsics[name] - there.extrinsics[name]).max() < 5e-3


def test_a_reset_touches_only_its_worlds(env):
    env.set_rendering(False)
    rng = np.random.default_rng(0)
    first, then = rng.uniform(-1, 1, (2, 2, 2, 4)).astype(np.float32)
    ends = []
    for interrupted in (False, True):
        env.reset(seeds=[3, 4])
        env.step_chunk(first)
        before = env.sim.qpos.clone(), env.sim.qvel.clone(), env.observation()
        if interrupted:
            after = env.reset(seeds=[9], env_ids=[1])
            assert torch.equal(env.sim.qpos[0], before[0][0]) and torch.equal(env.sim.qvel[0], before[1][0])
            assert np.array_equal(after.proprio[0], before[2].proprio[0])
            assert not np.array_equal(after.proprio[1], before[2].proprio[1])
            assert env.elapsed.tolist() == [2, 0]
        env.step_chunk(then)
        ends.append(env.sim.qpos.clone())
    env.set_rendering(True)
    assert torch.equal(ends[0][0], ends[1][0])  # bit by bit, solver warm start included
    assert not torch.equal(ends[0][1], ends[1][1])


def test_a_world_that_is_over_stands_still(env):
    env.set_rendering(False)
    env.reset(seeds=[3, 4])
    env.over[0] = True
    before = env.sim.qpos.clone()
    result = env.step_chunk(np.ones((2, 2, 4), np.float32))
    env.set_rendering(True)
    assert result.n_steps.tolist() == [0, 2] and torch.equal(env.sim.qpos[0], before[0])
    assert not torch.equal(env.sim.qpos[1], before[1])


def test_the_time_limit_truncates(env):
    env.set_rendering(False)
    env.reset(seeds=[3, 4])
    env.elapsed[:] = env.horizon - 1
    result = env.step_chunk(np.zeros((2, 4, 4), np.float32))
    env.set_rendering(True)
    assert result.truncated.all() and not result.terminated.any() and result.n_steps.tolist() == [1, 1]


def test_a_world_without_a_finite_state_is_reset_and_counted(env):
    env.set_rendering(False)
    env.reset(seeds=[3, 4])
    start, count = env.sim.qpos.clone(), env.num_diverged
    env.sim.qpos[1, 0] = float("nan")
    result = env.step_chunk(np.zeros((2, 2, 4), np.float32))
    env.set_rendering(True)
    assert result.diverged.tolist() == [False, True] and env.num_diverged == count + 1
    assert result.truncated.tolist() == [False, True] and not result.terminated.any()
    assert result.n_steps.tolist() == [2, 1] and not result.info["success"].any()
    assert torch.equal(env.sim.qpos[1], start[1]) and torch.isfinite(env.sim.qvel).all()
    assert np.isfinite(result.obs.proprio).all() and np.isfinite(result.obs.privileged).all()


def test_dropped_contacts_are_reported():
    tight = warp_env(nconmax=3, image_size=8)
    tight.set_rendering(False)
    tight.reset(seeds=[3, 4])
    with pytest.warns(RuntimeWarning, match=r"dropped contacts: \d+ per world.*room for 3.*nconmax=\d+"):
        result = tight.step_chunk(np.zeros((2, 1, 4), np.float32))
    assert result.info["overflow"].all() and tight.num_overflows == 1


def test_enough_room_is_silent(env):
    env.set_rendering(False)
    env.reset(seeds=[3, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = env.step_chunk(np.zeros((2, 1, 4), np.float32))
    env.set_rendering(True)
    assert not result.info["overflow"].any()


def test_tensors_share_the_devices_memory(env):
    obs = env.reset(seeds=[3, 4])
    tensors = env.observation_tensors()
    assert env.sim.qpos.data_ptr() == env.sim.data.qpos.ptr
    assert tensors.images["front"].data_ptr() == env._cameras._rgb.ptr
    for name in env.cameras:
        assert np.array_equal(tensors.images[name].numpy(), obs.images[name])
    assert not np.shares_memory(tensors.images["front"].numpy(), obs.images["front"])  # safe to keep
    before = obs.images["front"].copy()
    env.step_chunk(np.tile(np.array([1, 0, 0, -1], np.float32), (2, 2, 1)))
    assert np.array_equal(obs.images["front"], before)
    assert not np.array_equal(tensors.images["front"].numpy(), before)  # a view shows what is drawn next


def test_the_contract(env):
    assert isinstance(env, VecEnv)
    obs = env.reset(seeds=[5, 5])
    assert np.array_equal(obs.privileged[0], obs.privileged[1]) and obs.instruction[0] == obs.instruction[1]
    assert env.alternative_instructions()[0] != obs.instruction[0]
    for chunk in (np.zeros((2, 8, 3)), np.zeros((3, 8, 4)), np.full((2, 1, 4), np.nan)):
        with pytest.raises(ValueError, match="action chunk"):
            env.step_chunk(chunk)
    with pytest.raises(ValueError, match="one seed per world"):
        env.reset(seeds=[1])


def test_a_perturbed_world_is_the_same_on_both():
    perturb = Perturbation(camera=1.0, light=1.0, robot=0.5, layout=1.0, noise=0.3)
    theirs = warp_env(perturb=perturb, calibration=True).reset(seeds=[3, 4])
    worlds = TabletopWorlds(load_suite(PICK), 2, source=episode_source(perturb), render=RenderOptions(calibration=True))
    ours = worlds.reset(seeds=[3, 4])
    worlds.close()
    assert np.abs(ours.proprio - theirs.proprio).max() < 1e-6  # noise included
    for name, image in ours.images.items():
        assert np.abs(image.astype(int) - theirs.images[name]).mean() < SAME_STATE
        assert np.abs(ours.extrinsics[name] - theirs.extrinsics[name]).max() < 1e-5
        assert np.abs(ours.intrinsics[name] - theirs.intrinsics[name]).max() < 1e-3


def test_the_benchmark_refuses_to_measure_what_is_wrong(env):
    from bascule.bench.simulation_warp import _check_images
    from bascule.commands.measuring.bench import Bench

    assert all(row["value"] < SAME_STATE for row in _check_images(env, PICK, "here"))
    lamp = env._cameras.fields["headlight"]
    before = lamp.clone()
    lamp.zero_()
    with pytest.raises(RuntimeError, match="correctness check failed"):
        _check_images(env, PICK, "here")
    lamp.copy_(before)
    with pytest.raises(ValueError, match="--backend warp"):
        Bench("model", worlds=(2,)).run()


def test_what_cannot_be_built_is_said():
    with pytest.raises(ValueError, match="backend"):
        make_vec(PICK, 1, backend="wrap")
    with pytest.raises(ValueError, match="CPU backend only"):
        make_vec("robosuite-lift", 1, backend="warp", device="cpu")
    with pytest.raises(ValueError, match="is for backend 'warp'"):
        make_vec(PICK, 1, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("suite", suite_names())
def test_the_expert_solves_every_suite_here_too(suite):
    env = warp_env(4, suite)
    env.set_rendering(False)
    expert = make_expert(suite, 4)
    obs = env.reset(seeds=range(100, 104))
    success = np.zeros(4, bool)
    while not env.over.all():
        result = env.step_chunk(expert.act(obs))
        success |= result.info["success"]
        assert not result.info["overflow"].any() and not result.diverged.any()
        obs = result.obs
    assert success.sum() >= 3
