"""Distribution over chunks of action tokens: every number of a chunk is a choice among bins.

VLA-RL (Lu et al. 2025, arXiv 2505.18719) takes the sum of a decision's token log-probabilities as its log-probability,
VL-DAC (arXiv 2508.04280) each token's alone. Our heads choose all tokens at once, each given the observation alone
(OpenVLA-OFT's parallel decoding), so a sum over tokens is the exact joint log-probability. Decoding one token after
another is left out: a head would have to read the tokens before, which neither `bins` nor `frequencies` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla.runtime.devices import in_float64


@dataclass(frozen=True, eq=False)
class TokenChunk:
    """Independent choices among K bins, for each of A numbers at each of C places of a chunk. A sample is the bins'
    indices (B, C, A), int64."""

    logits_BCAK: Tensor
    temperature: Tensor | float = 1.0
    """Divides the logits, when a sample is drawn and when it is scored: what acts is what is scored."""
    spans_chunk: bool = False
    """Every token shapes every control step (the bins of a cosine transform). Otherwise those at place c are step c."""

    def sample(self, generator: torch.Generator, *, std_scale: float = 1.0) -> Tensor:
        """Draw (B, C, A) with `std_scale` times the temperature. FloatingPointError if the logits are not finite: an
        index, unlike an action, cannot show it."""
        if not torch.isfinite(self.logits_BCAK).all():
            raise FloatingPointError("the policy's logits are not finite: its weights or inputs are damaged")
        # in double precision, and by what the sum really is: rounding must not reach a bin without probability
        logits = in_float64(self.logits_BCAK / (self.temperature * std_scale))
        cdf = logits.softmax(-1).cumsum(-1)
        draw = torch.rand(cdf.shape[:-1], generator=generator, dtype=torch.float64).to(cdf.device)
        return ((draw * cdf[..., -1])[..., None] >= cdf).sum(-1).to(self.logits_BCAK.device)

    def log_prob(self, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """Return (B,) joint log-probabilities of the tokens that count."""
        return self.token_log_prob(sample, executed_BC).sum((1, 2))

    def token_log_prob(self, sample: Tensor, executed_BC: Tensor) -> Tensor:
        """Return (B, C, A) log-probabilities; 0 for tokens that do not count, which cannot matter."""
        counts_BCA = self.counts(executed_BC)
        # where before anything is computed: a masked NaN stays out, of the gradient too (0 * NaN is NaN)
        logits = torch.where(counts_BCA[..., None], self.logits_BCAK, 0.0) / self.temperature
        chosen_BCA = logits.log_softmax(-1).gather(-1, sample[..., None])[..., 0]
        return torch.where(counts_BCA, chosen_BCA, 0.0)

    def counts(self, executed_BC: Tensor) -> Tensor:
        """Return (B, C, A) bool: tokens of executed control steps.

        Where every token shapes the whole chunk, the first executed step is made by all of them, and the environment's
        answer depends on each: all count as soon as one step was executed. (The density of the executed steps alone
        would be a sum over all chunks that begin so, and has no closed form; the joint one has the same gradient in
        expectation, with the variance of what the later steps would have been.)
        """
        if self.spans_chunk:
            executed_BC = executed_BC.any(1, keepdim=True).expand_as(executed_BC)
        return executed_BC[..., None].expand(self.logits_BCAK.shape[:-1])
