"""Filtered behaviour cloning: explore, keep the episodes that succeeded, imitate them.

The baseline of RL: no critic, no ratio, no negative examples. PPO and GRPO must gain something over it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl.algorithms.policy_gradient import EpisodeLearner, PolicyObjective, kl_estimate
from rl.configs.learning import FilteredConfig
from rl.storage.rollout_buffer import PolicyBatch


class Likelihood(PolicyObjective):
    """Mean negative log-likelihood per executed control step."""

    def forward(self, batch: PolicyBatch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return (loss, log-ratio (M,), metrics) of a minibatch of M decisions."""
        log_prob = self.actor.distribution(batch.inputs, batch.proprio_BP).log_prob(batch.action, batch.executed_BC)
        loss = -log_prob.sum() / batch.executed_BC.sum().clamp(min=1)
        log_ratio = log_prob - batch.log_prob
        return loss, log_ratio, {"policy_loss": float(loss.detach()), "kl": kl_estimate(log_ratio)}


class FilteredImitation(EpisodeLearner):
    """`judge` keeps successes; `update` imitates them."""

    config: FilteredConfig
    objective_class = Likelihood

    def judge(self, returns_GN: Tensor) -> tuple[Tensor, Tensor]:
        """Return (kept (groups,), advantages (groups, 1)): an episode is kept if it succeeded."""
        return (returns_GN > 0).all(1), torch.ones_like(returns_GN)
