"""A run that is killed and resumed, beside one that is not."""

from __future__ import annotations

import pytest

from tests.vla.training.test_train import Killed, assert_bit_equal, interrupt_at, kill, weights
from vla.model.model import VLA
from vla.training.train import train


def assert_resumes_exactly(cfg, policy, data, folder):
    """Train `policy(cfg)` in FOLDER/a, and in FOLDER/b killed at step 4 and resumed: the same weights. Returns the
    policy of the former."""
    straight = policy(cfg)
    train(cfg, straight, data, folder / "a")
    with pytest.raises(Killed):
        train(cfg, policy(cfg), data, folder / "b", on_step=interrupt_at(4, kill))
    resumed = VLA.load(folder / "b", merge=False)
    train(cfg, resumed, data, folder / "b", resume=True)
    assert_bit_equal(weights(resumed), weights(straight))
    return straight
