"""A policy whose actions tell how often it was asked in this episode, and what it saw, importable by workers."""

import numpy as np

from vla.core.types import PolicySpec


class ToyPolicy:
    def __init__(self, steps, **spec):
        self.spec, self.count = PolicySpec(n_action_steps=steps, **spec), 0

    def reset(self, env_ids=None):
        self.count = 0

    def act(self, obs, *, prefix=None):
        assert obs.batch_size == 1 and obs.instruction[0].startswith("pick up object")
        chunk = np.zeros((1, 4, 3), np.float32)
        chunk[..., 0], chunk[..., 1], chunk[..., 2] = 0.1 * self.count, 0.1 * np.arange(4), obs.proprio[0, 0]
        self.count += 1
        return chunk


def make(steps, **spec):
    return ToyPolicy(steps, **spec)
