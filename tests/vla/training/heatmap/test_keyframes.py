"""Keyframes of hand-made trajectories."""

import numpy as np
import pytest

from vla.training.heatmap.keyframes import GRIPPING_FRAMES, keyframes, label, metres_per_action


def line(start, end, frames):
    return np.linspace(start, end, frames, endpoint=False)


def pick_and_place():
    """Over and down to a thing (close at 20), up (to 38), across and down to a place (open at 58), up."""
    home, thing, high, place = np.array([[0.5, 0, 0.25], [0.6, 0.1, 0.02], [0.6, 0.1, 0.2], [0.45, -0.1, 0.06]])
    above = np.array([*thing[:2], 0.15])
    over = np.array([*place[:2], 0.2])
    hand = np.concatenate(
        [line(home, above, 12), line(above, thing, 8), np.tile(thing, (6, 1)), line(thing, high, 12),
         line(high, over, 12), line(over, place, 8), np.tile(place, (3, 1)), line(place, over, 6)]
    )  # fmt: skip
    opened = np.ones(len(hand), bool)
    opened[20:58] = False
    return hand, opened


def test_keyframes_are_where_the_gripper_moves_and_where_it_ends():
    hand, opened = pick_and_place()
    assert keyframes(hand, opened) == [20, 58, len(hand) - 1]


def test_a_rest_far_from_any_grip_is_a_keyframe():
    a, b, c = np.array([[0.5, 0, 0.3], [0.6, 0, 0.1], [0.4, 0, 0.3]])
    hand = np.concatenate([line(a, b, 15), np.tile(b, (12, 1)), line(b, c, 15)])
    opened = np.ones(len(hand), bool)
    assert keyframes(hand, opened) == [15, len(hand) - 1]


def test_every_frame_is_labelled_with_the_keyframe_ahead():
    hand, opened = pick_and_place()
    labels = label(hand, opened)
    assert (labels.target_T[:21] == 20).all() and not labels.open_T[:21].any()
    assert (labels.target_T[21 : 21 + GRIPPING_FRAMES] == -1).all()
    assert (labels.target_T[21 + GRIPPING_FRAMES : 59] == 58).all() and labels.open_T[24:59].all()
    assert (labels.target_T[59 + GRIPPING_FRAMES : -1] == len(hand) - 1).all()
    assert labels.target_T[-1] == -1


def test_a_hand_that_comes_down_on_a_thing_lifts_one_that_slides_does_not():
    hand, opened = pick_and_place()
    labels = label(hand, opened)
    assert labels.lift_T[:8].all() and not labels.lift_T[13:21].any()
    low = np.concatenate([line([0.5, 0.0, 0.03], [0.6, 0.1, 0.03], 12), np.tile([0.6, 0.1, 0.03], (4, 1))])
    slid = np.ones(len(low), bool)
    slid[12:] = False
    assert not label(low, slid).lift_T.any()


def test_the_scale_of_actions_is_measured():
    """Also where the executed actions were disturbed, and cut at the fastest."""
    rng = np.random.default_rng(0)
    action = np.clip(rng.normal(0, 1.0, (400, 3)), -1, 1)
    executed = np.clip(action + rng.normal(0, 0.15, action.shape), -1, 1)
    episode = np.repeat([0, 1], 200)
    for played, tolerance in ((action, 1e-6), (executed, 0.1)):
        moved = np.concatenate([np.zeros((1, 3)), np.cumsum(0.03 * played, 0)[:-1]])
        moved[200:] += 5.0  # another episode begins elsewhere
        assert metres_per_action(moved, action, episode) == pytest.approx(0.03, rel=tolerance)
    with pytest.raises(ValueError, match="displace"):
        metres_per_action(rng.normal(size=(400, 3)), action, episode)


def test_a_hand_that_follows_late_is_measured_over_several_frames():
    """A hand that goes a third of the rest of the way at each frame."""
    action = np.repeat(np.random.default_rng(1).uniform(-1, 1, (20, 3)), 10, axis=0)
    command = np.concatenate([np.zeros((1, 3)), np.cumsum(0.03 * action, 0)[:-1]])
    hand = np.zeros_like(command)
    for t in range(1, len(hand)):
        hand[t] = hand[t - 1] + (command[t] - hand[t - 1]) / 3
    assert metres_per_action(hand, action, np.zeros(200, int), frames=6) == pytest.approx(0.03, rel=0.15)
