"""Demonstrations meet a policy by the names of their components, never by their places, and at its own rate."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.training.test_train import CONFIG, assert_bit_equal, demos, fresh, weights
from vla.data.feature_cache import encode_demos
from vla.data.fitting import aligned, check_demos
from vla.training.modulation import episode_queries
from vla.training.multi_robot import members_of, reorderings
from vla.training.train import train

SHORT = replace(CONFIG, steps=3, warmup_steps=1)


def shuffled(data):
    """The same recording with its components in another order, names and all. The orders are no mere exchanges."""
    action, state = [3, 0, 1, 2], [2, 0, 4, 1, 3]
    return replace(
        data,
        action=data.action[:, action],
        action_names=tuple(data.action_names[i] for i in action),
        proprio=data.proprio[:, state],
        proprio_names=tuple(data.proprio_names[i] for i in state),
        exact_proprio=data.proprio[:, state] + 1,
    )


def test_components_come_into_the_policys_order_with_their_names():
    data, vla = demos(), fresh()
    found, told = aligned(vla.processor, shuffled(data), name="two")
    assert np.array_equal(found.action, data.action) and found.action_names == data.action_names
    assert np.array_equal(found.proprio, data.proprio) and found.proprio_names == data.proprio_names
    assert np.array_equal(found.exact_proprio, data.proprio + 1)
    assert told[0] == (
        "the policy acts on dx, dy, dz, gripper, the dataset 'two' on gripper, dx, dy, dz: reordered by name"
    )
    assert reorderings(vla, {"one": data, "two": shuffled(data)}) == list(told) and len(told) == 2
    assert aligned(vla.processor, data) == (data, ())


def test_a_policy_learns_the_same_from_a_recording_in_another_order(tmp_path):
    learnt = []
    for data, out in ((demos(), "a"), (shuffled(demos()), "b")):
        vla = fresh(SHORT, demos())  # as one that --init names
        train(SHORT, vla, {"t7": data}, tmp_path / out)
        learnt.append(weights(vla))
    assert_bit_equal(*learnt)


def test_so_does_each_of_several_datasets_and_what_is_known():
    data, vla = demos(), fresh()
    parts = members_of(vla, {"one": data, "two": shuffled(data)})
    assert np.array_equal(parts["two"][1].action, data.action)
    vla.members = {"one": vla.processor, "two": vla.processor}
    parts = members_of(vla, {"one": data, "two": shuffled(data)})
    assert np.array_equal(parts["two"][1].proprio, data.proprio)
    mine, theirs = (episode_queries(vla.eval(), part)[0] for part in (data, shuffled(data)))
    assert torch.equal(mine, theirs)


def test_who_cannot_reorder_refuses():
    vla = fresh()
    for refuse in (check_demos, lambda processor, data: encode_demos(vla, data, processor=processor)):
        with pytest.raises(ValueError, match=r"on gripper, dx, dy, dz; .*: record them in the same order"):
            refuse(vla.processor, shuffled(demos()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"action_names": ("dx", "dy", "dz", "jaw")},
            r"acts on dx, dy, dz, gripper, the dataset 'it' on dx, dy, dz, jaw: not the same components",
        ),
        ({"proprio_names": tuple("abcdx")}, r"state a, b, c, d, e, the dataset 'it' reports a, b, c, d, x: other"),
        ({"fps": 50.0}, r"acts at 20 Hz, the rate of the dataset 'it' is 50 Hz"),
    ],
)
def test_foreign_components_and_another_rate_are_refused(tmp_path, change, message):
    data, vla = replace(demos(), **change), fresh()
    with pytest.raises(ValueError, match=message):
        train(SHORT, vla, {"it": data, "other": demos()}, tmp_path)
    with pytest.raises(ValueError):
        episode_queries(vla, data)
    assert not any(tmp_path.iterdir())


def test_what_is_not_said_is_not_held_against_a_recording():
    data, vla = demos(), fresh()
    for part in (
        replace(data, action_names=tuple(f"action_{i}" for i in range(4))),
        replace(data, fps=20.4),
        replace(data, action_names=tuple(f"{name}.pos" for name in data.action_names)),
    ):
        assert np.array_equal(aligned(vla.processor, part)[0].action, data.action)
