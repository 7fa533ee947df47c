"""The decisions of the whole episodes that one update learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from rl.models.policy_inputs import storage_like
from rl.storage.rollout_buffer import RolloutBuffer, Transitions

ROWS = ("proprio", "action", "executed", "log_prob")


class EpisodeBuffer(Transitions):
    """Executed decisions of the kept episodes, each with its episode's advantage."""

    def __init__(self, capacity: int) -> None:
        """`capacity` is the number of rows; memory that is never written is never touched."""
        super().__init__()
        self.capacity = capacity
        self.filled = 0
        self._advantages: list[Tensor] = []

    @property
    def size(self) -> int:
        """Rows filled so far."""
        return self.filled

    @property
    def advantages_B(self) -> Tensor:
        """(size,) one per row."""
        return torch.cat(self._advantages)

    def clear(self) -> None:
        """Forget the episodes, keep the memory."""
        self.filled = 0
        self._advantages = []

    def append(self, played: RolloutBuffer, rows: Tensor, advantages_B: Tensor) -> None:
        """Copy `rows` of a rollout, with their advantages. RuntimeError when they do not fit."""
        if self.filled + len(rows) > self.capacity:
            raise RuntimeError(f"the episode buffer overflows: it holds {self.capacity} decisions; clear() first")
        if self._inputs is None:
            self._inputs = storage_like(played.stored_inputs, self.capacity)
            for name in ROWS:
                like = played.flat(name)
                shape = (self.capacity, *like.shape[1:])
                self._rows[name] = torch.empty(shape, dtype=like.dtype, device=like.device)
        end = self.filled + len(rows)
        self._inputs.write(self.filled, played.stored_inputs.select(rows))
        for name in ROWS:
            self._rows[name][self.filled : end] = played.flat(name)[rows]
        self._advantages.append(advantages_B)
        self.filled = end

    def pad(self, played: RolloutBuffer) -> None:
        """Make row 0 readable although no episode was kept: this process must take part in exchanging gradients."""
        first = torch.zeros(1, dtype=torch.int64, device=played.flat("proprio").device)
        self.append(played, first, played.flat("log_prob").new_zeros(1))
        self.filled = 0
        self._advantages = [self._advantages[-1]]
