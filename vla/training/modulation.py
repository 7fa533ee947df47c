"""Learning new tasks with a pool of modulators (`vla.model.modulators`): one dataset after another, without the old
ones. Which modulator a frame learns with is chosen by the first observation of its episode, as it is when acting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vla.data.batches import Batch, Source
from vla.data.fitting import aligned
from vla.data.lerobot_dataset import DemoSet
from vla.model.config import ModulatorConfig
from vla.model.model import VLA
from vla.model.modulators import IDENTITY, frozen
from vla.model.routing import query
from vla.runtime.distributed import launched

PULL = 0.5
"""Weight of the cosine between queries and their keys, as published."""
_AT_ONCE = 64
_MISSED = 0.1
"""Share of a dataset's episodes above which it is told that they choose no modulator."""


def episode_queries(vla: VLA, demos: DemoSet, name: str = "") -> tuple[Tensor, Tensor]:
    """The queries (E, K) of the first observations of E episodes, and the episode (F,) of each frame, from 0 on.
    ValueError, with the `name` of the dataset, for one that does not fit the policy."""
    demos, _ = aligned(vla.processor, demos, name=name)
    numbers = demos.episode_index
    begins = np.flatnonzero(np.concatenate([[True], numbers[1:] != numbers[:-1]]))
    queries = []
    with torch.no_grad():
        for part in np.array_split(begins, -(-len(begins) // _AT_ONCE)):
            inp = vla.processor.prepare(demos.observation(part))
            with frozen(vla, len(part)):
                queries.append(query(vla, inp).cpu())
    lengths = np.diff([*begins, demos.num_frames])
    return torch.cat(queries), torch.arange(len(begins)).repeat_interleave(torch.from_numpy(lengths))


def extend(vla: VLA, config: ModulatorConfig | None, known: Mapping[str, DemoSet], *, seed: int) -> list[str]:
    """Make a trained policy ready to learn a new dataset with modulators; lines to tell the user.

    A policy without a pool gets one of `config`, whose `known` datasets show what it could do before. One that has a
    pool goes on with it. ValueError naming the fix where both or neither is given, and for a policy that cannot have
    modulators.
    """
    if vla.members and config is not None:
        raise ValueError("modulators are for a policy of one robot, and this one was trained for several")
    if vla.pool is None:
        if config is None:
            return []
        if not known and config.known_keys:
            raise ValueError("show what the policy could do before, so that it keeps that: --known DATASET")
        vla.add_modulators(config, seed=seed)
        if known:
            vla.pool.know(torch.cat([episode_queries(vla, part, name)[0] for name, part in known.items()]))
        return [f"where it is asked as in {', '.join(known)}, the policy stays as it is"] if known else []
    have = vla.pool.config
    if known:
        raise ValueError("this policy's modulators know already what was known before them: leave out --known")
    if config is not None and replace(config, known_keys=have.known_keys) != have:
        raise ValueError(f"this policy has a pool already, of {have.count} modulators: leave out --modulators")
    used = int((vla.pool.counts_M > 0).sum())
    lines = [f"{used} of {have.count} modulators hold what was learnt before this dataset"]
    if used == have.count:
        lines.append("warning: all modulators are in use: the one used least will forget what it has learnt")
    return lines


def unrecognised(vla: VLA, demos: DemoSet) -> list[str]:
    """A warning where the policy would act in many of a dataset's episodes as it did before it learnt the dataset."""
    if vla.pool is None:
        return []
    chosen_E = vla.pool.match(episode_queries(vla, demos)[0].to(vla.device))
    missed = int((chosen_E == IDENTITY).sum())
    if missed <= _MISSED * len(chosen_E):
        return []
    return [
        f"warning: in {missed} of {len(chosen_E)} episodes of this dataset the policy takes what is asked for what it "
        "knew before, and does that: give other words to the new task, or leave what is like it out of --known"
    ]


class Asking:
    """A source whose batches hold the query of each frame's episode."""

    def __init__(self, source: Source, query_EK: Tensor, episode_F: Tensor) -> None:
        self._source, self._query_EK, self._episode_F = source, query_EK, episode_F

    @property
    def sizes(self) -> tuple[int, ...]:
        """Frames of each dataset, as of the source."""
        return self._source.sizes

    def weigh(self, frames: Tensor) -> float:
        """`Batch.weight` of these frames, as of the source."""
        return self._source.weigh(frames)

    def take(self, frames: Tensor) -> Batch:
        """The source's batch of these frames, with their queries."""
        return replace(self._source.take(frames), query_BK=self._query_EK[self._episode_F[frames]])


def asking(vla: VLA, demos: DemoSet, source: Source, *, begun: bool) -> Source:
    """The source, with queries if the policy has modulators. `begun`: this run was begun before, so that what has been
    used since counts for this dataset still. ValueError for several processes."""
    if vla.pool is None:
        return source
    if launched()[1] > 1:
        raise ValueError("modulators learn in one process: leave out the others, or train without --modulators")
    query_EK, episode_F = episode_queries(vla, demos)
    if not begun:
        vla.pool.begin_dataset(query_EK)
    return Asking(source, query_EK, episode_F)


@contextmanager
def routed(vla: VLA, batch: Batch) -> Iterator[Tensor | float]:
    """Within this, each row of the batch is computed with the modulator chosen for it, which counts as used; yields
    what to add to the loss. Nothing happens for a policy without modulators."""
    if vla.pool is None:
        yield 0.0
        return
    assert batch.query_BK is not None
    chosen_B = vla.pool.learn(batch.query_BK)
    with vla.pool.applied(chosen_B):
        yield -PULL * vla.pool.pull(batch.query_BK, chosen_B)
