"""Advantages of decisions: GAE over action chunks; truncation bootstraps, termination does not."""

from __future__ import annotations

import torch
from torch import Tensor

from rl.models.running_norm import moments
from vla.runtime.devices import in_float64
from vla.runtime.distributed import Team


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    discounts: Tensor,
    lam: float,
) -> Tensor:
    """Return advantages (T, N) of T decisions in N environments: Schulman et al. 2016, eq. 16, over semi-Markov steps.

    rewards: (T, N) summed over the control steps of the chunk.
    values, next_values: (T, N) of the state a chunk started from, and of the state it really ended in: for a truncated
        episode that is its final state, never the observation of the episode that follows.
    terminated, truncated: (T, N) bool. Only `terminated` removes the bootstrap; both end the recursion.
    discounts: (T, N) discount of the state after the chunk: gamma per chunk, or gamma ** n_steps.
    lam: 0 gives one-step TD errors, 1 gives discounted returns minus values.
    """
    shape = rewards.shape
    for name, tensor in (
        ("values", values),
        ("next_values", next_values),
        ("terminated", terminated),
        ("truncated", truncated),
        ("discounts", discounts),
    ):
        if tensor.shape != shape:
            raise ValueError(f"gae: {name} has shape {tuple(tensor.shape)}, rewards {tuple(shape)}; give all as (T, N)")
    bootstrap = (~terminated).to(values.dtype)
    carry_on = (~(terminated | truncated)).to(values.dtype)
    deltas = rewards + discounts * next_values * bootstrap - values
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[0])
    for t in range(shape[0] - 1, -1, -1):
        running = deltas[t] + discounts[t] * lam * carry_on[t] * running
        advantages[t] = running
    return advantages


def normalise(advantages: Tensor, team: Team | None = None) -> Tensor:
    """Return the advantages with zero mean and unit standard deviation over the batch of all processes; all zeros when
    they are equal."""
    if team is None or team.size == 1:
        centred = advantages - advantages.mean()
        return centred / (centred.square().mean().sqrt() + 1e-6)
    _, mean, variance = moments(advantages.reshape(-1, 1), team)
    return ((in_float64(advantages) - mean) / (variance.sqrt() + 1e-6)).to(advantages)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 a constant. 0.0 when returns do not vary."""
    variance = returns.var(unbiased=False)
    if variance < 1e-12:
        return 0.0
    return float(1.0 - (returns - values).var(unbiased=False) / variance)
