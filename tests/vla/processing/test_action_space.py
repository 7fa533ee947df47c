"""Relative, delta and summed actions: against slow references, there and back, and through a policy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import CAMERAS, WORDS, ToyTokenizer
from vla.core.config import decode, encode
from vla.processing.action_space import ActionSpace, action_space
from vla.processing.processor import Processor, ProcessorConfig, Stats

NAMES = ("elbow.pos", "wrist.pos", "dx", "gripper.pos")
STATE = ("gripper.pos", "wrist", "elbow", "force")
SPACE = ActionSpace(("relative", "delta", "summed", "recorded"), (2, 1, -1, -1))


def chunks(seed=0, count=6, length=5):
    """Joints in degrees, with states near where the chunks begin."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-90, 90, (count, 1, 4)) + rng.normal(size=(count, length, 4)).cumsum(1)
    state = np.stack([action[:, 0, 3], action[:, 0, 1], action[:, 0, 0], rng.normal(size=count)], 1)
    return action, state + rng.normal(size=state.shape)


def slowly(action, state):
    """The predicted chunks, number by number."""
    out = np.zeros_like(action)
    for b in range(len(action)):
        for t in range(action.shape[1]):
            out[b, t, 0] = action[b, t, 0] - state[b, 2]
            out[b, t, 1] = action[b, t, 1] - (state[b, 1] if t == 0 else action[b, t - 1, 1])
            out[b, t, 2] = sum(action[b, : t + 1, 2])
            out[b, t, 3] = action[b, t, 3]
    return out


def test_each_kind_is_what_it_says_and_comes_back():
    action, state = chunks()
    predicted = SPACE.to_predicted(action, state)
    np.testing.assert_allclose(predicted, slowly(action, state), atol=1e-9)
    np.testing.assert_allclose(SPACE.to_recorded(predicted, state), action, atol=1e-9)
    tensor = torch.from_numpy(action)
    assert torch.equal(SPACE.to_predicted(tensor, state), torch.from_numpy(predicted))
    assert torch.equal(tensor, torch.from_numpy(action))  # left as it was


def test_the_first_actions_need_no_later_ones():
    action, state = chunks()
    whole = SPACE.to_recorded(action, state)
    np.testing.assert_allclose(SPACE.to_recorded(action[:, :2], state), whole[:, :2])


def processor(space, stats, low=(-500.0,) * 4, high=(500.0,) * 4):
    config = ProcessorConfig(CAMERAS, 4, NAMES, action_low=low, action_high=high, action_space=space)
    return Processor(config, stats, ToyTokenizer(WORDS))


def stats_of(action, state, space):
    recorded = Stats.from_arrays(state, action[:, 0])
    return space.stats(recorded, (action, np.ones(action.shape[:2], np.float32), state))


def test_normalised_actions_of_a_policy_come_back_whatever_the_robot_is_at():
    action, state = chunks(count=200)
    reads = processor(SPACE, stats_of(action, state, SPACE))
    assert decode(ProcessorConfig, encode(reads.config)) == reads.config
    normal = reads.normalise_action(action, state)
    assert np.abs(normal[..., :3]).max() < 3  # of the range of what is predicted, not of where the robot was
    span = np.ptp(action, axis=(0, 1))
    assert (np.abs(reads.unnormalise_action(normal, state) - action) / span).max() < 1e-6
    wide = reads.unnormalise_action(reads.normalise_action(torch.from_numpy(action), state), state)
    assert (np.abs(wide.numpy() - action) / span).max() < 1e-6
    moved = reads.unnormalise_action(normal, state + 7)  # the same decision somewhere else
    np.testing.assert_allclose(moved[..., :2], action[..., :2] + 7, atol=1e-3)
    np.testing.assert_allclose(moved[..., 2:], action[..., 2:], atol=1e-3)


def test_what_leaves_stays_within_the_recorded_bounds():
    action, state = chunks(count=50)
    reads = processor(SPACE, stats_of(action, state, SPACE), low=(-10.0,) * 4, high=(10.0,) * 4)
    out = reads.unnormalise_action(reads.normalise_action(action, state), state)
    np.testing.assert_allclose(out, action.clip(-10, 10), atol=1e-3)


def test_components_that_stay_as_recorded_keep_their_statistics():
    action, state = chunks(count=50)
    mask = np.ones(action.shape[:2], np.float32)
    mask[25:, 2:] = 0
    recorded = Stats.from_arrays(state, action[:, 0])
    found = SPACE.stats(recorded, (action, mask, state))
    assert found.action.q99[3] == recorded.action.q99[3] and found.proprio == recorded.proprio
    inside = slowly(action, state)[mask > 0]
    np.testing.assert_allclose(found.action.max[:3], inside[:, :3].max(0))


def test_a_policy_whose_state_is_not_told_is_refused():
    action, state = chunks(count=50)
    reads = processor(SPACE, stats_of(action, state, SPACE))
    for method in (reads.normalise_action, reads.unnormalise_action):
        with pytest.raises(ValueError, match="relative to the state"):
            method(action.astype(np.float32))
    with pytest.raises(ValueError, match="needs action_low and action_high"):
        Processor(replace(reads.config, action_low=None), reads.stats, ToyTokenizer(WORDS))


def test_grippers_switches_and_displacements_go_by_their_names():
    no, switches = (False,) * 4, (True, False, False, False)
    assert action_space(("relative",), NAMES, STATE, no) == replace(
        SPACE, kinds=("relative", "relative", "summed", "recorded")
    )
    assert action_space(("delta",), NAMES, STATE, switches).kinds == ("recorded", "delta", "recorded", "recorded")
    single = action_space(("recorded", "gripper.pos=relative"), NAMES, STATE, no)
    assert single == ActionSpace(("recorded", "recorded", "recorded", "relative"), (-1, -1, -1, 0))
    assert action_space((), NAMES, STATE, no) is None and action_space(("recorded",), NAMES, None, no) is None
    assert action_space(("delta",), ("dx", "delta_z", "gripper"), None, (False,) * 3) is None


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (("relativ",), "did you mean 'relative'"), (("relative", "elbow=delta"), "did you mean 'elbow.pos'"),
        (("relative", "delta"), "must come first"), (("relative", "shoulder=delta"), "unknown action component"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(wanted, told):
    with pytest.raises(ValueError, match=told):
        action_space(wanted, NAMES, STATE, (False,) * 4)


def test_positions_that_the_state_does_not_tell_cannot_be_relative():
    with pytest.raises(ValueError, match=r"the state has no 'elbow.pos'.*give elbow.pos=recorded"):
        action_space(("relative",), NAMES, ("wrist",), (False,) * 4)
    assert action_space(("relative", "elbow.pos=recorded"), NAMES, ("wrist",), (False,) * 4).kinds[0] == "recorded"
