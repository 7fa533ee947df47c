"""An evaluation's worst failures in pictures: the first and the last one of each episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla.core.types import Observation

Outcome = Literal["success", "wrong object", "diverged", "out of time"]
"""How an episode ended. Diverged: the simulation blew up."""


@dataclass(frozen=True)
class Failure:
    """A failed episode."""

    episode: int
    """Its place among the seeds."""
    instruction: str
    outcome: Outcome
    first: NDArray[np.uint8]
    """(H, W, 3): the cameras side by side, as the policy saw them before its first decision."""
    last: NDArray[np.uint8]
    """(H, W, 3): as the episode ended."""


class Failures:
    """Keeps the worst `most` of the failed episodes that `evaluate` shows it.

    Worst are those in `unexpected` scenes (of everything, if None); of these, episodes that handled another object than
    the one counted; of these, the earliest. So which are kept does not depend on the order in which they ended.
    """

    def __init__(self, most: int, unexpected: NDArray[np.bool_] | None = None) -> None:
        """`unexpected` (episodes,): where a failure means most, for instance where another policy succeeds."""
        self.most, self._unexpected = most, unexpected
        self.kept: list[Failure] = []
        """The worst first."""
        self._begun: dict[int, tuple[str, NDArray[np.uint8]]] = {}

    def begin(self, episode: int, obs: Observation, world: int, instruction: str) -> None:
        """Note the first picture of an episode that plays in environment `world`."""
        self._begun[episode] = (instruction, _picture(obs, world))

    def end(self, episode: int, obs: Observation, world: int, outcome: Outcome) -> None:
        """Keep the episode if it is among the worst failures so far."""
        instruction, first = self._begun.pop(episode)
        if outcome == "success":
            return
        self.kept.append(Failure(episode, instruction, outcome, first, _picture(obs, world)))
        self.kept = sorted(self.kept, key=self._rank)[: self.most]

    def _rank(self, failure: Failure) -> tuple[bool, bool, int]:
        expected = self._unexpected is not None and not self._unexpected[failure.episode]
        return expected, failure.outcome != "wrong object", failure.episode


def _picture(obs: Observation, world: int) -> NDArray[np.uint8]:
    return np.concatenate([image[world] for image in obs.images.values()], axis=1)
