"""The way to a keyframe."""

import numpy as np
import pytest

from vla.model.heatmap.config import Motion
from vla.model.heatmap.motion import plan

MOTION = Motion(metres_per_action=0.03, speed=0.8, clearance_m=0.09, settle_steps=2, gripper_steps=6)


def way(hand, goal, *, lift=False, open_now=True, open_then=True, lead=(0, 0, 0), chunk=40):
    hand, goal = np.array(hand, float), np.array(goal, float)
    actions = plan(
        hand, hand + np.array(lead), goal, open_now=open_now, open_then=open_then, lift=lift, motion=MOTION,
        chunk_size=chunk,
    )  # fmt: skip
    return actions, hand + np.array(lead) + np.cumsum(0.03 * actions[:, :3], 0)


def test_it_arrives_and_stays_within_the_speed():
    actions, positions = way([0.5, 0, 0.25], [0.6, -0.1, 0.03], lead=(0.01, 0, 0))
    assert np.abs(actions[:, :3]).max() <= 0.8 + 1e-6
    np.testing.assert_allclose(positions[-1], [0.6, -0.1, 0.03], atol=1e-6)
    assert (actions[:, 3] == 1).all()


def test_with_a_lift_it_goes_up_across_and_down():
    """Nothing lower than the clearance above both ends is passed to the side of them."""
    _, positions = way([0.45, 0.1, 0.02], [0.6, -0.1, 0.05], lift=True)
    apart = np.minimum(*(np.linalg.norm(positions[:, :2] - end, axis=-1) for end in ([0.45, 0.1], [0.6, -0.1])))
    assert positions[apart > 1e-3, 2].min() == pytest.approx(0.14)
    np.testing.assert_allclose(positions[-1], [0.6, -0.1, 0.05], atol=1e-6)
    _, straight = way([0.45, 0.1, 0.02], [0.6, -0.1, 0.05])
    assert straight[:, 2].max() < 0.06


def test_the_gripper_moves_when_the_hand_has_settled_and_has_time():
    actions, _ = way([0.5, 0, 0.1], [0.5, 0, 0.04], open_then=False, chunk=12)
    arrived = np.flatnonzero(np.abs(actions[:, :3]).max(-1) > 0)[-1] + 1
    np.testing.assert_array_equal(actions[:, 3], [1.0] * (arrived + 2) + [-1.0] * (12 - arrived - 2))
    too_short, _ = way([0.5, 0, 0.1], [0.5, 0, 0.04], open_then=False, chunk=10)
    assert (too_short[:, 3] == 1).all()


def test_a_hand_that_is_there_only_moves_the_gripper():
    actions, _ = way([0.5, 0, 0.04], [0.502, 0, 0.04], open_now=False, open_then=True, chunk=8)
    assert np.abs(actions[:, :3]).max() == 0 and (actions[:, 3] == 1).all()


def test_a_hand_that_turns_moves_meanwhile_and_grips_when_it_has_turned():
    quarter, motion = np.tile([0.0, 0, 0.8], (8, 1)), MOTION
    here, there = np.array([0.5, 0, 0.1]), np.array([0.548, 0, 0.1])
    actions = plan(
        here, here, there, open_now=True, open_then=False, lift=False, motion=motion, chunk_size=20, turning=quarter
    )
    assert actions.shape == (20, 7) and np.flatnonzero(actions[:, 0]).tolist() == [0, 1]
    turning = np.flatnonzero(actions[:, 5])
    assert turning.tolist() == list(range(8)) and (actions[:, 3:5] == 0).all()
    assert np.flatnonzero(actions[:, 6] < 0)[0] == 8 + motion.settle_steps
    still = plan(
        here, here, here, open_now=True, open_then=False, lift=False, motion=motion, chunk_size=20, turning=quarter[:0]
    )
    assert (still[:, :6] == 0).all() and (still[:, 6] == -1).all()
