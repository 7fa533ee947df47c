"""Earlier decisions in the model: what is kept of one, and how the bridge reads those that are looked at again.

A frozen backbone encodes each frame once, when it is current. Of each decision a row is kept - the last layer's query
states, where they point, the robot's state, a sketch of the image tokens - and at later decisions M of these rows are
further conditions of the bridge (`MemoryTokens`), each with the time since, and tell where the robot will stop next
(`vla.model.memory.foresight`). Which M: `vla.model.memory.recall`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vla.backbones.features import Features
from vla.model.config import MemoryConfig
from vla.model.memory.foresight import CHANNELS, GRID, Foresight, changes, sketch_of, stops
from vla.model.memory.recall import EMPTY, Recall
from vla.processing.batch import ModelInput

_PERIODS = 8
"""Wavelengths in which a time is told: 8, 16, .. 1024 control steps."""
_WAY = 3.0
"""Scale of the way that is left to where the robot will stop: what ends there is small."""


def row_of(features: Features, proprio_BP: Tensor, *sketch: Tensor) -> Tensor:
    """The rows to keep of B decisions (B, K): normalised query states of the last layer, points, normalised proprio,
    and a sketch of what was seen, where one is given."""
    return _row(features.queries_BLQD[:, -1], features.pointed_BQE, proprio_BP, *sketch)


def _row(states_BQD: Tensor, points_BQE: Tensor | None, proprio_BP: Tensor, *sketch: Tensor) -> Tensor:
    states = F.layer_norm(states_BQD.float(), states_BQD.shape[-1:]).flatten(1)
    points = [] if points_BQE is None else [points_BQE.flatten(1).float()]
    return torch.cat([states, *points, proprio_BP.float(), *(part.float() for part in sketch)], 1)


def key_of(features: Features) -> Tensor:
    """The looks of B frames (B, S), as unit vectors: the mean of the last layer's raw tokens, each normalised."""
    raw = F.layer_norm(features.raw_BLND[:, -1].float(), features.raw_BLND.shape[-1:])
    if features.raw_mask_BN is None:
        return F.normalize(raw.mean(1), dim=1)
    return F.normalize((raw * features.raw_mask_BN[..., None]).sum(1), dim=1)


def mean_word(backbone: nn.Module, token_ids_BT: Tensor, token_mask_BT: Tensor) -> Tensor | None:
    """The instructions' mean word vector (B, D); None for a backbone that does not tell its words."""
    if not hasattr(backbone, "hear"):
        return None
    said_BT1 = token_mask_BT.bool()[..., None]
    return (backbone.hear(token_ids_BT).float() * said_BT1).sum(1) / said_BT1.sum(1).clamp(min=1)


def remembering(vla: Any, features: Features, inp: ModelInput, memory_BMK: Tensor) -> tuple[Features, Tensor, Tensor]:
    """(the features of a `vla.model.model.VLA` with rows of earlier decisions and the words, the row to keep of this
    one, the key of its frame)."""
    config, views = vla.config.memory, vla.bridge.memory.foresight.views
    row_BK = row_of(features, inp.proprio_BP, sketch_of(features, views))
    if config.rule == "current":
        now = torch.cat([row_BK, torch.zeros_like(row_BK[:, :1])], 1)
        memory_BMK = now[:, None].expand(-1, config.frames, -1)
    words = mean_word(vla.backbone, inp.token_ids_BT, inp.token_mask_BT.bool() & vla.config.language)
    return replace(features, memory_BMK=memory_BMK, words_BD=words), row_BK, key_of(features)


