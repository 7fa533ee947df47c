"""Earlier decisions in the model: what is kept of one, and how the bridge reads those that are looked at again.

A frozen backbone encodes each frame once, when it is current. Of each decision a row is kept - the last layer's query
states, where they point, the robot's state - and at later decisions M of these rows are further conditions of the
bridge (`MemoryTokens`), each with the time since. Which M: `vla.model.memory.recall`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vla.backbones.features import Features
from vla.model.config import MemoryConfig
from vla.model.memory.recall import EMPTY, Recall

_PERIODS = 8
"""Wavelengths in which a time is told: 8, 16, .. 1024 control steps."""


def row_of(features: Features, proprio_BP: Tensor) -> Tensor:
    """The rows to keep of B decisions (B, K): normalised query states of the last layer, points, normalised proprio."""
    return _row(features.queries_BLQD[:, -1], features.pointed_BQE, proprio_BP)


def _row(states_BQD: Tensor, points_BQE: Tensor | None, proprio_BP: Tensor) -> Tensor:
    states = F.layer_norm(states_BQD.float(), states_BQD.shape[-1:]).flatten(1)
    points = [] if points_BQE is None else [points_BQE.flatten(1).float()]
    return torch.cat([states, *points, proprio_BP.float()], 1)


def key_of(features: Features) -> Tensor:
    """The looks of B frames (B, S), as unit vectors: the mean of the last layer's raw tokens, each normalised."""
    raw = F.layer_norm(features.raw_BLND[:, -1].float(), features.raw_BLND.shape[-1:])
    if features.raw_mask_BN is None:
        return F.normalize(raw.mean(1), dim=1)
    return F.normalize((raw * features.raw_mask_BN[..., None]).sum(1), dim=1)


def remembering(
    config: MemoryConfig, features: Features, proprio_BP: Tensor, memory_BMK: Tensor
) -> tuple[Features, Tensor, Tensor]:
    """(the features with rows of earlier decisions, the row to keep of this one, the key of its frame)."""
    row_BK = row_of(features, proprio_BP)
    if config.rule == "current":
        now = torch.cat([row_BK, torch.zeros_like(row_BK[:, :1])], 1)
        memory_BMK = now[:, None].expand(-1, config.frames, -1)
    return replace(features, memory_BMK=memory_BMK), row_BK, key_of(features)


class Replayed:
    """Demonstrations as their memory: at every frame, what a policy would look at that had decided every `steps` frames
    of the episode until here."""

    def __init__(
        self, config: MemoryConfig, features: Features, proprio_FP: Tensor, episode_F: NDArray[np.int64], *, steps: int
    ) -> None:
        self._features, self._proprio = features, proprio_FP
        keys = torch.cat([key_of(features.select(slice(at, at + 256))) for at in range(0, len(episode_F), 256)])
        self.frame_FM, age_FM = replayed(config, keys.cpu().numpy(), episode_F, steps=steps)
        self._age = torch.from_numpy(age_FM)

    def take(self, frames: Tensor) -> Tensor:
        """(B, M, K + 1) of these frames, as `EpisodeMemory.read`."""
        where = torch.from_numpy(self.frame_FM)[frames]
        age, flat = self._age[frames], where.clamp(min=0).flatten()
        points = self._features.pointed_BQE
        rows = _row(
            self._features.queries_BLQD[flat, -1], None if points is None else points[flat], self._proprio[flat]
        ).unflatten(0, where.shape)
        return torch.cat([rows * (age >= 0)[..., None], age[..., None]], -1)


def replayed(
    config: MemoryConfig, keys_FS: NDArray[np.float32], episode_F: NDArray[np.int64], *, steps: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(frames, ages in control steps), each (F, M): what is looked at from each frame of some recorded episodes, -1
    where there is nothing. As if a policy had decided at this frame and every `steps` frames before it."""
    shape = (len(episode_F), config.frames)
    if config.rule == "current":
        return np.broadcast_to(np.arange(shape[0])[:, None], shape).copy(), np.zeros(shape, np.float32)
    frame_FM, age_FM = np.full(shape, -1, np.int64), np.full(shape, EMPTY, np.float32)
    for episode in np.unique(episode_F):
        rows = np.flatnonzero(episode_F == episode)
        for phase in range(min(steps, len(rows))):
            recall: Recall[int] = Recall(config)
            for frame in rows[phase::steps].tolist():
                for slot, (ago, seen) in enumerate(recall.look()):
                    frame_FM[frame, slot], age_FM[frame, slot] = seen, ago * steps
                recall.add(frame, keys_FS[frame])
    return frame_FM, age_FM


class MemoryTokens(nn.Module):
    """Rows of earlier decisions -> tokens for the bridge to attend to, and a stem for its latent."""

    def __init__(
        self,
        config: MemoryConfig,
        *,
        width: int,
        feature_width: int,
        num_queries: int,
        point_dim: int,
        proprio_dim: int,
    ) -> None:
        super().__init__()
        self._parts = [num_queries * feature_width, num_queries * point_dim, proprio_dim, 1]
        self._queries = num_queries
        self.state = nn.Linear(feature_width, width)
        self.point = nn.Linear(point_dim, width, bias=False) if point_dim else None
        self.proprio = nn.Sequential(nn.Linear(proprio_dim, width), nn.GELU(), nn.Linear(width, width))
        self.time = nn.Linear(2 * _PERIODS, width)
        self.empty = nn.Parameter(torch.randn(width) * 0.5)
        self.norm = nn.LayerNorm(width)
        placed = num_queries * point_dim + proprio_dim
        hidden = 2 * width
        self.stem = nn.Sequential(
            nn.Linear(placed + config.frames * (placed + 2 * _PERIODS + 1), hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, width),
        )

    @property
    def row_width(self) -> int:
        """K: numbers kept of a decision."""
        return sum(self._parts) - 1

    def forward(self, memory_BMK: Tensor, points_BQE: Tensor | None, proprio_BP: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens (B, T, width), stem (B, width)) of the rows; the stem also reads the present points and proprio."""
        if memory_BMK.shape[-1] != sum(self._parts):
            raise ValueError(f"the memory's rows have {self.row_width} numbers, got {memory_BMK.shape[-1] - 1}")
        states, points, proprio, age = memory_BMK.split(self._parts, dim=-1)
        kept, clock = age >= 0, _clock(age)
        told = self.state(states.unflatten(-1, (self._queries, -1))) if self._queries else None
        if self.point is not None and told is not None:
            told = told + self.point(points.unflatten(-1, (self._queries, -1)))
        tokens = self.proprio(proprio)[:, :, None]
        tokens = tokens if told is None else torch.cat([told, tokens], 2)
        tokens = self.norm(tokens + self.time(clock)[:, :, None])
        tokens = torch.where(kept[..., None], tokens, self.empty)
        placed = torch.cat([points, proprio, clock, torch.ones_like(age)], -1) * kept
        now = [proprio_BP] if points_BQE is None else [points_BQE.flatten(1), proprio_BP]
        return tokens.flatten(1, 2), self.stem(torch.cat([*now, placed.flatten(1)], 1))


def _clock(age: Tensor) -> Tensor:
    """(..., 1) control steps as (..., 2 * _PERIODS) sines and cosines."""
    angle = age * (2 * torch.pi / 2.0 ** torch.arange(3, 3 + _PERIODS, device=age.device))
    return torch.cat([angle.sin(), angle.cos()], -1).to(age.dtype)
