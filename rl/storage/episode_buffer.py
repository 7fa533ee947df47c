"""Whole episodes of one update, in groups that start alike."""

from __future__ import annotations

import torch
from torch import Tensor

from rl.storage.rollout_buffer import RolloutBuffer, Transitions

ROWS = ("proprio", "action", "executed", "log_prob")


class EpisodeBuffer(Transitions):
    """Executed decisions of the episodes that were kept, each with its episode's advantage."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: rows; memory that is never written is never touched."""
        super().__init__()
        self.capacity = capacity
        self.filled = 0
        self._advantages: list[Tensor] = []

    @property
    def size(self) -> int:
        return self.filled

    @property
    def advantages_B(self) -> Tensor:
        return torch.cat(self._advantages)

    def clear(self) -> None:
        """Forget the episodes, keep the memory."""
        self.filled = 0
        self._advantages = []
        self.reference_means = None

    def append(self, played: RolloutBuffer, rows: Tensor, advantages_B: Tensor) -> None:
        """Copy these rows of a rollout. RuntimeError when they do not fit."""
        if self.filled + len(rows) > self.capacity:
            raise RuntimeError(f"the episode buffer overflows: it holds {self.capacity} decisions; clear() first")
        if self._conditions is None:
            self._conditions = played.kept_conditions.empty_like(self.capacity)
            for name in ROWS:
                like = played.flat(name)
                shape = (self.capacity, *like.shape[1:])
                self._rows[name] = torch.empty(shape, dtype=like.dtype, device=like.device)
        end = self.filled + len(rows)
        self._conditions.write(self.filled, played.kept_conditions.select(rows))
        for name in ROWS:
            self._rows[name][self.filled : end] = played.flat(name)[rows]
        self._advantages.append(advantages_B)
        self.filled = end

    def pad(self, played: RolloutBuffer) -> None:
        """Make row 0 readable though no episode was kept (this process has nothing to say, but must take part)."""
        first = torch.zeros(1, dtype=torch.int64, device=played.flat("proprio").device)
        self.append(played, first, played.flat("log_prob")[:1] * 0.0)
        self.filled = 0
        self._advantages = [self._advantages[-1]]
