"""Discretised heads: each number of the chunk is a choice among bins, all made in parallel.

`BinHead` bins every step's every component (RT-2's and OpenVLA's action tokens, decoded in parallel as OpenVLA-OFT
does). `FrequencyHead` bins the chunk's discrete cosine transform, as FAST does (arXiv 2501.09747) before it compresses
the result with byte pairs; a parallel decoder has no use for shorter sequences, so that step is left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.model.heads.losses import by_component, masked_mean

SPREAD = 0.1
"""Standard deviation, in normalised units of an action, of the bins that a target asks for."""


class BinHead(nn.Module):
    """Categorical over bins of each normalised action component; cross entropy against bins around the target.

    The target is a normal distribution over the bins (the histogram loss of Imani and White, arXiv 1806.04613): a bin
    beside the right one is nearly right, which a single bin as target does not say, and from few demonstrations is not
    learnt. The action is the mean over the likeliest bin and its neighbours: it stays on one mode, is finer than a bin,
    and has gradients, which RL needs. RL may also draw the bins themselves (`rl.models.tokens`).
    """

    spans_chunk = False
    """True where every number says something about every control step, not only about its own."""

    def __init__(
        self, *, width: int, action_dim: int, bins: int = 128, limit: float = 1.5, spread: float = SPREAD
    ) -> None:
        """Bin centres span [-limit, limit] in normalised units; targets beyond are clipped to it. `spread`: of a
        target, normalised units; 0: the two bins nearest to it share its weight."""
        super().__init__()
        self.action_dim, self.bins, self.limit = action_dim, bins, limit
        self.register_buffer("spread", torch.tensor(spread))
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.out = nn.Linear(width, action_dim * bins)
        nn.init.normal_(self.out.weight, std=0.1 * width**-0.5)
        # Prefers the middle slightly, so that an untrained policy barely moves.
        centre = torch.linspace(-1, 1, bins)
        with torch.no_grad():
            self.out.bias.copy_((-0.5 * (centre / 0.1).square()).repeat(action_dim).clamp(min=-2.0))

    def reach(self, chunk: int) -> float:
        """The largest number that is binned, normalised units, for chunks of this length."""
        return self.limit

    def spread_bins(self, chunk: int) -> Tensor:
        """`spread` in bins."""
        return self.spread / self.reach(chunk) * (self.bins - 1) / 2

    def to_code(self, action_BCA: Tensor) -> Tensor:
        """Actions -> the numbers that are binned, in units of [-1, 1] for the whole range of bins."""
        return action_BCA / self.limit

    def from_code(self, code_BCA: Tensor) -> Tensor:
        """Inverse of `to_code`."""
        return code_BCA * self.limit

    def logits(self, x_BCD: Tensor) -> Tensor:
        """(B, C, A, bins), float32."""
        with torch.autocast(x_BCD.device.type, enabled=False):
            return self.out(self.mlp(self.norm(x_BCD.float()))).unflatten(-1, (self.action_dim, self.bins))

    def forward(self, x_BCD: Tensor) -> Tensor:
        """Latent (B, C, D) -> normalised actions (B, C, A), float32, deterministic."""
        return self.decode(self.logits(x_BCD))

    def decode(self, logits_BCAK: Tensor) -> Tensor:
        """The deterministic actions (B, C, A) of logits."""
        with torch.autocast(logits_BCAK.device.type, enabled=False):
            index = torch.arange(self.bins, device=logits_BCAK.device)
            near = (2 * self.spread_bins(logits_BCAK.shape[1])).clamp(min=2)
            far = (index - logits_BCAK.argmax(-1, keepdim=True)).abs() > near
            weight = logits_BCAK.masked_fill(far, -math.inf).softmax(-1)
            return self.from_code(weight @ torch.linspace(-1, 1, self.bins, device=logits_BCAK.device))

    def of_tokens(self, token_BCA: Tensor) -> Tensor:
        """The actions (B, C, A) that chosen bins (int64) stand for: their centres, not an edge of theirs."""
        return self.from_code(torch.linspace(-1, 1, self.bins, device=token_BCA.device)[token_BCA])

    def loss(self, x_BCD: Tensor, target_BCA: Tensor, mask_BC: Tensor) -> Tensor:
        """Cross entropy, masked, in nats per number."""
        code, keep_BCA = self._target(target_BCA.float(), mask_BC)
        place_BCA1 = ((code.clamp(-1, 1) + 1) / 2 * (self.bins - 1))[..., None]
        away_BCAK = torch.arange(self.bins, device=code.device) - place_BCA1
        spread = self.spread_bins(target_BCA.shape[1])
        if spread > 0:
            wanted_BCAK = (-0.5 * (away_BCAK / spread).square()).softmax(-1)
        else:
            wanted_BCAK = (1 - away_BCAK.abs()).clamp(min=0)
        log_p = F.log_softmax(self.logits(x_BCD), dim=-1)
        return masked_mean(-(wanted_BCAK * log_p).sum(-1), keep_BCA)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        """Checkpoints from before there was a spread have none: they act as they did, and learn on as they did."""
        state_dict.setdefault(prefix + "spread", torch.tensor(0.0))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _target(self, target_BCA: Tensor, mask_BC: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers to be binned and the mask of those that count, each (B, C, A)."""
        keep_BCA = by_component(mask_BC, target_BCA)
        return self.to_code(torch.where(keep_BCA, target_BCA, 0.0)), keep_BCA


