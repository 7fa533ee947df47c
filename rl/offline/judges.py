"""Who says that an episode's task is done: the simulator, or a classifier that sees what the robot sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rl.rewards.success_classifier import SuccessClassifier
from vla.core.types import Observation

Flags = NDArray[np.bool_]


class Judge(Protocol):
    """Ends episodes, and thereby rewards them."""

    def begin(self, ids: NDArray[np.int64]) -> None:
        """New episodes begin in these environments."""

    def verdict(self, obs: Observation, seen_BS: Tensor, success_B: Flags) -> Flags:
        """(B,) whose task is done, called once a decision. `seen_BS`: the observation's summary
        (`rl.models.policy_inputs.summary`); `success_B`: the simulator's word so far."""
        ...


class InARow:
    """Says that a task is done when something has been true at `patience` decisions in a row."""

    def __init__(self, num_envs: int, patience: int) -> None:
        self.patience = patience
        self._count = np.zeros(num_envs, np.int64)

    def begin(self, ids: NDArray[np.int64]) -> None:
        """See `Judge.begin`."""
        self._count[ids] = 0

    def count(self, said_B: Flags) -> Flags:
        """(B,) true this often in a row."""
        self._count = np.where(said_B, self._count + 1, 0)
        return self._count >= self.patience


class SimulatorJudge(InARow):
    """The simulator's word. A patience of 2 lets an episode go on for one decision, so that its end is seen."""

    def __init__(self, num_envs: int, patience: int = 1) -> None:
        super().__init__(num_envs, patience)

    def verdict(self, obs: Observation, seen_BS: Tensor, success_B: Flags) -> Flags:
        """See `Judge.verdict`."""
        return self.count(success_B)


class ClassifierJudge(InARow):
    """The classifier's word; the simulator is not asked."""

    def __init__(self, num_envs: int, classifier: SuccessClassifier) -> None:
        super().__init__(num_envs, classifier.patience)
        self.classifier = classifier

    def verdict(self, obs: Observation, seen_BS: Tensor, success_B: Flags) -> Flags:
        """See `Judge.verdict`."""
        return self.count((self.classifier(seen_BS) > self.classifier.threshold).numpy())


class PictureJudge(InARow):
    """Somebody else's word, who looks at the cameras' pictures."""

    def __init__(self, num_envs: int, says: Callable[[Observation], Flags], patience: int = 2) -> None:
        super().__init__(num_envs, patience)
        self.says = says

    def verdict(self, obs: Observation, seen_BS: Tensor, success_B: Flags) -> Flags:
        """See `Judge.verdict`."""
        return self.count(self.says(obs))
