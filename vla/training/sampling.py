"""Which frames of the demonstrations make up a batch: a function of the run's seed and the step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet
    from vla.model.model import VLA

_MOVES, _MOVING_SHARE = 1.2, 0.6
"""A frame moves if within its chunk the normalised state gets so far; and the share of the batches of such frames."""


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
    seed: int,
    step: int,
    batch_size: int,
    sizes: Sequence[int],
    weights: Sequence[float] | None,
    often: Sequence[Tensor] | None = None,
) -> Tensor:
    """(batch_size,) frames of a step from several datasets laid end to end; each gets its share to within one frame.

    Drawn with replacement: a dataset's place in its epoch would depend on all steps before. One dataset: in epochs.
    `often`: of each dataset the numbers of frames to draw, as often as they stand there, instead of each once.
    """
    if often is not None:
        places = mixed_frames(seed, step, batch_size, [len(numbers) for numbers in often], weights)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        return torch.cat([numbers + start for numbers, start in zip(often, starts, strict=True)])[places]
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


def moving_often(state_FP: NDArray[np.float32], episode_F: NDArray[np.int64], chunk_size: int) -> Tensor:
    """Numbers of the F frames of a dataset, those in which the robot is about to move as often as makes them
    `_MOVING_SHARE` of all; never fewer than once.

    Of a demonstration that mostly waits only a few frames say which way to go then, and by the rest it is a mistake to
    go anywhere: an L1 loss stands still, whatever it is told of the way.
    """
    ahead = np.minimum(np.arange(len(state_FP))[:, None] + np.arange(1, chunk_size + 1), len(state_FP) - 1)
    apart = np.linalg.norm(state_FP[ahead] - state_FP[:, None], axis=-1) * (episode_F[ahead] == episode_F[:, None])
    moving, still = (np.flatnonzero(moves) for moves in ((apart.max(1) > _MOVES), (apart.max(1) <= _MOVES)))
    times = round(_MOVING_SHARE / (1 - _MOVING_SHARE) * len(still) / max(1, len(moving)))
    return torch.from_numpy(np.sort(np.concatenate([still, *[moving] * max(1, times)])))


def drawn_often(vla: VLA, demos: Mapping[str, DemoSet]) -> list[Tensor] | None:
    """`moving_often` of each dataset, by its robot's name, for a policy that remembers: it is there for demonstrations
    in which one waits. None for any other."""
    if vla.config.memory is None:
        return None
    states = {
        name: vla.members.get(name, vla.processor).normalise_proprio(part.proprio).numpy()
        for name, part in demos.items()
    }
    return [moving_often(states[name], part.episode_index, vla.chunk_size) for name, part in demos.items()]


def mix(seed: int, number: int) -> int:
    """A generator seed from two integers; neighbours must not give related streams."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{number}".encode(), digest_size=7).digest())
