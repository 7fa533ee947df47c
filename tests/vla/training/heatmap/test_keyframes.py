"""Keyframes of hand-made trajectories."""

import numpy as np
import pytest

from vla.training.heatmap.keyframes import GRIPPING_FRAMES, keyframes, label, metres_per_action, radians_per_action


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


def test_nothing_is_ahead_where_the_hand_has_come_to_rest_at_the_end():
    hand, opened = pick_and_place()
    labels = label(hand, opened)
    assert np.flatnonzero(labels.over_T).tolist() == [len(hand) - 1]
    rested = np.concatenate([hand, np.tile(hand[-1], (9, 1))])
    labels = label(rested, np.append(opened, np.ones(9, bool)))
    assert np.flatnonzero(labels.over_T).tolist() == list(range(len(hand) - 1, len(rested)))
    assert (labels.target_T[labels.over_T] == -1).all() and labels.open_T[-1] and not labels.lift_T[-1]


def test_the_scale_of_rotations_is_measured_where_there_are_any():
    """About a slanted axis, also where the hand follows late."""
    told = np.zeros((60, 3))
    told[5:40] = np.array([0.3, -0.2, 0.4])
    angle = 0.15 * np.cumsum(np.roll(told, 2, 0), 0)
    turn = np.array([_about(row) for row in angle])
    scale = radians_per_action(turn, told, np.zeros(60, np.int64), frames=6, otherwise=0.5)
    assert scale == pytest.approx(0.15, rel=0.02)
    assert radians_per_action(turn, 0 * told, np.zeros(60, np.int64), frames=6, otherwise=0.5) == 0.5


def _about(vector):
    angle = np.linalg.norm(vector)
    x, y, z = vector / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
