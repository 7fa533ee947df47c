"""Where the robot will stop next, told from what has changed among the frames that are remembered.

A choice that was seen seconds ago shows in a few frames of a demonstration's actions, and the median of several ways
to go is the middle one: imitation by actions alone learns the layouts by heart and goes to the middle. So the choice is
learnt by itself, by every frame: a small network names the state in which the robot next stands still (known in
hindsight), as one of several bins. The bridge reads the most probable place; while training it is told the true one.
The network sees little that tells one demonstration from another: the words, the states, and where tokens changed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vla.backbones.features import Features

BINS, LIMIT = 15, 1.4
"""Bins of each number of a normalised state (-1 to 1 for most), and the centre of the last one."""
GRID, CHANNELS = 6, 16
"""A sketch of a frame keeps of each view GRID x GRID places, of each so many numbers."""
_STANDS_OUT = 3.0
"""A place has changed whose sketch is further from the frames' median than so often the view's median place: a hand's
camera sees everything move."""
_NOISE, _SAID, _DROPOUT, _HIDDEN = 0.3, 3.0, 0.2, 128
"""Noise on the states, for whose details layouts are known by heart; scale of the words (noise 1 on it)."""
_TOLD_WITHIN = 0.03
"""So much the told place is off while training, as one that is foreseen is."""
_STILL, _ELSEWHERE = 0.4, 1.2
"""In normalised states: from the frame before to the frame after, and from the state now."""


def stops(state_FP: NDArray[np.float32], episode_F: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every frame, the next one of its episode in which the robot stands still elsewhere; the episode's last frame
    where there is none."""
    found = np.empty(len(episode_F), np.int64)
    for episode in np.unique(episode_F):
        rows = np.flatnonzero(episode_F == episode)
        state, last = state_FP[rows], len(rows) - 1
        still = np.zeros(len(rows), bool)
        still[1:last] = np.linalg.norm(state[2:] - state[:-2], axis=1) < _STILL
        still[last] = True
        resting = np.flatnonzero(still)
        for frame, row in enumerate(rows):
            ahead = resting[resting > frame]
            far = ahead[np.linalg.norm(state[ahead] - state[frame], axis=1) > _ELSEWHERE]
            found[row] = rows[far[0] if len(far) else last]
    return found


def sketch_of(features: Features, views: int) -> Tensor:
    """(B, views * GRID^2 * CHANNELS): the last layer's tokens, averaged over places, as products with the first cosines
    over their normalised channels."""
    raw = F.layer_norm(features.raw_BLND[:, -1].float(), features.raw_BLND.shape[-1:])
    width, coords = raw.shape[-1], features.coords_NE.to(raw.device)
    x, y = (((coords[:, axis].float() + 1) / 2 * GRID).floor().clamp(0, GRID - 1) for axis in (0, 1))
    place = (coords[:, 2].float() * GRID + y) * GRID + x
    at_NG = (place[:, None] == torch.arange(views * GRID * GRID, device=raw.device)).float()
    at = at_NG if features.raw_mask_BN is None else at_NG * features.raw_mask_BN[..., None]
    mean = at.transpose(-2, -1) @ raw / at.sum(-2)[..., None].clamp(min=1)
    angle = math.pi / width * (torch.arange(width, device=raw.device) + 0.5)
    basis = (angle[:, None] * torch.arange(1, CHANNELS + 1, device=raw.device)).cos() * math.sqrt(2 / width)
    return (mean @ basis).flatten(1)


def changes(sketch_BMS: Tensor, now_BS: Tensor, kept_BM: Tensor, views: int) -> Tensor:
    """(B, views * GRID^2): how much each place stood out in the frames that are kept. What is not there yet is as
    now. `kept_BM`: bool."""
    frames = torch.where(kept_BM[..., None], sketch_BMS, now_BS[:, None]).unflatten(2, (views, GRID * GRID, CHANNELS))
    median = frames.sort(1).values[:, (frames.shape[1] - 1) // 2, None]
    off = (frames - median).square().sum(-1).add(1e-8).sqrt()  # (B, M, V, G)
    usual = off.sort(-1).values[..., (GRID * GRID - 1) // 2, None]
    return ((off - _STANDS_OUT * usual).relu() * kept_BM[..., None, None]).sum(1).flatten(1)


class Foresight(nn.Module):
    """A small network: memory, words and state -> bins of the state in which the robot will stop next."""

    def __init__(self, *, frames: int, views: int, proprio_dim: int, word_width: int) -> None:
        super().__init__()
        self.views = views
        self.words = nn.Linear(word_width, 8)
        seen = views * GRID * GRID + proprio_dim + frames * (proprio_dim + 1) + 8
        self.read = nn.Sequential(
            nn.Linear(seen, _HIDDEN),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_HIDDEN, proprio_dim * BINS),
        )
        self.register_buffer("centres", torch.linspace(-LIMIT, LIMIT, BINS), persistent=False)

    def forward(
        self, changes_BG: Tensor, proprio_BP: Tensor, felt_BMP: Tensor, kept_BM: Tensor, words: Tensor
    ) -> Tensor:
        """Logits (B, P, BINS) of changes, the state now and in the frames kept, and the instruction's mean word."""
        kept, said = kept_BM[..., None].to(proprio_BP.dtype), _SAID * F.layer_norm(words, words.shape[-1:])
        if self.training:
            proprio_BP = proprio_BP + _NOISE * torch.randn_like(proprio_BP)
            felt_BMP = felt_BMP + _NOISE * torch.randn_like(felt_BMP)
            said = said + torch.randn_like(said)
        felt = torch.cat([felt_BMP, torch.ones_like(kept)], -1) * kept
        seen = torch.cat([6.0 * changes_BG, proprio_BP, felt.flatten(1), self.words(said)], 1)
        return self.read(seen).unflatten(1, (-1, BINS))

    def told(self, state_BP: Tensor) -> Tensor:
        """A state known in hindsight as the bridge is told it while training: not to the millimetre."""
        state_BP = state_BP.clamp(-LIMIT, LIMIT)
        return state_BP + _TOLD_WITHIN * (2 * torch.rand_like(state_BP) - 1) if self.training else state_BP

    def place(self, logits_BPK: Tensor) -> Tensor:
        """(B, P): the mode, to a fraction of a bin - of several places one, and none between them."""
        share = F.pad(logits_BPK.softmax(-1), (1, 1))
        three = share.unfold(-1, 3, 1)  # each bin with its neighbours
        best = three.sum(-1).argmax(-1, keepdim=True)
        step = float(2 * LIMIT / (BINS - 1))
        off = ((three[..., 2] - three[..., 0]) / three.sum(-1)).gather(-1, best)
        return (self.centres[best] + step * off).squeeze(-1)

    def loss(self, logits_BPK: Tensor, state_BP: Tensor) -> Tensor:
        """Mean cross entropy of a state's numbers, each shared among the two bins beside it."""
        place = (state_BP.clamp(-LIMIT, LIMIT) + LIMIT) / (2 * LIMIT) * (BINS - 1)
        target = (1 - (place[..., None] - torch.arange(BINS, device=place.device)).abs()).clamp(min=0)
        return -(target * logits_BPK.log_softmax(-1)).sum(-1).mean()
