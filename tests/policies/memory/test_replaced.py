"""A policy behind the server is not replaced by one that connected clients would have to be told more of."""

from dataclasses import replace

import pytest

from policies.serving.policy_slot import PolicySlot
from tests.policies.serving.test_served import Constant, checkpoint


@pytest.mark.parametrize("what", [{"depth": True}, {"memory_frames": 3}, {"routes": True}])
def test_a_policy_that_clients_must_be_told_more_of_is_not_slipped_in(tmp_path, what):
    plain, other = Constant(1), Constant(1)
    other.spec = replace(other.spec, **what)
    made = [plain, other]
    slot = PolicySlot.of_folder(checkpoint(tmp_path / "a", 1), load=lambda folder: made.pop(0))
    with pytest.raises(TypeError, match=f"another {next(iter(what))}: restart the server"):
        slot.refresh()
    assert slot.policy is plain


def test_nor_is_one_that_decides_by_what_was_before(tmp_path):
    mind = Constant(1)
    mind.spec = replace(mind.spec, memory_frames=3)
    slot = PolicySlot.of_folder(checkpoint(tmp_path / "a", 1), load=lambda folder: mind)
    with pytest.raises(TypeError, match="knows nothing of the episodes that clients are in"):
        slot.refresh()
