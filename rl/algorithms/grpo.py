"""Group-relative policy optimisation: no critic, the other episodes from the same initial state are the baseline.

Shao et al. 2024 (GRPO), Kool et al. 2019 and Ahmadian et al. 2024 (leave-one-out), Yu et al. 2025 (dynamic sampling,
clip-higher). Needs binary success and environments that can be reset to one state: a group is a seed played many times.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rl.algorithms.policy_gradient import EpisodeLearner
from rl.configs.learning import GRPOConfig


def group_advantages(returns_GN: Tensor, baseline: Literal["grpo", "rloo"]) -> Tensor:
    """Return advantages (groups, N) of the returns of N episodes from the same state; exactly 0 where all are equal."""
    centred = returns_GN - returns_GN.mean(1, keepdim=True)
    # the mean of equal numbers need not be that number: rounding must not become an advantage
    centred = torch.where(mixed(returns_GN)[:, None], centred, 0.0)
    if baseline == "rloo":
        others = returns_GN.shape[1] - 1
        return centred * ((others + 1) / others)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)


def mixed(returns_GN: Tensor) -> Tensor:
    """Return (groups,) bool: not all returns are the same."""
    return returns_GN.amax(1) > returns_GN.amin(1)


class GRPO(EpisodeLearner):
    """`judge` chooses the groups to learn from and gives their episodes advantages; `update` learns from them."""

    config: GRPOConfig

    def judge(self, returns_GN: Tensor) -> tuple[Tensor, Tensor]:
        """Return (kept (groups,), advantages (groups, N)): dynamic sampling."""
        rate = (returns_GN > 0).float().mean(1)
        low, high = self.config.keep
        # inclusive bounds: 1 of 10 is not quite 0.1 in float32
        kept = mixed(returns_GN) & (rate >= low - 1e-6) & (rate <= high + 1e-6)
        return kept, group_advantages(returns_GN, self.config.baseline)
