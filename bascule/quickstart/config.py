"""The quickstart's budgets, and the checks of them that need no run."""

from __future__ import annotations

from dataclasses import dataclass, replace

_SEEDS = 50
"""Demonstrations are recorded in scenes below a million; those above are for RL and for evaluation."""
_MOST, _MOST_WORKERS = 1_000_000, 1024
_COUNTS = (
    "demos", "imitation_steps", "rl_updates", "eval_episodes", "control_episodes", "served_episodes", "workers",
)  # fmt: skip


@dataclass(frozen=True)
class QuickstartConfig:
    """The main job's budgets. The defaults fit 12 minutes on two CPU cores."""

    out: str = "runs/quickstart"
    suite: str = "tabletop-pick"
    recipe: str = "tabletop"
    """Name of a recipe of `bascule.quickstart.recipes`."""
    backbone: str | None = None
    """Another backbone than the recipe's."""
    seed: int = 0
    demos: int = 20
    """Number of demonstrations. Few on purpose: many leave RL little to do."""
    imitation_steps: int = 700
    rl_updates: int | None = 16
    """RL's budget: as many as two idle cores make in four minutes. None: `rl_seconds` is the budget."""
    rl_seconds: float | None = 960.0
    """Time limit of RL in seconds, well above what its updates take on two busy cores; None: no limit."""
    eval_episodes: int = 400
    control_episodes: int = 200
    served_episodes: int = 12
    workers: int = 2
    smoke: bool = False
    """Run every stage with tiny budgets: shows that everything runs; the policy learns nothing useful."""


def smoke_config(config: QuickstartConfig) -> QuickstartConfig:
    """The same stages with tiny budgets, in a minute or two. No time limit: the load does not affect the result."""
    return replace(
        config, demos=4, imitation_steps=10, rl_updates=4, rl_seconds=None, eval_episodes=8, control_episodes=8,
        served_episodes=2,
    )  # fmt: skip


def worlds_of(config: QuickstartConfig) -> int:
    """Number of simulated environments side by side: no more than a smoke run's evaluation has episodes for."""
    return min(48, config.eval_episodes) if config.smoke else 48


def check(config: QuickstartConfig) -> None:
    """Raise ValueError naming the flag, for budgets with which a later stage could only fail."""
    for name in _COUNTS:
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give a whole number from 1")
        if value is not None and value > (most := _MOST_WORKERS if name == "workers" else _MOST):
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at most {most:,}")
    if config.rl_seconds is not None and not 0 < config.rl_seconds <= _MOST:
        raise ValueError(f"--rl-seconds {config.rl_seconds:g}: give a number above 0, at most {_MOST:,}")
    if config.rl_updates is None and config.rl_seconds is None:
        raise ValueError("RL would never end: give --rl-updates or --rl-seconds")
    if not 0 <= config.seed < _SEEDS:
        raise ValueError(f"--seed {config.seed}: give 0 to {_SEEDS - 1}; each has its own scenes to demonstrate in")


def evaluation_seeds(config: QuickstartConfig) -> list[int]:
    """The seeds of the scenes on which every policy is measured: the first of the suite's evaluation."""
    from envs.registry import load_suite

    first = load_suite(config.suite).eval_seed0
    return list(range(first, first + config.eval_episodes))
