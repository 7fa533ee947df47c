"""Cameras give on request: metric depth, calibration, frames of earlier decisions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from envs import make_vec
from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.backends.cpu_worlds import TabletopWorlds
from envs.make import episode_source
from envs.perturb.perturbation import Perturbation
from envs.registry import load_suite
from envs.sim.cameras import FrameHistory
from envs.sim.render_options import RenderOptions
from tests.envs.geometry import backproject
from vla.core.types import Observation

SUITE, SEEDS = "tabletop-pick", [100, 101, 103]


@pytest.fixture(scope="module")
def env() -> Iterator[MujocoVecEnv]:
    env = make_vec(SUITE, 3, num_workers=2, image_size=168, depth=True, calibration=True, history=2)
    yield env  # type: ignore[misc]
    env.close()


def points(obs: Observation, camera: str, world: int) -> np.ndarray:
    assert obs.depth and obs.intrinsics and obs.extrinsics
    return backproject(obs.depth[camera][world], obs.intrinsics[camera][world], obs.extrinsics[camera][world])


def assert_table(points_HW3: np.ndarray) -> None:
    """Most of the picture is the table's top, at height 0 within a tenth of a millimetre."""
    off = np.abs(points_HW3[..., 2])
    assert (off < 0.01).mean() > 0.2 and np.percentile(off[off < 0.01], 95) < 0.0001


def test_depth_pixels_of_an_object_lie_on_it(env: MujocoVecEnv) -> None:
    worlds = TabletopWorlds(load_suite(SUITE), 3)
    worlds.render_images = False
    worlds.reset(seeds=SEEDS)
    obs = env.reset(seeds=SEEDS)
    checked = 0
    for i in range(3):
        for camera in obs.images:
            seen = points(obs, camera, i)
            assert_table(seen)
            for slot in worlds.episodes[i].slots:
                centre, top = worlds.state.objects[i, slot], 2 * worlds.state.rest_height[slot]
                hit = (np.linalg.norm(seen[..., :2] - centre[:2], axis=-1) < 0.006) & (seen[..., 2] > 0.005)
                hit &= seen[..., 2] < 0.07  # the hand may be in between
                if hit.sum() >= 3:
                    # A pixel at the object's edge may see its side; one in the middle of its top cannot.
                    assert abs(float(np.median(seen[..., 2][hit])) - top) < 0.001
                    checked += 1
    assert checked >= 6
    worlds.close()


def test_depth_is_float_metres_and_moves_with_the_camera(env: MujocoVecEnv) -> None:
    before = env.reset(seeds=SEEDS)
    after = env.step_chunk(np.tile(np.array([0, 0, -1, 1], np.float32), (3, 6, 1))).obs
    for camera in before.images:
        assert before.depth[camera].dtype == np.float32 and before.depth[camera].shape == (3, 168, 168)
        assert before.depth[camera].min() > 0.01 and np.isfinite(before.depth[camera]).all()
    assert np.array_equal(before.extrinsics["front"], after.extrinsics["front"])
    down = before.extrinsics["wrist"][:, 2, 3] - after.extrinsics["wrist"][:, 2, 3]
    assert (down > 0.03).all()  # the wrist camera went down with the hand ...
    fingers = before.proprio[:, 2] - after.proprio[:, 2]
    assert np.abs(down - fingers).max() < 0.01


def test_calibration_projects_the_hand_where_it_is_seen(env: MujocoVecEnv) -> None:
    obs = env.reset(seeds=SEEDS)
    for i in range(3):
        world_from_camera = obs.extrinsics["front"][i].astype(float)
        assert np.allclose(world_from_camera[:3, :3] @ world_from_camera[:3, :3].T, np.eye(3), atol=1e-6)
        assert np.linalg.det(world_from_camera[:3, :3]) == pytest.approx(1.0, abs=1e-6)
        at = np.linalg.inv(world_from_camera) @ np.array([*obs.proprio[i, :3], 1.0])
        column, row, depth = obs.intrinsics["front"][i] @ at[:3]
        r, c = int(row / depth), int(column / depth)
        # Something of the hand is at the grip point's pixel: nearer than the table behind it.
        assert obs.depth["front"][i, r, c] < depth + 0.05


def test_history_is_the_frames_of_the_decisions_before(env: MujocoVecEnv) -> None:
    chunk = np.tile(np.array([0, 0, -0.5, 1], np.float32), (3, 4, 1))
    first = env.reset(seeds=SEEDS)
    for camera in first.images:
        assert first.history[camera].shape == (3, 2, 168, 168, 3)
        assert np.array_equal(first.history[camera], np.repeat(first.images[camera][:, None], 2, axis=1))
    second = env.step_chunk(chunk).obs
    third = env.step_chunk(chunk).obs
    for camera in first.images:
        assert np.array_equal(third.history[camera][:, 0], first.images[camera])
        assert np.array_equal(third.history[camera][:, 1], second.images[camera])
    fresh = env.reset(seeds=[7], env_ids=[1])  # a new episode does not remember the old one
    assert np.array_equal(fresh.history["front"][1, 0], fresh.images["front"][1])
    assert np.array_equal(fresh.history["front"][0], third.history["front"][0])
    some = third.select([2, 0])
    assert np.array_equal(some.history["wrist"], third.history["wrist"][[2, 0]])
    assert np.array_equal(some.depth["wrist"], third.depth["wrist"][[2, 0]])
    assert np.array_equal(some.extrinsics["wrist"], third.extrinsics["wrist"][[2, 0]])


def test_nothing_is_given_unasked() -> None:
    worlds = TabletopWorlds(load_suite(SUITE), 1, render=RenderOptions(image_size=32))
    obs = worlds.reset(seeds=[1])
    assert obs.depth is obs.intrinsics is obs.extrinsics is obs.history is None
    worlds.close()
    with pytest.raises(ValueError, match="history"):
        FrameHistory(-1)


def test_calibration_follows_a_perturbed_camera() -> None:
    moved = TabletopWorlds(
        load_suite(SUITE),
        2,
        source=episode_source(Perturbation(camera=1.0)),
        render=RenderOptions(image_size=168, depth=True, calibration=True),
    )
    obs = moved.reset(seeds=[100, 101])
    plain = TabletopWorlds(load_suite(SUITE), 2, render=RenderOptions(image_size=32, calibration=True))
    assert np.abs(obs.extrinsics["front"] - plain.reset(seeds=[100, 101]).extrinsics["front"]).max() > 0.05
    for i in range(2):
        for camera in obs.images:
            seen = points(obs, camera, i)
            assert_table(seen)
    moved.close(), plain.close()
