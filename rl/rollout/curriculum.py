"""Curriculum: which task the next episode has, drawn by how often each has succeeded lately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl import streams
from rl.configs.run import CurriculumConfig
from vla.core.config import lookup
from vla.core.types import VecEnv

Rule = Callable[[NDArray[np.float64], float], NDArray[np.float64]]
"""(success rates of the tasks, temperature) -> weights, not normalised."""


def _uniform(rate: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    return np.ones_like(rate)


def _vla_rl(rate: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """exp((0.5 - s) / tau). VLA-RL, Lu et al. 2025 (arXiv 2505.18719)."""
    return np.exp((0.5 - rate) / temperature)


def _frontier(rate: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """s (1 - s), the variance of a binary reward: largest where an episode is most informative."""
    return (rate * (1 - rate)) ** (1.0 / max(temperature, 1e-6))


def _weakest(rate: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """1 - s."""
    return (1 - rate) ** (1.0 / max(temperature, 1e-6))


RULES: dict[str, Rule] = {"uniform": _uniform, "vla-rl": _vla_rl, "frontier": _frontier, "weakest": _weakest}


class Curriculum:
    """Draws tasks in proportion to their weights, evenly: no task is ever an episode behind its share.

    Independent draws would leave tasks out for long stretches; a task's debt (share owed minus episodes given) decides
    instead, and chance only among equals. Environments that finish sooner therefore do not tilt the mixture.
    """

    def __init__(self, config: CurriculumConfig, tasks: Sequence[str], *, seed: int) -> None:
        if problem := config.problem():
            raise ValueError(problem)
        if not tasks:
            raise ValueError("a curriculum needs tasks to choose from")
        self.config, self.tasks = config, tuple(tasks)
        self._rule = lookup(config.rule, RULES, "curriculum rule")
        self._rng = np.random.default_rng([seed, 71])
        # Laplace's estimate before anything was played: half
        self.wins, self.plays = np.ones(len(self.tasks)), np.full(len(self.tasks), 2.0)
        self._debt = np.zeros(len(self.tasks))

    @property
    def rates(self) -> NDArray[np.float64]:
        """Recent success rates (tasks,)."""
        return self.wins / self.plays

    @property
    def shares(self) -> NDArray[np.float64]:
        """Probabilities (tasks,) of the next draw."""
        weight = self._rule(self.rates, self.config.temperature)
        share = weight / weight.sum() if weight.sum() > 0 else np.ones_like(weight) / len(weight)
        return (1 - self.config.floor) * share + self.config.floor / len(share)

    def draw(self, count: int) -> list[str]:
        """Tasks of the next `count` episodes."""
        chosen = []
        for _ in range(count):
            self._debt += self.shares
            # a little chance, so that tasks do not always follow each other in the same order
            task = int(np.argmax(self._debt + self._rng.uniform(0, 1e-3, len(self._debt))))
            self._debt[task] -= 1.0
            chosen.append(self.tasks[task])
        return chosen

    def record(self, task: str, success: bool) -> None:
        """An episode of `task` has ended."""
        k = self.tasks.index(task)
        keep = 1.0 - 1.0 / self.config.window
        self.wins[k] = self.wins[k] * keep + success
        self.plays[k] = self.plays[k] * keep + 1.0

    def metrics(self) -> dict[str, float]:
        """Rate and share of each task, for the log."""
        out: dict[str, float] = {}
        for task, rate, share in zip(self.tasks, self.rates, self.shares, strict=True):
            out |= {f"success/{task}": float(rate), f"share/{task}": float(share)}
        return out

    def state(self) -> dict[str, Any]:
        """For an exact resume."""
        return {
            "wins": self.wins.tolist(),
            "plays": self.plays.tolist(),
            "debt": self._debt.tolist(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.wins, self.plays = np.array(state["wins"]), np.array(state["plays"])
        self._debt = np.array(state["debt"])
        self._rng.bit_generator.state = state["rng"]


def make_curriculum(config: CurriculumConfig | None, env: VecEnv, seed: int, rank: int = 0) -> Curriculum | None:
    """Return the curriculum over the tasks of the environment's suite, if one is configured. ValueError if it has no
    named tasks."""
    if config is None:
        return None
    if not env.task_names:
        raise ValueError("a curriculum needs an environment with named tasks, and this one has none")
    return Curriculum(config, env.task_names, seed=streams.curriculum(seed, rank))
