"""Which of an episode's earlier decisions a policy looks at again, and the memories of the episodes under way.

A rule (`vla.model.config.MemoryConfig`) chooses M of them, the same while training (`vla.model.memory.tokens.replayed`,
over demonstrations) and while acting (`EpisodeMemory`). Memory-bank sampling after 4D-VLA, arXiv 2506.22242, whose rule
is published in words only. Imports no torch: exported policies remember, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vla.model.config import MemoryConfig

RULES = {"bank": "longest way, foresight"} | dict.fromkeys(("uniform", "last", "current"), "foresight")
"""Meanings of the rules today: a policy acts by the one that it has learnt with, and they have changed."""
MOST_KEPT = 512
"""Decisions that the rule "uniform" keeps of an episode; of a longer one only every second, and so on."""
EMPTY = -1.0
"""The age of a row that holds nothing yet."""


class Recall[RowT]:
    """The decisions that are kept of one episode. A row is whatever the caller keeps of a decision."""

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._count = 0
        self._kept: list[tuple[int, RowT, NDArray[np.float32]]] = []

    def look(self) -> list[tuple[int, RowT]]:
        """(how many decisions ago, row) of the decisions to look at again now, oldest first: M at most."""
        kept = self._kept
        if self._config.rule == "uniform" and len(kept) > self._config.frames:
            numbers = np.array([number for number, _, _ in kept])
            wanted = np.linspace(0, numbers[-1], self._config.frames)
            kept = [kept[place] for place in np.unique(np.abs(numbers[:, None] - wanted).argmin(0))]
        return [(self._count - number, row) for number, row, _ in kept]

    def add(self, row: RowT, key: NDArray[np.float32]) -> None:
        """The decision just made. `key`: a unit vector that says what its frame looked like."""
        config, kept = self._config, self._kept
        if config.rule != "current":
            kept.append((self._count, row, key))
        self._count += 1
        if config.rule == "last":
            del kept[: -config.frames]
        elif config.rule == "uniform" and len(kept) > MOST_KEPT:
            del kept[1::2]
        elif config.rule == "bank" and len(kept) > config.frames:
            del kept[redundant(np.stack([key for _, _, key in kept]))]


def redundant(keys_KS: NDArray[np.float32]) -> int:
    """The frame of K, in the order of time, that is missed least: without it the way from frame to frame is
    shortened least. So what stands still or passes by goes, and places where the way turns stay, also if
    they were visited before. The first frame stays. ValueError for fewer than two frames."""
    if len(keys_KS) < 2:
        raise ValueError("of a single frame none is redundant")
    step = np.linalg.norm(keys_KS[1:] - keys_KS[:-1], axis=1)
    across = np.linalg.norm(keys_KS[2:] - keys_KS[:-2], axis=1)
    shorter = np.append(step[:-1] + step[1:] - across, step[-1])
    # Where nothing moves, rounding must not choose, since training rounds otherwise: of equals the newest goes.
    return len(keys_KS) - 1 - int(shorter.round(4)[::-1].argmin())


def nothing(config: MemoryConfig, batch: int, width: int) -> NDArray[np.float32]:
    """(B, M, K + 1) rows that hold nothing yet, as at an episode's first decision; `width` is K."""
    memory = np.zeros((batch, config.frames, width + 1), np.float32)
    memory[..., -1] = EMPTY
    return memory


class EpisodeMemory:
    """The memories of the episodes under way, by the number of their environment or client."""

    def __init__(self, config: MemoryConfig, steps: int) -> None:
        """`steps`: control steps from one decision to the next."""
        self._config, self._steps = config, steps
        self._recalls: dict[int, Recall[NDArray[np.float32]]] = {}

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Forget these episodes (all when None)."""
        if env_ids is None:
            self._recalls.clear()
        for env in env_ids or ():
            self._recalls.pop(int(env), None)

    def read(self, env_ids: Sequence[int], width: int) -> NDArray[np.float32]:
        """The rows to look at now (B, M, K + 1), their ages in control steps in the last column; `width` is K."""
        memory = nothing(self._config, len(env_ids), width)
        for place, env in enumerate(env_ids):
            for slot, (ago, row) in enumerate(self._recall(env).look()):
                memory[place, slot, :-1], memory[place, slot, -1] = row, ago * self._steps
        return memory

    def add(self, env_ids: Sequence[int], rows_BK: NDArray[np.float32], keys_BS: NDArray[np.float32]) -> None:
        """The decisions just made in these environments."""
        for env, row, key in zip(env_ids, rows_BK.copy(), keys_BS, strict=True):
            self._recall(env).add(row, key)

    def _recall(self, env: int) -> Recall[NDArray[np.float32]]:
        return self._recalls.setdefault(int(env), Recall(self._config))
