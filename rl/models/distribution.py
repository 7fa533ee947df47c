"""Distributions over action chunks: sampling and exact log-densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class ChunkDistribution(Protocol):
    """Distribution over the decisions of B environments. A sample is stored and scored, its chunk is executed."""

    def sample(self, generator: torch.Generator, *, std_scale: float = 1.0) -> Tensor:
        """Draw one decision per environment, normalised and unclipped."""
        ...

    def log_prob(self, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """Return (B,) log-densities of the executed part of each sample. `executed_BC` is True on a prefix of the
        chunk."""
        ...


@dataclass(frozen=True, eq=False)
class ChunkGaussian:
    """Normal around `mean_BCA`; over the steps of a chunk independent, or an AR(1) process with the same marginals.

    Noise that is independent at every step mostly averages out over a chunk of small motions; correlated noise explores
    further at the same deviation per step. eps_0 = z_0, eps_k = rho eps_(k-1) + sqrt(1 - rho^2) z_k.
    """

    mean_BCA: Tensor
    log_std: Tensor
    """(A,)."""
    correlation: float = 0.0
    """rho of neighbouring steps, in [0, 1)."""
    dtype: torch.dtype = torch.float32
    """Precision in which `log_prob` is computed."""

    def sample(self, generator: torch.Generator, *, std_scale: float = 1.0) -> Tensor:
        """Draw (B, C, A)."""
        noise = torch.randn(self.mean_BCA.shape, generator=generator).to(self.mean_BCA)
        if self.correlation:
            noise = correlate(noise, self.correlation)
        return self.mean_BCA + noise * (self.log_std.exp() * std_scale)

    def log_prob(self, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """Return (B,) joint log-densities of the executed control steps; the other entries cannot matter."""
        if self.dtype != torch.float32:
            low = replace(self, mean_BCA=self.mean_BCA.to(self.dtype), log_std=self.log_std.to(self.dtype))
            return replace(low, dtype=torch.float32).log_prob(sample.to(self.dtype), executed_BC).float()
        # where before anything is multiplied: a masked NaN stays out, of the gradient too (0 * NaN is NaN)
        z_BCA = torch.where(executed_BC[..., None], sample - self.mean_BCA, 0.0) * (-self.log_std).exp()
        steps_B = executed_BC.sum(1)
        log_scale = self.log_std.sum(-1) + self.log_std.shape[-1] * LOG_SQRT_2PI
        density = -0.5 * self._whiten(z_BCA, executed_BC).square().sum((1, 2)) - steps_B * log_scale
        return density - self._log_innovations(steps_B) if self.correlation else density

    def _log_innovations(self, steps_B: Tensor) -> Tensor:
        """Log of the innovations' deviations, relative to the marginal ones, over all but the first step."""
        return (steps_B - 1).clamp(min=0) * self.log_std.shape[-1] * 0.5 * math.log1p(-(self.correlation**2))

    def _whiten(self, z_BCA: Tensor, executed_BC: Tensor) -> Tensor:
        """Innovations of standardised noise."""
        if not self.correlation:
            return z_BCA
        following = (z_BCA[:, 1:] - self.correlation * z_BCA[:, :-1]) / math.sqrt(1.0 - self.correlation**2)
        return torch.where(executed_BC[..., None], torch.cat([z_BCA[:, :1], following], 1), 0.0)


@dataclass(frozen=True, eq=False)
class FlowChain:
    """A flow-matching head with noise between its Euler steps: every sample is a chain of normals, and has a density.

    x_0 = 0, x_(k+1) ~ N(x_k + v(x_k, k / K) / K, std^2 / K) for K steps, x_K the chunk. The stored sample is the whole
    chain (B, K + 1, C, A). Its joint density is exact, and without noise the chain is the head's own deterministic
    sampling. ReinFlow (Zhang et al. 2025, arXiv 2505.22094), pi_RL's flow-noise (arXiv 2510.25889).
    """

    advance: Callable[[Tensor, int], Tensor]
    """(states (B, S, C, A), number of the first step) -> the means of the states that follow them."""
    steps: int
    """K."""
    start_BCA: Tensor
    """x_0."""
    log_std: Tensor
    """(A,) of the noise that all steps together add."""

    def sample(self, generator: torch.Generator, *, std_scale: float = 1.0) -> Tensor:
        """Draw (B, K + 1, C, A)."""
        chain = [self.start_BCA]
        std = self._step_log_std().exp() * std_scale
        for step in range(self.steps):
            mean = self.advance(chain[-1][:, None], step)[:, 0]
            chain.append(mean + torch.randn(mean.shape, generator=generator).to(mean) * std)
        return torch.stack(chain, 1)

    def log_prob(self, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """Return (B,) log-densities of whole chains. The last step's noise on actions that were not executed cannot
        matter; earlier noise on them can, through the head's attention."""
        counts_BKC = self._counts(sample, executed_BC)
        log_std = self._step_log_std()
        # states of the last column are never conditioned on
        gap = torch.where(counts_BKC[..., None], sample[:, 1:] - self.advance(sample[:, :-1], 0), 0.0)
        z_BKCA = gap * (-log_std).exp()
        log_scale = log_std.sum(-1) + log_std.shape[-1] * LOG_SQRT_2PI
        return -0.5 * z_BKCA.square().sum((1, 2, 3)) - (counts_BKC * log_scale).sum((1, 2))

    def _step_log_std(self) -> Tensor:
        """(A,) of one step."""
        return self.log_std - 0.5 * math.log(self.steps)

    def _counts(self, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """(B, K, C) whether a state's noise counts."""
        before = torch.ones_like(executed_BC)[:, None].expand(-1, self.steps - 1, -1)
        return torch.cat([before, executed_BC[:, None]], 1)


def correlate(noise_BCA: Tensor, correlation: float) -> Tensor:
    """Turn white noise into stationary AR(1) noise of unit variance along the chunk."""
    steps = [noise_BCA[:, 0]]
    for k in range(1, noise_BCA.shape[1]):
        steps.append(correlation * steps[-1] + math.sqrt(1.0 - correlation**2) * noise_BCA[:, k])
    return torch.stack(steps, 1)
