"""Shared by the benches: rows of figures, calls timed in turns, and the policy and observation that most use."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vla.model.config import DEFAULT_BACKBONE, DEFAULT_PIXELS, VLAConfig

if TYPE_CHECKING:
    from vla.core.types import Observation
    from vla.model.policy import VLAPolicy

Row = dict[str, Any]
EMBEDDED = f"backbone {DEFAULT_BACKBONE}, 2 cameras of {DEFAULT_PIXELS} px"
"""Configuration of most benches' rows."""
_SECONDS = 4.0
"""Each measurement of a rate lasts at least this long."""


def row(name: str, value: float, unit: str, config: str = "", baseline: str | None = None, base: float = 0.0) -> Row:
    """A figure; with a `baseline`, whose value in the same run is `base`, its ratio to that, too."""
    ratio = None if baseline is None else value / base
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio, "config": config}


def best_rate(once: Callable[[], int]) -> float:
    """Best of three rates of a function that returns how many units it did: others may use the machine."""
    rates = []
    for _ in range(3):
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < _SECONDS / 3:
            done += once()
        rates.append(done / (time.perf_counter() - begin))
    return max(rates)


def timed_in_turns(calls: Mapping[str, Callable[[], Any]], turns: int, *, warm_up: int) -> dict[str, list[float]]:
    """Milliseconds of every call in each of `turns` turns, after `warm_up` more. They take turns so that a busy machine
    slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + turns):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def default_policy() -> VLAPolicy:
    """A policy of the default backbone and size with random weights, for timing only."""
    return untrained_policy(VLAConfig())


def untrained_policy(config: VLAConfig) -> VLAPolicy:
    """A policy for the tabletop whose action head has random weights, for timing only."""
    from envs.tabletop.control import action_spec
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy
    from vla.processing.processor import Stats

    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(64, 8)), rng.uniform(-1, 1, (64, 4)))
    return VLAPolicy(VLA.build(config, stats=stats, action_spec=action_spec(20.0), cameras=("front", "wrist")).eval())


def random_observation(batch: int) -> Observation:
    """An observation for `default_policy`: two cameras as it reads them, proprio and an instruction."""
    from vla.core.types import Observation

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (batch, DEFAULT_PIXELS, DEFAULT_PIXELS, 3), dtype=np.uint8)
    return Observation(
        {"front": image, "wrist": image},
        rng.normal(size=(batch, 8)).astype(np.float32),
        ["pick up the red cube"] * batch,
    )
