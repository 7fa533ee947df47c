"""The agent's view of an observation: computed once by the frozen VLA, stored in the replay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.backbones.features import Features, TensorBatch
from vla.core.types import Observation
from vla.model.heads.residual import POINT_SCALE, Latents
from vla.model.model import VLA


@dataclass(frozen=True, eq=False)
class AgentInput(TensorBatch):
    """B observations, n executed steps of a chunk."""

    latent_BnD: Tensor
    """The bridge's action latent of the executed steps."""
    stem_BD: Tensor
    points_BE: Tensor
    proprio_BP: Tensor
    """Normalised."""
    base_BnA: Tensor
    """The actions of the VLA without the residual, normalised."""

    @property
    def latents(self) -> Latents:
        """The part that head and residual read."""
        return Latents(self.latent_BnD, self.stem_BD, self.points_BE)

    def state(self) -> Tensor:
        """(B, S) the critics' input."""
        latent = F.layer_norm(self.latent_BnD, self.latent_BnD.shape[-1:]).mean(1)
        stem = F.layer_norm(self.stem_BD, self.stem_BD.shape[-1:])
        return torch.cat([latent, stem, self.points_BE * POINT_SCALE, self.proprio_BP, self.base_BnA.flatten(1)], 1)


@torch.no_grad()
def look(vla: VLA, obs: Observation, steps: int) -> tuple[AgentInput, Features]:
    """The agent's input for B observations, with chunks cut to `steps`; and the features it was computed from."""
    inp = vla.processor.prepare(obs)
    proprio = inp.proprio_BP.to(vla.device)
    features = vla.encode(inp)
    latents = vla.condition(features, proprio)
    base = vla.head(latents.latent_BCD)[:, :steps].float()
    return AgentInput(latents.latent_BCD[:, :steps], latents.stem_BD, latents.points_BE, proprio, base), features