class FrequencyHead(BinHead):
    """Bins of the chunk's cosine transform: smooth chunks concentrate in few numbers, and no step can jump alone."""

    spans_chunk = True

    def __init__(
        self, *, width: int, action_dim: int, bins: int = 256, limit: float = 1.5, spread: float = SPREAD
    ) -> None:
        """Arguments as in `BinHead`. The transform is orthonormal: a constant chunk at `limit` just fits the bins."""
        super().__init__(width=width, action_dim=action_dim, bins=bins, limit=limit, spread=spread)
        # The latent of frequency k is the same transform of the steps' latents; this says which k it is.
        self.frequency = nn.Linear(1, width)

    def reach(self, chunk: int) -> float:
        """See `BinHead.reach`."""
        return self.limit * math.sqrt(chunk)

    def to_code(self, action_BCA: Tensor) -> Tensor:
        """Actions (B, C, A) -> cosine coefficients (B, C, A), in units of [-1, 1] for the whole range of bins."""
        chunk = action_BCA.shape[1]
        return cosine_basis(chunk, action_BCA.device) @ action_BCA / self.reach(chunk)

    def from_code(self, code_BCA: Tensor) -> Tensor:
        """Inverse of `to_code`: cosine coefficients (B, C, A) -> actions (B, C, A)."""
        chunk = code_BCA.shape[1]
        return cosine_basis(chunk, code_BCA.device).T @ code_BCA * self.reach(chunk)

    def logits(self, x_BCD: Tensor) -> Tensor:
        """Latent (B, C, D) -> logits (B, C, A, bins) of each frequency's bins, float32."""
        with torch.autocast(x_BCD.device.type, enabled=False):
            chunk = x_BCD.shape[1]
            which = torch.arange(chunk, device=x_BCD.device, dtype=torch.float32)[:, None]
            return super().logits(cosine_basis(chunk, x_BCD.device) @ x_BCD.float() + self.frequency(which))

    def _target(self, target_BCA: Tensor, mask_BC: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk cut by the episode's end holds its last action: a transform has no use for half a chunk."""
        keep = by_component(mask_BC, target_BCA)
        step = torch.arange(1, keep.shape[1] + 1, device=keep.device)[:, None]
        held = target_BCA.gather(1, (keep * step).argmax(1, keepdim=True))
        # What is masked from the start counts for nothing, and must not make a NaN of it.
        some = keep.any(1, keepdim=True).expand_as(keep)
        return self.to_code(torch.where(keep, target_BCA, torch.where(some, held, 0.0))), some


def cosine_basis(chunk: int, device: torch.device | None = None) -> Tensor:
    """Orthonormal DCT-II (C, C): rows are frequencies. float32."""
    step = torch.arange(chunk, device=device, dtype=torch.float32)
    basis = torch.cos(math.pi / chunk * (step + 0.5) * step[:, None]) * math.sqrt(2 / chunk)
    return torch.cat([basis[:1] * math.sqrt(0.5), basis[1:]])
