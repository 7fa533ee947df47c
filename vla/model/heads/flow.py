"""Conditional flow matching head: a velocity field that carries noise to a chunk of actions.

Lipman et al. 2023 with the straight path of Liu et al. 2023: x_t = (1 - t) noise + t action, velocity action - noise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vla.model.heads.losses import by_component, masked_mean

FREQUENCIES = 16
MAX_GUIDANCE = 5.0
"""Upper limit of the guidance toward a prefix (the paper's beta); more overshoots with only a few Euler steps."""


def prefix_weights(delay_B: NDArray[np.int64], left_B: NDArray[np.int64], chunk_size: int) -> NDArray[np.float32]:
    """(B, C): how firmly a new chunk must agree with the old one, step by step. 1 for what will have been played, then
    falling, 0 where the old chunk has ended. Black, Galliker and Levine 2025, eq. 5."""
    step = np.arange(chunk_size)
    left, delay = np.minimum(left_B, chunk_size)[:, None], np.minimum(delay_B, left_B)[:, None]
    remains = np.clip((left - step) / (left - delay + 1.0), 0.0, 1.0)
    soft = remains * np.expm1(remains) / np.expm1(1.0)
    return np.where(step < delay, 1.0, soft).astype(np.float32)


class VelocityBlock(nn.Module):
    """Attention over the chunk's steps, then a feed-forward; both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BCD: Tensor) -> Tensor:
        """(B, C, D) -> (B, C, D); every step of the chunk attends to every other."""
        parts = self.project(self.norm(x_BCD)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (B, heads, C, head width)
        weight = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        x_BCD = x_BCD + self.out((weight @ value).transpose(1, 2).flatten(2))
        return x_BCD + self.ffn(self.ffn_norm(x_BCD))


class FlowHead(nn.Module):
    """Velocity of (noisy chunk, time) given the bridge's latent; actions by a few Euler steps.

    Called without a generator it starts from zeros, the noise's mean, and is therefore deterministic and
    differentiable: what evaluation, serving and RL use. With one it samples.
    """

    def __init__(self, *, width: int, action_dim: int, depth: int = 2, sampling_steps: int = 5) -> None:
        """`sampling_steps`: Euler steps of one decision. The bridge runs once, only this head runs in each."""
        super().__init__()
        self.action_dim, self.sampling_steps = action_dim, sampling_steps
        heads = next(count for count in (4, 2, 1) if width % count == 0)
        self.norm = nn.LayerNorm(width)
        self.embed_action = nn.Linear(action_dim, width)
        self.embed_time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(VelocityBlock(width, heads) for _ in range(depth))
        self.out_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, action_dim)
        nn.init.normal_(self.out.weight, std=0.1 * width**-0.5)  # an untrained policy barely moves
        nn.init.zeros_(self.out.bias)

    def velocity(self, x_BCD: Tensor, noisy_BCA: Tensor, time_B: Tensor) -> Tensor:
        """d action / d time (B, C, A) at time in [0, 1]: 0 is noise, 1 the action. `x_BCD` already normalised."""
        angle = time_B[:, None] * math.pi * torch.arange(1, FREQUENCIES + 1, device=time_B.device) / 2
        time_BD = self.embed_time(torch.cat([angle.sin(), angle.cos()], dim=-1))
        hidden = x_BCD + self.embed_action(noisy_BCA) + time_BD[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.out(self.out_norm(hidden))

    def forward(
        self,
        x_BCD: Tensor,
        *,
        generator: torch.Generator | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Latent (B, C, D) -> normalised actions (B, C, A), float32. A `generator` draws the starting noise.

        `prefix`, actions (B, C, A) and weights (B, C) in [0, 1]: the chunk is led there, fully where the weight is 1.
        """
        with torch.autocast(x_BCD.device.type, enabled=False):
            x_BCD = self.norm(x_BCD.float())
            shape = (*x_BCD.shape[:2], self.action_dim)
            if generator is None:
                action = x_BCD.new_zeros(shape)
            else:
                action = torch.randn(shape, generator=generator, device=generator.device).to(x_BCD)
            for step in range(self.sampling_steps):
                time_B = x_BCD.new_full((x_BCD.shape[0],), step / self.sampling_steps)
                if prefix is None:
                    velocity = self.velocity(x_BCD, action, time_B)
                else:
                    velocity = self._led(x_BCD, action, time_B, *prefix)
                action = action + velocity / self.sampling_steps
            return action

    def advance(self, x_BCD: Tensor, states_BSCA: Tensor, first: int = 0) -> Tensor:
        """Where Euler steps number `first`, `first` + 1, ... lead from each of S states: (B, S, C, A), float32.

        For samplers that put noise between the steps; without any, the chain from zeros is what `forward` computes.
        """
        with torch.autocast(x_BCD.device.type, enabled=False):
            x_BCD = self.norm(x_BCD.float())
            batch, count = states_BSCA.shape[:2]
            time_S = torch.arange(first, first + count, device=x_BCD.device) / self.sampling_steps
            velocity = self.velocity(
                x_BCD[:, None].expand(-1, count, -1, -1).flatten(0, 1),
                states_BSCA.flatten(0, 1),
                time_S.to(x_BCD).repeat(batch),
            )
            return states_BSCA + velocity.unflatten(0, (batch, count)) / self.sampling_steps

    def _led(self, x_BCD: Tensor, noisy_BCA: Tensor, time_B: Tensor, target_BCA: Tensor, weight_BC: Tensor) -> Tensor:
        """The velocity, bent toward a chunk that agrees with the target: real-time chunking's guidance by the gradient
        of the predicted end point. Black, Galliker and Levine 2025, eq. 2 to 4."""
        at = time_B[:, None, None]
        with torch.enable_grad():
            noisy = noisy_BCA.detach().requires_grad_()
            velocity = self.velocity(x_BCD.detach(), noisy, time_B)
            end = noisy + (1 - at) * velocity
            error = (weight_BC[..., None] * (target_BCA - end)).detach()
            (pull,) = torch.autograd.grad(end, noisy, error)
        strength = (at.square() + (1 - at).square()) / (at * (1 - at))  # infinite at time 0
        return velocity.detach() + strength.clamp(max=MAX_GUIDANCE) * pull

    def loss(self, x_BCD: Tensor, target_BCA: Tensor, mask_BC: Tensor) -> Tensor:
        """Masked mean square of the velocity's error at one time and one noise per row, from torch's random state."""
        with torch.autocast(x_BCD.device.type, enabled=False):
            # A padded step's target must not reach the other steps through the attention.
            target = torch.where(by_component(mask_BC, target_BCA), target_BCA.float(), 0.0)
            noise = torch.randn_like(target)
            time_B = torch.rand(len(target), device=target.device)
            at = time_B[:, None, None]
            velocity = self.velocity(self.norm(x_BCD.float()), noise + at * (target - noise), time_B)
            return masked_mean((velocity - (target - noise)).square(), mask_BC)
