"""Which frames of the demonstrations make up a batch: a function of the run's seed and the step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def batch_frames(seed: int, step: int, batch_size: int, num_frames: int) -> Tensor:
    """(batch_size,) frames of a step. Epochs are permutations laid end to end: every frame once before any twice."""
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // num_frames, (last - 1) // num_frames + 1):
        order = torch.randperm(num_frames, generator=torch.Generator().manual_seed(mix(seed, epoch)))
        begin = epoch * num_frames
        parts.append(order[max(first - begin, 0) : last - begin])
    return torch.cat(parts)


def mixed_frames(
    seed: int, step: int, batch_size: int, sizes: Sequence[int], weights: Sequence[float] | None
) -> Tensor:
    """(batch_size,) frames of a step from several datasets laid end to end; each gets its share to within one frame.

    Drawn with replacement: a dataset's place in its epoch would depend on all steps before. One dataset: in epochs.
    """
    if len(sizes) == 1:
        return batch_frames(seed, step, batch_size, sizes[0])
    generator = torch.Generator().manual_seed(mix(seed, step))
    size = torch.tensor(sizes)
    share = torch.tensor(weights if weights is not None else sizes, dtype=torch.float64)
    edges = (share / share.sum()).cumsum(0)[:-1]
    # One random offset for evenly spaced points (systematic sampling): every batch has nearly the exact shares.
    points = (torch.arange(batch_size) + torch.rand(1, generator=generator, dtype=torch.float64)) / batch_size
    member = torch.searchsorted(edges, points, right=True)
    within = (torch.rand(batch_size, generator=generator, dtype=torch.float64) * size[member]).long()
    return (size.cumsum(0) - size)[member] + within


def mix(seed: int, number: int) -> int:
    """A generator seed from two integers; neighbours must not give related streams."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{number}".encode(), digest_size=7).digest())
