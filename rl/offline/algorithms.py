"""The differences between offline algorithms: the penalty on the critics, and how the actor learns from them.

CQL: Kumar et al. 2020 (arXiv 2006.04779). Cal-QL: Nakamoto et al. 2023 (arXiv 2303.05479). AWAC: Nair et al. 2020
(arXiv 2006.09359). RLPD: Ball et al. 2023 (arXiv 2302.02948).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl.configs.offline import AgentConfig


@dataclass(frozen=True)
class Values:
    """The values that both critics give a batch of B states."""

    of_others_2BK: Tensor
    """Values of actions drawn from the policy and around it, which may never have been taken."""
    of_data_2B: Tensor
    """Values of the actions that were taken."""
    returned_B: Tensor
    """Discounted rewards that followed in the data: the behaviour's value of the state, by Monte Carlo."""


Penalty = Callable[[Values, AgentConfig], Tensor]


def conservative(values: Values, config: AgentConfig) -> Tensor:
    """CQL's penalty: a soft maximum over actions that nobody took, less the value of the one that was taken."""
    return _gap(values.of_others_2BK, values, config)


def calibrated(values: Values, config: AgentConfig) -> Tensor:
    """Cal-QL's: the same, but values below what the data returned are not pushed any lower. The random actions lie
    around the policy's, so they are bounded alike."""
    return _gap(torch.maximum(values.of_others_2BK, values.returned_B[None, :, None]), values, config)


def _gap(others_2BK: Tensor, values: Values, config: AgentConfig) -> Tensor:
    soft_maximum = (others_2BK / config.temperature).logsumexp(2) - math.log(others_2BK.shape[2])
    return (config.temperature * soft_maximum - values.of_data_2B).mean(1).sum()


@dataclass(frozen=True)
class Opinion:
    """The critics' opinion, from which the actor learns, of a batch of B states, (B,) each."""

    value_B: Tensor
    """The critics' value of an action drawn from the policy, differentiable."""
    log_prob_B: Tensor
    """Log-density of what was done under the policy, per component; differentiable."""
    departure_B: Tensor
    """Mean square of the residual, in standard deviations; differentiable."""
    succeeded_B: Tensor
    """Bool: a reward followed what was done."""
    advantage_B: Tensor
    """The critics' value of what was done, less that of the policy's action; without gradients."""


Improvement = Callable[[Opinion, AgentConfig], Tensor]


def ascend(opinion: Opinion, config: AgentConfig) -> Tensor:
    """Raise the value of the policy's actions, near the imitation policy."""
    return config.anchor * opinion.departure_B.mean() - opinion.value_B.mean()


def imitate_the_better(opinion: Opinion, config: AgentConfig) -> Tensor:
    """AWAC: imitate what was done, by its advantage. Weights are at most 20, as usual."""
    weight_B = (opinion.advantage_B / config.advantage_scale).exp().clamp(max=20.0)
    return -(weight_B * opinion.log_prob_B).mean()


def imitate_successes(opinion: Opinion, config: AgentConfig) -> Tensor:
    """Filtered imitation: of what was rewarded in the end. The critics have no say."""
    return -(opinion.succeeded_B * opinion.log_prob_B).mean()


@dataclass(frozen=True)
class Algorithm:
    """One of `rl.configs.offline.ALGORITHMS`."""

    penalty: Penalty | None
    improvement: Improvement


BY_NAME: dict[str, Algorithm] = {
    "cal-ql": Algorithm(calibrated, ascend),
    "cql": Algorithm(conservative, ascend),
    "awac": Algorithm(None, imitate_the_better),
    "rlpd": Algorithm(None, ascend),
    "filtered": Algorithm(None, imitate_successes),
}
