"""The budgets that every arm may spend on learning, and the clock by which they are measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vla.core.types import Policy
from vla.runtime.devices import choose_device

BUDGETS = ("seconds", "steps")


@dataclass(frozen=True)
class Budget:
    """So many seconds of learning, or so many gradient steps."""

    kind: Literal["seconds", "steps"]
    amount: int

    @property
    def label(self) -> str:
        """The end of an arm's name: 300s, 200steps."""
        return f"{self.amount}{'s' if self.kind == 'seconds' else 'steps'}"


@dataclass(frozen=True)
class Learnt:
    """A trained policy, and what its training took."""

    policy: Policy
    steps: int
    """Gradient steps; of RL those of the imitation before it."""
    seconds: float
    """Time of learning on the budget's clock."""
    wall_seconds: float
    parameters: int
    trained_parameters: int
    """Those of them that learn; the others are frozen."""
    batch_size: int
    chunk_size: int
    n_action_steps: int
    folder: Path | None = None


def on_gpu() -> bool:
    """True where learning runs on a GPU, whose clock is the wall's."""
    return choose_device("auto") != "cpu"


def clock() -> float:
    """Seconds of learning so far in this process: on a CPU the time that its one core has computed for it, which other
    programs on a busy machine do not lengthen; on a GPU the wall's."""
    return time.monotonic() if on_gpu() else time.process_time()


def steps_within(seconds: float, first: float, each: float) -> int:
    """How many steps of `each` seconds fit into `seconds`, after `first` seconds of preparation; at least 1."""
    return max(1, int((seconds - first) / max(each, 1e-9)))
