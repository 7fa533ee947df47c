"""Normalisation by running mean and standard deviation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vla.runtime.devices import has_float64, in_float64
from vla.runtime.distributed import Team


class RunningNorm(nn.Module):
    """Input normalisation by running mean and variance. Chan et al. 1983 for merging batches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # float64: counts grow for hours, and the small differences are what a variance is made of
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningNorm:
        # .to(device) comes through here; statistics stay in main memory where the device could not hold them
        return super()._apply(fn, recurse) if has_float64(fn(torch.zeros(())).device) else self

    @torch.no_grad()
    def update(self, x_BS: Tensor, team: Team | None = None) -> None:
        """Merge the statistics of a batch (B, S), of all processes' batches."""
        n, mean, var = moments(x_BS, team)
        total = self.count + n
        delta = mean - self.mean
        # with count 0 the initial mean and var have no weight
        self.var.copy_((self.var * self.count + var * n + delta.square() * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)

    def forward(self, x_BS: Tensor) -> Tensor:
        """Return (x - mean) / std, clamped to [-10, 10]."""
        # 1e-6: a component that never moved stays near 0 instead of amplifying its rounding
        scaled = (x_BS - self.mean.to(x_BS)) / (self.var.to(x_BS) + 1e-6).sqrt()
        return scaled.clamp(-10.0, 10.0)


def moments(x_BS: Tensor, team: Team | None = None) -> tuple[float, Tensor, Tensor]:
    """Return (rows, means (S,), variances (S,)) in float64 over the rows of all processes."""
    x_BS = in_float64(x_BS)
    if team is None or team.size == 1:
        return float(len(x_BS)), x_BS.mean(0), x_BS.var(0, unbiased=False)
    count, *sums = team.total(float(len(x_BS)), *x_BS.sum(0).tolist())
    mean = x_BS.new_tensor(sums) / count
    # the second pass: a difference of two large sums would lose what a variance is made of
    squares = team.total(*(x_BS - mean).square().sum(0).tolist())
    return count, mean, x_BS.new_tensor(squares) / count
