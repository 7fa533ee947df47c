"""Orientations in bins, and turning from one to another."""

import numpy as np
import pytest

from vla.model.heatmap.rotation import (
    BINS,
    WIDTH_RAD,
    angles_of,
    bins_of,
    matrices,
    middles,
    turn_of,
    turns,
    vector_of,
)


def about(axis, angle):
    """Rodrigues: the rotation about an axis."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def random_turns(count=200):
    return matrices(np.random.default_rng(0).normal(size=(count, 4)))


def test_quaternions_are_rotations_about_their_axis():
    rng = np.random.default_rng(1)
    for axis, angle in zip(rng.normal(size=(20, 3)), rng.uniform(-3, 3, 20), strict=True):
        quat = np.array([np.cos(angle / 2), *(np.sin(angle / 2) * axis / np.linalg.norm(axis))])
        np.testing.assert_allclose(matrices(2 * quat[None])[0], about(axis, angle), atol=1e-12)


def test_angles_are_those_of_three_turns_in_order():
    """First about x, then y, then z, each fixed; and back, also where the hand points along x."""
    angles = np.random.default_rng(2).uniform(-1.5, 1.5, (50, 3))
    for one, turn in zip(angles, turn_of(angles), strict=True):
        wanted = about([0, 0, 1], one[2]) @ about([0, 1, 0], one[1]) @ about([1, 0, 0], one[0])
        np.testing.assert_allclose(turn, wanted, atol=1e-12)
    every = np.concatenate([random_turns(), turn_of(np.array([[0.3, np.pi / 2, 1.0], [2.0, -np.pi / 2, 0.1]]))])
    np.testing.assert_allclose(turn_of(angles_of(every)), every, atol=1e-7)


def test_a_scene_turned_about_the_vertical_turns_the_yaw_alone():
    before = angles_of(random_turns())
    after = angles_of(about([0, 0, 1], 0.7) @ random_turns())
    np.testing.assert_allclose(after[:, :2], before[:, :2], atol=1e-9)
    np.testing.assert_allclose(np.exp(1j * (after[:, 2] - before[:, 2])), np.exp(0.7j), atol=1e-9)


def test_a_bin_is_within_two_and_a_half_degrees_and_wraps():
    angles = np.random.default_rng(3).uniform(-2 * np.pi, 2 * np.pi, (300, 3))
    bins = bins_of(angles)
    assert bins.min() == 0 and bins.max() == BINS - 1
    apart = np.angle(np.exp(1j * (middles(bins) - angles)))
    assert np.abs(apart).max() <= np.deg2rad(2.5) + 1e-9
    assert bins_of(np.array([[np.pi, -np.pi, 0.0]])).tolist() == [[36, 36, 0]]


def test_the_vector_of_a_rotation_gives_it_back():
    for turn in [*random_turns(), about([1, 2, 0], np.pi), about([0, 0, 1], 1e-8), np.eye(3)]:
        way = vector_of(turn)
        angle = np.linalg.norm(way)
        assert angle <= np.pi + 1e-9
        np.testing.assert_allclose(about(way, angle) if angle > 0 else np.eye(3), turn, atol=1e-6)


@pytest.mark.parametrize("angle", [0.06, 0.9, 3.0])
def test_a_hand_turns_the_short_way_within_its_speed(angle):
    now = random_turns()[0]
    goal = about([1, -2, 0.5], angle) @ now
    actions = turns(now, goal, radians_per_action=0.2, speed=0.8, most=99)
    assert len(actions) == np.ceil(angle / 0.16) and np.linalg.norm(actions, axis=1).max() <= 0.8 + 1e-9
    for action in actions:
        now = about(action, 0.2 * np.linalg.norm(action)) @ now
    np.testing.assert_allclose(now, goal, atol=1e-9)
    assert len(turns(now, goal, radians_per_action=0.2, speed=0.8, most=99)) == 0
    few = turns(random_turns()[0], goal, radians_per_action=0.2, speed=0.8, most=3)
    assert len(few) == min(3, len(actions)) and np.allclose(few, actions[: len(few)])
    assert len(turns(about([0, 0, 1], 0.4 * WIDTH_RAD), np.eye(3), radians_per_action=0.2, speed=1, most=9)) == 0