class Replayed:
    """Demonstrations as their memory: at every frame, what a policy would look at that had decided every `steps` frames
    of the episode until here; and what it would have wanted to know, where the robot stopped next."""

    def __init__(
        self, vla: Any, features: Features, proprio_FP: Tensor, episode_F: NDArray[np.int64], said: Sequence[str],
        *, steps: int,
    ) -> None:  # fmt: skip
        """`said`: each frame's instruction."""
        self._features, self._proprio, views = features, proprio_FP, vla.bridge.memory.foresight.views
        parts = [features.select(slice(at, at + 256)) for at in range(0, len(episode_F), 256)]
        self._sketch = torch.cat([sketch_of(part, views).to(features.raw_BLND.dtype) for part in parts])
        keys = torch.cat([key_of(part) for part in parts])
        self.frame_FM, age_FM = replayed(vla.config.memory, keys.cpu().numpy(), episode_F, steps=steps)
        self._age = torch.from_numpy(age_FM)
        self._stop = torch.from_numpy(stops(proprio_FP.numpy(), episode_F))
        texts = sorted(set(said))
        ids, mask = (tensor.to(vla.device) for tensor in vla.processor.tokenise(texts))
        with torch.no_grad():
            words = mean_word(vla.backbone, ids, mask.bool() & vla.config.language)
        self._words = None if words is None else words.cpu()
        self._said = torch.tensor([texts.index(text) for text in said])

    def take(self, frames: Tensor) -> Features:
        """Features of these frames in float32, with their memory as of `EpisodeMemory.read`, their words and where the
        robot stopped next."""
        where = torch.from_numpy(self.frame_FM)[frames]
        age, flat = self._age[frames], where.clamp(min=0).flatten()
        points = self._features.pointed_BQE
        rows = _row(
            self._features.queries_BLQD[flat, -1],
            None if points is None else points[flat],
            self._proprio[flat],
            self._sketch[flat],
        ).unflatten(0, where.shape)
        return replace(
            self._features.select(frames).float(),
            memory_BMK=torch.cat([rows * (age >= 0)[..., None], age[..., None]], -1),
            words_BD=None if self._words is None else self._words[self._said[frames]],
            stop_BP=self._proprio[self._stop[frames]],
        )


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
        views: int,
    ) -> None:
        super().__init__()
        sketch = views * GRID * GRID * CHANNELS
        self._parts = [num_queries * feature_width, num_queries * point_dim, proprio_dim, sketch, 1]
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
            nn.Linear(placed + 2 * proprio_dim + config.frames * (placed + 2 * _PERIODS + 1), hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, width),
        )
        self.foresight = Foresight(frames=config.frames, views=views, proprio_dim=proprio_dim, word_width=feature_width)

    @property
    def row_width(self) -> int:
        """K: numbers kept of a decision."""
        return sum(self._parts) - 1

    def forward(self, features: Features, proprio_BP: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens (B, T, width), stem (B, width)) of the features' rows; the stem also reads the present points and
        proprio, and where the robot will stop next: `stop_BP` where that is known, else what `foreseen` says."""
        states, points, proprio, _, age = self._split(features, proprio_BP.dtype)
        if features.stop_BP is None:
            ahead = self.foresight.place(self.foreseen(features, proprio_BP))
        else:
            ahead = self.foresight.told(features.stop_BP.to(proprio_BP.dtype))
        kept, clock = age >= 0, _clock(age)
        told = self.state(states.unflatten(-1, (self._queries, -1))) if self._queries else None
        if self.point is not None and told is not None:
            told = told + self.point(points.unflatten(-1, (self._queries, -1)))
        tokens = self.proprio(proprio)[:, :, None]
        tokens = tokens if told is None else torch.cat([told, tokens], 2)
        tokens = self.norm(tokens + self.time(clock)[:, :, None])
        tokens = torch.where(kept[..., None], tokens, self.empty)
        placed = torch.cat([points, proprio, clock, torch.ones_like(age)], -1) * kept
        now = [proprio_BP, ahead, _WAY * (ahead - proprio_BP)]
        if features.pointed_BQE is not None:
            now.insert(0, features.pointed_BQE.to(proprio_BP.dtype).flatten(1))
        return tokens.flatten(1, 2), self.stem(torch.cat([*now, placed.flatten(1)], 1))

    def foreseen(self, features: Features, proprio_BP: Tensor) -> Tensor:
        """Logits of the state in which the robot will stop next (`vla.model.memory.foresight`). In place of its words,
        a backbone that does not tell them gives the queries' states after the first layer: nearly the instruction's."""
        dtype, views = proprio_BP.dtype, self.foresight.views
        _, _, proprio, sketch, age = self._split(features, dtype)
        kept_BM, words = age[..., 0] >= 0, features.words_BD
        if words is None:
            words = features.queries_BLQD[:, 0].mean(1)
        changed = changes(sketch, sketch_of(features, views).to(dtype), kept_BM, views)
        return self.foresight(changed, proprio_BP, proprio, kept_BM, words.to(dtype))

    def foresight_loss(self, features: Features, proprio_BP: Tensor) -> Tensor:
        """How badly the features' `stop_BP` was foreseen."""
        return self.foresight.loss(self.foreseen(features, proprio_BP), features.stop_BP)

    def _split(self, features: Features, dtype: torch.dtype) -> tuple[Tensor, ...]:
        memory_BMK = features.memory_BMK
        if memory_BMK is None or memory_BMK.shape[-1] != sum(self._parts):
            given = 0 if memory_BMK is None else memory_BMK.shape[-1] - 1
            raise ValueError(f"the memory's rows have {self.row_width} numbers, got {given}")
        return memory_BMK.to(dtype).split(self._parts, dim=-1)


def _clock(age: Tensor) -> Tensor:
    """(..., 1) control steps as (..., 2 * _PERIODS) sines and cosines."""
    angle = age * (2 * torch.pi / 2.0 ** torch.arange(3, 3 + _PERIODS, device=age.device))
    return torch.cat([angle.sin(), angle.cos()], -1).to(age.dtype)
