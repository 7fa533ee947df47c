"""The head of a policy that was taught by a small expert: an action mapper into the expert's latent space, then the
expert's own decoder.

VITA-VLA, arXiv 2510.09607: a three-layer mapper stands between the vision-language model and the action decoder of a
small policy. It is aligned with that policy's latents first, and tuned together with the decoder afterwards
(`vla.training.distillation`). Here it reads the bridge's action latent. Everything is saved with the policy: what was
the teacher is not needed any more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.core.config import find, make
from vla.model.config import DistilledConfig, VLAConfig
from vla.model.heads.losses import by_component, masked_mean
from vla.model.heads.registry import HEADS


class DistilledHead(nn.Module):
    """Bridge latent (B, C, D) -> standardised teacher latent -> the teacher's decoder -> normalised actions."""

    latent_mean: Tensor
    latent_std: Tensor
    action_gain: Tensor
    action_shift: Tensor

    def __init__(
        self,
        config: DistilledConfig,
        *,
        width: int,
        action_dim: int,
        chunk_size: int,
        decoder: nn.Module | None = None,
    ) -> None:
        """`decoder`: an action head that reads the teacher's latent, for `config.reads` "head"; else it is linear."""
        super().__init__()
        self.reads, self.chunk_size, self.action_dim = config.reads, chunk_size, action_dim
        hidden = config.mapper_width
        self.norm = nn.LayerNorm(width)
        self.mapper = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, config.width)
        )
        if config.reads == "head":
            assert decoder is not None, "a latent that a head reads comes with that head"
            self.decoder = decoder
        else:
            self.decoder = nn.Linear(config.width, action_dim * (chunk_size if config.reads == "chunk" else 1))
        # The mapper predicts latents of mean 0 and deviation 1, and the decoder's units are the teacher's.
        self.register_buffer("latent_mean", torch.zeros(config.width))
        self.register_buffer("latent_std", torch.ones(config.width))
        self.register_buffer("action_gain", torch.ones(action_dim))
        self.register_buffer("action_shift", torch.zeros(action_dim))

    def mapped(self, x_BCD: Tensor) -> Tensor:
        """The teacher's latent as the student sees it, standardised: (B, C, D_t), or (B, D_t) for a whole chunk."""
        with torch.autocast(x_BCD.device.type, enabled=False):
            normal = self.norm(x_BCD.float())
            return self.mapper(normal.mean(1) if self.reads == "chunk" else normal)

    def forward(self, x_BCD: Tensor) -> Tensor:
        """Bridge latent (B, C, D) -> normalised actions (B, C, A), float32."""
        return self.decode(self.mapped(x_BCD))

    def decode(self, standard: Tensor) -> Tensor:
        """Normalised actions (B, C, A), in the student's units, of standardised teacher latents."""
        with torch.autocast(standard.device.type, enabled=False):
            action = self.decoder(self._latent(standard))
            if self.reads == "chunk":
                action = action.unflatten(-1, (self.chunk_size, self.action_dim))
            return action * self.action_gain + self.action_shift

    def loss(self, x_BCD: Tensor, target_BCA: Tensor, mask_BC: Tensor) -> Tensor:
        """Tuning: the loss of the teacher's head, in the teacher's units; masked L1 for a linear decoder."""
        standard = self.mapped(x_BCD)
        if self.reads != "head":
            return masked_mean((self.decode(standard) - target_BCA.float()).abs(), mask_BC)
        target = (target_BCA.float() - self.action_shift) / self.action_gain
        return self.decoder.loss(self._latent(standard), target, mask_BC)

    def alignment(self, standard: Tensor, teacher: Tensor, mask_BC: Tensor) -> Tensor:
        """Mean square distance of `mapped` latents from the teacher's, both standardised: each dimension has one say.

        Steps after the episode's end do not count; a frame's one latent counts by its steps within.
        """
        error = (standard - teacher.float()).square()
        if self.reads == "chunk":
            error = error[:, None].expand(-1, mask_BC.shape[1], -1)
        return masked_mean(error, by_component(mask_BC, error))

    def standardise(self, latent: Tensor) -> Tensor:
        """The teacher's latents (..., D_t) in the mapper's units."""
        return (latent.float() - self.latent_mean) / self.latent_std

    def _latent(self, standard: Tensor) -> Tensor:
        return standard * self.latent_std + self.latent_mean


def make_head(config: VLAConfig, action_dim: int) -> nn.Module:
    """The configuration's head, untrained; for a policy that a teacher taught, with the mapper before it. ValueError
    for a head from outside the package that cannot be made."""
    taught, width = config.distilled, config.bridge.width
    head = None
    if taught is None or taught.reads == "head":
        kind, read = find(config.head, HEADS, "head"), width if taught is None else taught.width
        needs = ("parameters", "forward", "loss")
        head = make(config.head, kind, "head", needs, width=read, action_dim=action_dim)
    if taught is None:
        return head
    return DistilledHead(taught, width=width, action_dim=action_dim, chunk_size=config.chunk_size, decoder=head)
