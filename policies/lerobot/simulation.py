"""Starts the simulated environment behind LeRobot's robot and teleoperator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vla.core.types import Policy, VecEnv


@dataclass
class Simulation:
    """One environment (num_envs 1) and the scripted expert that solves it."""

    env: VecEnv
    expert: Policy
    proprio_names: tuple[str, ...]


_make: Callable[[str, int], Simulation] | None = None


def use_simulation(make: Callable[[str, int], Simulation]) -> None:
    """Register the function (suite, image size) -> `Simulation`: the plugin does, `policies` imports no simulator."""
    global _make
    _make = make


def make_simulation(suite: str, image_size: int) -> Simulation:
    """The environment of a suite and its expert; images are `image_size` px square. ValueError without the plugin."""
    if _make is None:
        raise ValueError("the simulation needs the plugin lerobot_policy_bascule: ./run setup installs it")
    return _make(suite, image_size)
