"""A log of a run in which somebody could take over, at the rate of the policy that shall learn from it.

A robot is commanded more often than its policy decides. What a policy at its own rate would have had to say for the
same motion: the sum of the displacements sent within one of its steps, the position and the switch at the step's end,
the mean velocity. A step is the person's only if all of it was, and the policy's likewise; else it is a hand-over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.control.config import ticks_per_step
from policies.control.guards import Kind
from policies.control.playback import Driver


@dataclass(frozen=True)
class Steps:
    """S steps of the policy in an episode of a log."""

    first: tuple[int, ...]
    """Index of the tick at which each begins: what is seen then is what the policy would have decided by."""
    last: tuple[int, ...]
    """Index of the tick at which each ends."""
    driver: tuple[Driver, ...]
    """Who drove."""
    _edges: tuple[Fraction, ...]

    @property
    def count(self) -> int:
        """Number of steps S."""
        return len(self.first)

    def actions(self, sent_TA: NDArray[np.float64], kinds: Sequence[Kind]) -> NDArray[np.float32]:
        """(S, A) actions of these steps, of those that were sent at T ticks."""
        edges = np.array([float(edge) for edge in self._edges])
        summed = np.concatenate([np.zeros((1, sent_TA.shape[1])), sent_TA.cumsum(0)])
        at = np.stack([np.interp(edges, np.arange(len(summed)), column) for column in summed.T], 1)
        totals, ends = np.diff(at, axis=0), sent_TA[list(self.last)]
        kind = np.array(kinds)
        mean = totals / np.diff(edges)[:, None]
        chosen = np.where(kind == "displacement", totals, np.where(kind == "velocity", mean, ends))
        return chosen.astype(np.float32)


def steps_of(drivers: Sequence[Driver], robot_hz: float, policy_hz: float | None) -> Steps:
    """The policy's steps in an episode whose T ticks these drove; an unfinished last one is left out."""
    per_step = ticks_per_step(robot_hz, policy_hz)
    count = int(len(drivers) / per_step)
    edges = tuple(k * per_step for k in range(count + 1))
    first = tuple(math.floor(edge) for edge in edges[:-1])
    last = tuple(math.ceil(edge) - 1 for edge in edges[1:])
    who: list[Driver] = []
    for begin, end in zip(first, last, strict=True):
        driven = set(drivers[begin : end + 1])
        who.append(driven.pop() if len(driven) == 1 else "hand_over")
    return Steps(first, last, tuple(who), edges)


def episodes_of(ticks: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The ticks of each scene that a simulated robot played in a run, in order; of any other robot all in one."""
    episodes: list[list[dict[str, Any]]] = []
    for tick in ticks:
        if not episodes or tick.get("scene") != episodes[-1][-1].get("scene"):
            episodes.append([])
        episodes[-1].append(tick)
    return episodes
