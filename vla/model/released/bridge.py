"""The released VLA-Adapter policy, its quirks included, so that published checkpoints mean what they meant.

Written from a description of the public code (commit 838a36d), where it departs from the paper's equation:
one softmax over chunk, conditions and raw tokens together; the gate on raw *logits* (0 leaves them weight e^0, not
none); no residual around the feed-forward, which ends in a ReLU; in the Pro layout a rotation that pairs even with odd
components under a table made for halves, so that it keeps neither norms nor relative positions, and that starts at 0
for each source; a stem that sees exact zeros, in training with fresh noise shared by the batch. The base layout thus
has no code for the chunk's positions and gives the same action at every step. Train `vla.bridge.Bridge` instead.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.backbones.features import Features
from vla.model.config import FaithfulConfig


def released_rotation(x_BHTW: Tensor, *, base: float = 10000.0, table: torch.dtype = torch.float32) -> Tensor:
    """Rotate by position 0 .. T - 1 as the released code does: components (2i, 2i + 1) by the angles of 2i and 2i + 1
    in a table whose second half repeats the first. Not a rotation: see the module's docstring.

    `table`: precision of positions, frequencies and angles. The released head is bfloat16 as a whole, so positions
    above 256 come in steps of 2 (385 different ones of 512) and angles have 8 bits.
    """
    length, width = x_BHTW.shape[-2:]
    # As in the release: the frequencies are made in float32 and then become what the module is.
    frequency = (1.0 / base ** (torch.arange(0, width, 2, device=x_BHTW.device, dtype=torch.float32) / width)).to(table)
    angle = torch.arange(length, device=x_BHTW.device).to(table)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    even, odd = x_BHTW[..., ::2], x_BHTW[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x_BHTW * angle.cos().to(x_BHTW.dtype) + turned * angle.sin().to(x_BHTW.dtype)


class FaithfulBlock(nn.Module):
    """ReLU(Linear(LN(o(joint attention) + x))), the joint attention being over [chunk; queries and proprio; raw]."""

    def __init__(
        self, *, width: int, heads: int, layout: Literal["base", "pro"], table: torch.dtype = torch.float32
    ) -> None:
        """`table`: precision of the rotation's angles in the Pro layout."""
        super().__init__()
        self.heads, self.rotated, self.table = heads, layout == "pro", table
        own = 3 if layout == "pro" else 1
        self.query = nn.Linear(width, width)
        self.key = nn.ModuleList(nn.Linear(width, width) for _ in range(own))
        self.value = nn.ModuleList(nn.Linear(width, width) for _ in range(own))
        self.out = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(width)
        self.ffn = nn.Linear(width, width)

    def forward(self, x_BCD: Tensor, cond_BKD: Tensor, raw_BND: Tensor, raw_mask_BN: Tensor | None = None) -> Tensor:
        """Latent (B, C, D) after this block. Conditions are the backbone's hidden states as they are.

        The mask (True = real token) has no counterpart in the released code, which knows no padding.
        """
        sources = (x_BCD, cond_BKD, raw_BND)
        query = self._split(self.query(x_BCD))
        keys = [self._split(self.key[i % len(self.key)](source)) for i, source in enumerate(sources)]
        values = [self._split(self.value[i % len(self.value)](source)) for i, source in enumerate(sources)]
        if self.rotated:
            query, *keys = (released_rotation(part, table=self.table) for part in (query, *keys))
        score_self, score_cond, score_raw = (query @ key.transpose(-1, -2) for key in keys)
        score_raw = score_raw * torch.tanh(self.gate)
        if raw_mask_BN is not None:
            score_raw = score_raw.masked_fill(~raw_mask_BN[:, None, None], torch.finfo(score_raw.dtype).min)
        score = torch.cat([score_self, score_cond, score_raw], dim=-1) * query.shape[-1] ** -0.5
        read = score.softmax(-1) @ torch.cat(values, dim=2)
        return F.relu(self.ffn(self.norm(self.out(read.transpose(1, 2).flatten(2)) + x_BCD)))

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FaithfulBridge(nn.Module):
    """Takes `vla.bridge.Bridge`'s place in a model; the "linear" head completes the released policy."""

    def __init__(
        self, config: FaithfulConfig, *, chunk_size: int, feature_width: int, num_layers: int, proprio_dim: int
    ) -> None:
        """Raises ValueError for a configuration that does not fit the backbone."""
        super().__init__()
        if problem := config.problem():
            raise ValueError(problem)
        if feature_width != config.width:
            raise ValueError(f"the released policy is {config.width} wide, as its backbone; got one of {feature_width}")
        if num_layers < config.num_blocks:
            raise ValueError(f"the released policy reads {config.num_blocks} layers, this backbone has {num_layers}")
        self.config, self.chunk_size, self.proprio_dim = config, chunk_size, proprio_dim
        self.taps, self.layers_needed = tuple(range(config.num_blocks)), config.num_blocks
        width, stem = config.width, config.action_dim * config.width
        self.embed_proprio = nn.Sequential(nn.Linear(proprio_dim, width), nn.GELU(), nn.Linear(width, width))
        self.stem_norm, self.stem = nn.LayerNorm(stem), nn.Linear(stem, width)
        table = torch.bfloat16 if config.bf16_table else torch.float32
        self.blocks = nn.ModuleList(
            FaithfulBlock(width=width, heads=config.heads, layout=config.layout, table=table)
            for _ in range(config.num_blocks)
        )

    def forward(self, features: Features, proprio_BP: Tensor) -> Tensor:
        """Action latent (B, C, width). Proprio is clipped to [-1, 1], as the released code normalises it."""
        dtype = self.stem.weight.dtype
        if proprio_BP.shape[-1] != self.proprio_dim:
            raise ValueError(f"the bridge reads {self.proprio_dim} proprio values, got {proprio_BP.shape[-1]}")
        proprio = self.embed_proprio(proprio_BP.to(dtype).clamp(-1, 1))[:, None]
        start = self.stem.weight.new_zeros(self.chunk_size, self.stem.in_features)
        if self.training:
            start = start + torch.randn_like(start) * self.config.noise_std
        x_BCD = F.relu(self.stem(self.stem_norm(start))).expand(proprio.shape[0], -1, -1)
        for tap, block in zip(self.taps, self.blocks, strict=True):
            cond = torch.cat([features.queries_BLQD[:, tap].to(dtype), proprio], dim=1)
            x_BCD = block(x_BCD, cond, features.raw_BLND[:, tap].to(dtype), features.raw_mask_BN)
        return x_BCD
