"""Two critics of action chunks, with LayerNorm: what keeps off-policy values finite (RLPD, Ball et al. 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChunkCritic(nn.Module):
    """Value of K chunks in each of B states: (B, S) and (B, K, n * A) -> (B, K). The state's part is computed once."""

    def __init__(self, state_dim: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.of_state = nn.Linear(state_dim, width)
        self.of_action = nn.Linear(action_dim, width, bias=False)
        self.first_norm = nn.LayerNorm(width)
        self.second, self.second_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.last = nn.Linear(width, 1)

    def forward(self, state_BS: Tensor, action_BKa: Tensor) -> Tensor:
        """Return the values (B, K)."""
        hidden = self.of_state(state_BS)[:, None] + self.of_action(action_BKa)
        hidden = F.relu(self.first_norm(hidden))
        hidden = F.relu(self.second_norm(self.second(hidden)))
        return self.last(hidden).squeeze(-1)


class TwinCritics(nn.Module):
    """Two critics that differ in their first weights: the lesser of both is the target, which does not overestimate."""

    def __init__(self, state_dim: int, action_dim: int, width: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.both = nn.ModuleList(ChunkCritic(state_dim, action_dim, width) for _ in range(2))

    def forward(self, state_BS: Tensor, action_BKa: Tensor) -> Tensor:
        """Return the values of both (2, B, K)."""
        return torch.stack([critic(state_BS, action_BKa) for critic in self.both])
