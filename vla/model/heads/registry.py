"""Action heads: bridge latent -> actions in normalised units. One interface.

Flow matching and discretised heads have files of their own; `HEADS` names all.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from vla.model.heads.flow import FlowHead
from vla.model.heads.losses import masked_mean
from vla.model.heads.tokens import BinHead, FrequencyHead


class Head(Protocol):
    """Interface of an action head for `VLA` (an nn.Module built with width and action_dim)."""

    def __call__(self, x_BCD: Tensor) -> Tensor:
        """Latent (B, C, D) -> normalised actions (B, C, A), float32, deterministic."""

    def loss(self, x_BCD: Tensor, target_BCA: Tensor, mask_BC: Tensor) -> Tensor:
        """Scalar training loss over the steps where mask is 1 (0: padding after the episode's end).

        The mask may be (B, C, A): components that a robot does not have are 0 in it.
        """


def masked_l1(error_BCA: Tensor, mask_BC: Tensor) -> Tensor:
    """Mean absolute value over the unmasked components; 0 when all are masked. The mask may be (B, C, A)."""
    return masked_mean(error_BCA.abs(), mask_BC)


class L1Head(nn.Module):
    """Regression of the median action: LayerNorm, one hidden layer, linear. VLA-Adapter's default head."""

    def __init__(self, *, width: int, action_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.out = nn.Linear(width, action_dim)
        # Near zero, the middle of the normalised range: an untrained policy barely moves, and every weight learns.
        nn.init.normal_(self.out.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BCD: Tensor) -> Tensor:
        """Latent (B, C, D) -> normalised actions (B, C, A), float32 in any autocast context."""
        with torch.autocast(x_BCD.device.type, enabled=False):
            return self.out(self.mlp(self.norm(x_BCD.float())))

    def loss(self, x_BCD: Tensor, target_BCA: Tensor, mask_BC: Tensor) -> Tensor:
        """Masked mean absolute error."""
        return masked_l1(self(x_BCD) - target_BCA.float(), mask_BC)


class LinearHead(L1Head):
    """LayerNorm and one linear layer, trained as the L1 head is: the end of the released VLA-Adapter policy."""

    def __init__(self, *, width: int, action_dim: int) -> None:
        super().__init__(width=width, action_dim=action_dim)
        self.mlp = nn.Identity()


HEADS: dict[str, type[nn.Module]] = {
    "l1": L1Head,
    "linear": LinearHead,
    "flow": FlowHead,
    "bins": BinHead,
    "frequencies": FrequencyHead,
}
"""Heads a VLAConfig may name. One from outside, named MODULE:CLASS, has L1Head's constructor and follows `Head`."""
