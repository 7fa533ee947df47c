"""The commanded pose: the suites' own rule inside the workspace, and what it does at the edges."""

import math
import re

import numpy as np
import pytest

from envs.backends.cpu_worlds import PROPRIO_NAMES
from envs.tabletop.control import ControlConfig, advance_command
from policies.franka.franka import TABLETOP
from policies.franka.limits import ARMS, FR3, MotionLimits
from policies.franka.reference import Reference, ReferenceConfig, opening_of, straight_down, yaw_of


def test_it_commands_what_the_suites_command():
    config, rng = ReferenceConfig(), np.random.default_rng(0)
    hand = np.array([0.5, 0.0, 0.2])
    reference, command = Reference(config, hand), hand[None].copy()
    for _ in range(200):
        action = rng.uniform(-1.5, 1.5, 4)
        command = advance_command(command, hand[None], np.clip(action, -1, 1)[None], ControlConfig())
        reference.move(np.clip(action[:3], -1, 1), hand)
        np.testing.assert_allclose(reference.command_3, command[0], atol=1e-12)
        hand = hand + 0.3 * (command[0] - hand)
    assert TABLETOP == PROPRIO_NAMES


def test_a_hand_outside_the_workspace_is_not_pulled_in_and_goes_no_further():
    reference = Reference(ReferenceConfig(), np.array([0.5, 0.0, 0.55]))
    high = np.array([0.5, 0.0, 0.55])
    np.testing.assert_allclose(reference.move(np.zeros(3), high), high)
    np.testing.assert_allclose(reference.move(np.array([0.0, 0.0, 1.0]), high), high)
    np.testing.assert_allclose(reference.move(np.array([0.0, 0.0, -1.0]), high), [0.5, 0.0, 0.52])


def test_what_is_not_finite_is_refused():
    reference = Reference(ReferenceConfig(), np.array([0.5, 0.0, 0.2]))
    for action, hand in (([np.nan, 0, 0], [0.5, 0, 0.2]), ([0, 0, 0], [0.5, np.inf, 0.2])):
        with pytest.raises(ValueError, match="finite"):
            reference.move(np.array(action), np.array(hand))


@pytest.mark.parametrize("yaw", [-math.pi / 2, 0.0, 0.4, 3.0])
def test_the_hand_points_down_in_its_yaw(yaw):
    rotation = straight_down(yaw)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(rotation[:, 2], [0, 0, -1])
    assert yaw_of(rotation) == pytest.approx(yaw)


def test_the_suites_orientation_is_a_quarter_turn():
    """`TabletopWorlds` holds its grip site at diag(1, -1, -1), and that is turned by -90 degrees against the flange."""
    site_in_flange = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(straight_down(-math.pi / 2) @ site_in_flange, np.diag([1.0, -1.0, -1.0]), atol=1e-12)


def test_the_opening_is_a_fraction():
    assert [opening_of(width, 0.08) for width in (-0.001, 0.0, 0.04, 0.09)] == [0.0, 0.0, 0.5, 1.0]


def test_limits_beyond_the_arm_are_refused_by_name():
    for name, arm in ARMS.items():
        MotionLimits().refuse_beyond(arm, name)
    for field, value in (("acceleration_m_s2", 9.1), ("speed_m_s", 0.0), ("gripper_n", 71.0), ("turn_rad_s", math.nan)):
        with pytest.raises(ValueError, match=re.escape(field)):
            MotionLimits(**{field: value}).refuse_beyond(FR3, "fr3")


def test_a_workspace_that_is_none_is_refused():
    with pytest.raises(ValueError, match="low_m"):
        ReferenceConfig(low_m=(0.3, 0.0, 0.5))
    with pytest.raises(ValueError, match="above 0"):
        ReferenceConfig(metres_per_action=0.0)
