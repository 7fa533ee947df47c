"""Meta-World's own scripted policies as one expert of all its suites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.adapters.metaworld_env import scripted_policy
from envs.adapters.metaworld_suites import task_names
from vla.core.types import ActionChunk, Observation, PolicySpec, Prefix


class MetaworldExpert:
    """Policy of one-step chunks from `envs.adapters.metaworld_env`'s privileged state: it plays whichever task that
    names.

    The scripts ask for more than [-1, 1] in most steps; what is returned (and recorded) is what the environment does.
    """

    spec = PolicySpec(chunk_size=1, n_action_steps=1)

    def __init__(self) -> None:
        self._scripts: dict[str, Any] = {}

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing: the scripts have no memory."""

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Observation of B environments -> action chunk (B, 1, 4)."""
        if obs.privileged is None:
            raise ValueError("the scripted expert needs the simulator's state: Observation.privileged is None")
        return np.stack([self._act(row) for row in obs.privileged.astype(np.float64)])[:, None]

    def _act(self, state: np.ndarray) -> np.ndarray:
        task = task_names()[int(state[-1])]
        if task not in self._scripts:
            self._scripts[task] = scripted_policy(task)
        return np.clip(self._scripts[task].get_action(state[:-1]), -1, 1).astype(np.float32)
