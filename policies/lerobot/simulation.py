"""Starts the simulated environment behind LeRobot's robot and teleoperator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vla.core.types import Policy, VecEnv


@dataclass
class Simulation:
    """One world and who can solve it."""

    env: VecEnv
    expert: Policy
    proprio_names: tuple[str, ...]


_make: Callable[[str, int], Simulation] | None = None


def use_simulation(make: Callable[[str, int], Simulation]) -> None:
    """Say how a suite's world is made, from its name and image size: policies know no simulator, the plugin does."""
    global _make
    _make = make


def make_simulation(suite: str, image_size: int) -> Simulation:
    if _make is None:
        raise ValueError("the simulation needs the plugin lerobot_policy_bascule: ./run setup installs it")
    return _make(suite, image_size)
