"""Densities over chunks of actions: what a policy samples, and how likely that was. Tensors in, tensors out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class ChunkDistribution(Protocol):
    """Over decisions of B worlds. A sample is what gets stored and scored; `chunk_of` it is what may be executed."""

    def sample(self, generator: torch.Generator, *, std_scale: float = 1.0) -> Tensor:
        """One decision per world, normalised and unclipped."""

    def log_prob(self, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """(B,) log-density of what counts of each sample. `executed_BC` is True on a prefix of the chunk."""

    def means(self, sample: Tensor) -> Tensor:
        """What the samples scatter around, for `kl_from`."""

    def kl_from(self, reference: Tensor, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """(B,) divergence from the same density around `reference` (some other policy's `means`)."""

    def entropy(self, executed_BC: Tensor) -> Tensor:
        """(B,) of what is executed."""


@dataclass(frozen=True, eq=False)
class ChunkGaussian:
    """Normal around `mean_BCA`; over the steps of a chunk independent, or an AR(1) process with the same marginals.

    Noise that is independent at every step mostly averages out over a chunk of small motions; correlated noise explores
    further at the same deviation per step. eps_0 = z_0, eps_k = rho eps_(k-1) + sqrt(1 - rho^2) z_k.
    """

    mean_BCA: Tensor
    log_std: Tensor
    """(A,), or (B, 1, A) where the spread depends on the state."""
    correlation: float = 0.0
    """rho of neighbouring steps, in [0, 1)."""

    def sample(self, generator: torch.Generator, *, std_scale: float = 1.0) -> Tensor:
        """(B, C, A)."""
        noise = torch.randn(self.mean_BCA.shape, generator=generator).to(self.mean_BCA)
        if self.correlation:
            noise = correlate(noise, self.correlation)
        return self.mean_BCA + noise * (self.log_std.exp() * std_scale)

    def log_prob(self, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """(B,) joint log-density of the executed control steps; entries that were not executed cannot matter."""
        # where before anything is multiplied: a masked NaN stays out, of the gradient too (0 * NaN is NaN)
        z_BCA = torch.where(executed_BC[..., None], sample - self.mean_BCA, 0.0) * (-self.log_std).exp()
        steps_B = executed_BC.sum(1)
        log_scale = self._log_std_sum() + self.log_std.shape[-1] * LOG_SQRT_2PI
        density = -0.5 * self._whiten(z_BCA, executed_BC).square().sum((1, 2)) - steps_B * log_scale
        return density - self._log_innovations(steps_B) if self.correlation else density

    def means(self, sample: Tensor) -> Tensor:
        """(B, C, A)."""
        return self.mean_BCA

    def kl_from(self, reference: Tensor, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """(B,) KL divergence of two normals with this one's spread, over the executed steps."""
        # std detached, else a penalty on this would pay for more noise
        drift = (self.mean_BCA - reference) * (-self.log_std.detach()).exp()
        drift = torch.where(executed_BC[..., None], drift, 0.0)
        return 0.5 * self._whiten(drift, executed_BC).square().sum((1, 2))

    def entropy(self, executed_BC: Tensor) -> Tensor:
        """(B,) closed form."""
        steps_B = executed_BC.sum(1)
        independent = steps_B * (self._log_std_sum() + self.log_std.shape[-1] * (LOG_SQRT_2PI + 0.5))
        return independent + self._log_innovations(steps_B) if self.correlation else independent

    def _log_std_sum(self) -> Tensor:
        total = self.log_std.sum(-1)
        return total.squeeze(1) if total.ndim else total

    def _log_innovations(self, steps_B: Tensor) -> Tensor:
        """Log of the innovations' deviations, relative to the marginal ones, over all but the first step."""
        return (steps_B - 1).clamp(min=0) * self.log_std.shape[-1] * 0.5 * math.log1p(-(self.correlation**2))

    def _whiten(self, z_BCA: Tensor, executed_BC: Tensor) -> Tensor:
        """Innovations of standardised noise."""
        if not self.correlation:
            return z_BCA
        following = (z_BCA[:, 1:] - self.correlation * z_BCA[:, :-1]) / math.sqrt(1.0 - self.correlation**2)
        return torch.where(executed_BC[..., None], torch.cat([z_BCA[:, :1], following], 1), 0.0)


def correlate(noise_BCA: Tensor, correlation: float) -> Tensor:
    """White noise -> stationary AR(1) noise of unit variance along the chunk."""
    steps = [noise_BCA[:, 0]]
    for k in range(1, noise_BCA.shape[1]):
        steps.append(correlation * steps[-1] + math.sqrt(1.0 - correlation**2) * noise_BCA[:, k])
    return torch.stack(steps, 1)
