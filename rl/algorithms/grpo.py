"""Group-relative policy optimisation: no critic, the other episodes from the same initial state are the baseline.

Shao et al. 2024 (GRPO), Kool et al. 2019 and Ahmadian et al. 2024 (leave-one-out), Yu et al. 2025 (dynamic sampling,
clip-higher). Needs binary success and worlds that can be reset to one state: a group is a seed played many times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rl.algorithms.policy_gradient import PolicyConfig, PolicyLearner
from rl.storage.episode_buffer import EpisodeBuffer


@dataclass(frozen=True)
class GRPOConfig(PolicyConfig):
    """One advantage per episode, the same for all of its decisions."""

    clip_high: float | None = 0.28
    group_size: int = 8
    """Episodes that share their initial state."""
    baseline: Literal["grpo", "rloo"] = "grpo"
    """(R - mean) / std of the group, or R minus the mean of the others."""
    keep: tuple[float, float] = (0.1, 0.9)
    """Success within a group, inclusive, for it to be learnt from. Groups that are all alike teach nothing."""
    episodes_per_update: int = 96
    """Kept ones, over all processes: rounds are played until there are so many."""
    max_rounds: int = 4
    """But no more than these in one update: a policy that always succeeds has no mixed groups left."""

    def problem(self) -> str | None:
        low, high = self.keep
        if self.group_size < 2:
            return f"group_size must be at least 2, got {self.group_size}: one episode has no others to compare with"
        if not 0.0 <= low <= high <= 1.0:
            return f"keep must be an increasing pair within [0, 1], got {self.keep}"
        if self.max_rounds < 1 or self.episodes_per_update < 1:
            return "max_rounds and episodes_per_update must be at least 1"
        return super().problem()


def group_advantages(returns_GN: Tensor, baseline: Literal["grpo", "rloo"]) -> Tensor:
    """(groups, N) of the returns of N episodes from the same state. Groups whose returns are equal get exactly 0."""
    centred = returns_GN - returns_GN.mean(1, keepdim=True)
    # the mean of equal numbers need not be that number: rounding must not become an advantage
    centred = torch.where(mixed(returns_GN)[:, None], centred, 0.0)
    if baseline == "rloo":
        others = returns_GN.shape[1] - 1
        return centred * ((others + 1) / others)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)


def mixed(returns_GN: Tensor) -> Tensor:
    """(groups,) bool: not all returns are the same."""
    return returns_GN.amax(1) > returns_GN.amin(1)


class GRPO(PolicyLearner):
    """`judge` says which groups are learnt from and what their episodes were worth; `update` learns from them."""

    config: GRPOConfig

    def judge(self, returns_GN: Tensor) -> tuple[Tensor, Tensor]:
        """(kept (groups,), advantages (groups, N)): dynamic sampling."""
        rate = (returns_GN > 0).float().mean(1)
        low, high = self.config.keep
        # inclusive bounds: 1 of 10 is not quite 0.1 in float32
        kept = mixed(returns_GN) & (rate >= low - 1e-6) & (rate <= high + 1e-6)
        return kept, group_advantages(returns_GN, self.config.baseline)

    def update(self, buffer: EpisodeBuffer) -> dict[str, float]:
        """One update on the kept episodes. Without any, in any process, the policy stays and `skipped` is 1."""
        metrics = {"skipped": 1.0}
        if self.team.total(float(buffer.size))[0]:
            if buffer.size:
                self.remember_imitation(buffer)
            metrics = {"skipped": 0.0} | self.improve(buffer)
        self.anneal()
        metrics["std_mean"] = float(self.actor.log_std.detach().exp().mean())
        self.num_updates += 1
        return metrics
