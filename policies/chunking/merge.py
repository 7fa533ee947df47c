"""Joins a new action chunk to the one being executed, which continued while the new one was computed.

`Blend` and `Ensemble` join two independent chunks; a policy that receives the actions still to be executed
(`vla.core.types.Prefix`) can continue them in its own chunk, which is real-time chunking. All of them rest on one
number, the delay, and it is counted in actions that were really played (`DelayEstimate`), not read off a clock.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Actions = NDArray[np.floating]


class Join(Protocol):
    """Returns the actions (S, A) to execute from policy step `step` on. `old` (T, A) is the rest of the plan and may be
    empty; `fresh` (S, A) is the new chunk without the actions that arrived too late."""

    def __call__(self, old_TA: Actions, fresh_SA: Actions, *, step: int) -> Actions: ...


class Blend:
    """The first `steps` actions pass linearly from old to new; 0 switches at once."""

    def __init__(self, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"blend_steps must not be negative, got {steps}")
        self.steps = steps

    def __call__(self, old_TA: Actions, fresh_SA: Actions, *, step: int) -> Actions:
        shared = min(self.steps, len(old_TA), len(fresh_SA))
        weight = (np.arange(shared) + 1.0)[:, None] / (shared + 1)
        joined = fresh_SA.copy()
        joined[:shared] = (1 - weight) * old_TA[:shared] + weight * fresh_SA[:shared]
        return joined


class Ensemble:
    """ACT's temporal ensemble: the mean of all chunks that say something about a step, weighted exp(-decay * i) from
    the oldest (i = 0) on. Zhao et al. 2023, algorithm 2."""

    def __init__(self, decay: float = 0.01) -> None:
        if not decay >= 0:
            raise ValueError(f"decay must not be negative, got {decay}")
        self.decay = decay
        self._chunks: list[tuple[int, Actions]] = []  # oldest first: its first step, its actions

    def __call__(self, old_TA: Actions, fresh_SA: Actions, *, step: int) -> Actions:
        self._chunks = [(first, chunk) for first, chunk in self._chunks if first + len(chunk) > step]
        self._chunks.append((step, fresh_SA))
        total, weights = np.zeros(fresh_SA.shape), np.zeros((len(fresh_SA), 1))
        for i, (first, chunk) in enumerate(self._chunks):
            said = chunk[step - first :][: len(fresh_SA)]
            total[: len(said)] += np.exp(-self.decay * i) * said
            weights[: len(said)] += np.exp(-self.decay * i)
        return total / weights


class DelayEstimate:
    """How many actions will be executed before the next answer arrives: the maximum of the last `memory` answers.

    Too long an estimate costs some freedom, too short a one a jump; hence the largest, as in the paper. The first
    answer comes to a robot that plays nothing yet and is left out.
    """

    def __init__(self, memory: int = 10) -> None:
        self._seen: deque[int] = deque(maxlen=memory)
        self._first = True

    def add(self, delay: int) -> None:
        """Record that an answer arrived when `delay` actions had, or could have, been executed since the request."""
        if not self._first:
            self._seen.append(delay)
        self._first = False

    @property
    def steps(self) -> int:
        """The estimate in actions; at least 1, since no answer arrives within the tick of its request."""
        return max(self._seen, default=1) or 1
