"""Where a training batch comes from: cached features, images, several robots' datasets. Frame numbers in, tensors out.

Images pass through the same `Processor` as in serving; nothing here changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vla.backbones.features import Features
from vla.data.lerobot_dataset import DemoSet
from vla.processing.batch import ModelInput
from vla.processing.processor import Processor


@dataclass(frozen=True, eq=False)
class Batch:
    """Training batch of one step, or of one accumulated part of it."""

    seen: Features | ModelInput
    """Features of a frozen backbone, else the inputs of one that learns."""
    proprio_BP: Tensor
    action_BCA: Tensor
    """float32, normalised."""
    mask: Tensor
    """(B, C), or (B, C, A) where robots with different actions mix: 0 is padding."""
    query_BK: Tensor | None = None
    """Queries of the frames' episodes to a pool of modulators (`vla.training.modulation`)."""
    latent: Tensor | None = None
    """The teacher's latents, standardised, while a student is being aligned (`vla.training.distillation`)."""
    told_B: Tensor | None = None
    """Labels of the actions (`vla.model.advantage`), for a policy that is told."""

    @property
    def weight(self) -> float:
        """How many targets count: a part of a batch has this much say in the whole's mean."""
        return float(self.mask.sum(dtype=torch.float64))

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        seen = self.seen.to(device=device) if isinstance(self.seen, Features) else self.seen.to(device)
        query = None if self.query_BK is None else self.query_BK.to(device)
        latent = None if self.latent is None else self.latent.to(device)
        told = None if self.told_B is None else self.told_B.to(device)
        action, mask = self.action_BCA.to(device), self.mask.to(device)
        return Batch(seen, self.proprio_BP.to(device), action, mask, query_BK=query, latent=latent, told_B=told)


class Source(Protocol):
    """Frames to learn from, numbered from 0."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Frames of each dataset; their numbers follow one another."""

    def weigh(self, frames: Tensor) -> float:
        """`Batch.weight` of these frames, without making the batch."""

    def take(self, frames: Tensor) -> Batch:
        """The batch of these frames, on the CPU."""


def chunk_targets(processor: Processor, demos: DemoSet, chunk_size: int, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised actions (B, C, A) from these frames on, and their mask: (B, C), or (B, C, A) if A is padded."""
    action, mask_BC = demos.chunks(chunk_size, frames.numpy())
    mask = torch.from_numpy(mask_BC)
    if processor.config.action_slots is not None:
        mask = mask[..., None] * torch.from_numpy(processor.action_mask)
    return torch.from_numpy(processor.normalise_action(action, demos.proprio[frames.numpy()])), mask


class LiveDemos:
    """Demonstrations as images, for a backbone that learns or for augmented pictures."""

    def __init__(self, processor: Processor, demos: DemoSet, chunk_size: int) -> None:
        self._processor, self._demos, self._chunk_size = processor, demos, chunk_size
        processor.tokenise(sorted(set(demos.instruction)))  # here, so that one that is too long is known at once

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of frames of the one dataset, as a tuple."""
        return (self._demos.num_frames,)

    def weigh(self, frames: Tensor) -> float:
        """`Batch.weight` of these frames: the number of targets that count, computed without decoding images."""
        mask = self._demos.chunks(self._chunk_size, frames.numpy())[1]
        return float(mask.sum(dtype=np.float64) * _components(self._processor))

    def take(self, frames: Tensor) -> Batch:
        """The batch of these frames on the CPU, images decoded and actions normalised."""
        inp = self._processor.prepare(self._demos.observation(frames.numpy()))
        action, mask = chunk_targets(self._processor, self._demos, self._chunk_size, frames)
        return Batch(inp, inp.proprio_BP, action, mask)


class Joined:
    """Several sources as one: frames of each are taken from it and joined in the requested order."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._starts = np.cumsum([0, *(sum(source.sizes) for source in sources)])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of frames of each dataset, in the order of the sources."""
        return tuple(size for source in self._sources for size in source.sizes)

    def weigh(self, frames: Tensor) -> float:
        """`Batch.weight` of these frames, summed over the sources they come from."""
        return sum(source.weigh(local) for source, local, _ in self._split(frames))

    def take(self, frames: Tensor) -> Batch:
        """The batch of these frames on the CPU, in the order of `frames`, whichever source each comes from."""
        split = self._split(frames)
        parts = [source.take(local) for source, local, _ in split]
        back = torch.argsort(torch.cat([places for _, _, places in split]))
        seen = [part.seen for part in parts]
        together = Features.cat(seen) if isinstance(seen[0], Features) else ModelInput.cat(seen, torch.cat)
        cat = lambda name: torch.cat([getattr(part, name) for part in parts])[back]  # noqa: E731
        return Batch(together.select(back), cat("proprio_BP"), cat("action_BCA"), cat("mask"))

    def _split(self, frames: Tensor) -> list[tuple[Source, Tensor, Tensor]]:
        """(source, its own frame numbers, their places in `frames`) of every source that contributes."""
        which = torch.from_numpy(np.searchsorted(self._starts, frames.numpy(), side="right") - 1)
        parts = []
        for i, source in enumerate(self._sources):
            places = (which == i).nonzero().squeeze(1)
            if len(places):
                parts.append((source, frames[places] - int(self._starts[i]), places))
        return parts


def join(parts: Mapping[str, Source]) -> Source:
    """One source of several datasets'; a single one as it is."""
    return Joined(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))


class Ahead[T]:
    """Fetches step n + 1 in a thread while step n is being used: decoding and learning overlap."""

    def __init__(self, fetch: Callable[[int], T]) -> None:
        self._fetch, self._pool = fetch, ThreadPoolExecutor(1)
        self._next: tuple[int, Future[T]] | None = None

    def get(self, step: int, last: bool) -> T:
        """Return the result of `step` and start fetching the next one in the background unless this is the `last`."""
        ready = self._next[1].result() if self._next is not None and self._next[0] == step else self._fetch(step)
        self._next = None if last else (step + 1, self._pool.submit(self._fetch, step + 1))
        return ready

    def close(self) -> None:
        """Stop the background thread and drop a fetch that has not started."""
        self._pool.shutdown(cancel_futures=True)


def _components(processor: Processor) -> int:
    """Contribution of one unmasked step to `Batch.weight`."""
    return 1 if processor.config.action_slots is None else len(processor.config.action_names)
