"""The refiner: a small residual on the policy's action, and all that online RL trains by default.

Imitation leaves a policy that is nearly right; RL has minutes and sparse rewards to correct it. With everything before
the refiner frozen, what it reads (`Latents`, a few kilobytes) is computed once per decision, so that an epoch over a
rollout costs milliseconds instead of seconds, and the gradient's noise goes into 0.2 million parameters instead of 2.
Residual policy learning: Silver et al. 2018 (arXiv 1812.06298), Johannink et al. 2019 (arXiv 1812.03201).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.backbones.features import Features, TensorBatch
from vla.model.bridge import Bridge

POINT_SCALE = 2.0
"""Coordinates span [-1, 1], and a tenth of that matters: brought nearer to the unit variance of the others."""


@dataclass(frozen=True, eq=False)
class Latents(TensorBatch):
    """Inputs of head and refiner for B observations. Always float32: they are small."""

    latent_BCD: Tensor
    """The bridge's action latent."""
    stem_BD: Tensor
    """The bridge's view of the pointed coordinates; zeros for a backbone that does not point."""
    points_BE: Tensor
    """The pointed coordinates themselves (E = 0 without): imitation from few demonstrations keeps only part of them."""

    @staticmethod
    def of(bridge: Bridge, features: Features, proprio_BP: Tensor) -> Latents:
        """Everything upstream of the head, for these features."""
        latent_BCD = bridge(features, proprio_BP)
        batch = latent_BCD.shape[0]
        points = latent_BCD.new_zeros(batch, 0)
        if (pointed := features.pointed_BQE) is not None:
            points = pointed.flatten(1).to(latent_BCD)
        stem = getattr(bridge, "embed_points", None)
        if stem is None or not points.shape[1]:
            return Latents(latent_BCD, latent_BCD.new_zeros(batch, latent_BCD.shape[-1]), points)
        return Latents(latent_BCD, stem(torch.cat([points, proprio_BP.to(latent_BCD)], 1)), points)


class Refiner(nn.Module):
    """(latent, pointed coordinates, proprio) -> what to add to the head's actions, or to its logits. Exactly 0 until
    trained."""

    def __init__(self, *, latent_width: int, point_width: int, proprio_dim: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * latent_width + point_width + proprio_dim, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, action_dim),
        )
        # the first action RL takes must be the imitation policy's
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, latents: Latents, proprio_BP: Tensor) -> Tensor:
        """(B, C, A) to add to the normalised action, or (B, C, A * bins) to the logits, float32. One network for all
        steps of the chunk."""
        return self.net[-1](self.hidden(latents, proprio_BP))

    def hidden(self, latents: Latents, proprio_BP: Tensor) -> Tensor:
        """The input of the last layer, (B, C, width)."""
        latent_BCD = F.layer_norm(latents.latent_BCD, latents.latent_BCD.shape[-1:])
        stem_BD = F.layer_norm(latents.stem_BD, latents.stem_BD.shape[-1:])
        shared_BS = torch.cat([stem_BD, latents.points_BE * POINT_SCALE, proprio_BP], -1)
        return self.net[:-1](torch.cat([latent_BCD, shared_BS[:, None].expand(-1, latent_BCD.shape[1], -1)], -1))
