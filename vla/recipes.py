"""Named imitation runs: functions that return a TrainConfig. `vla train RECIPE`; a flag changes any field."""

from __future__ import annotations

from collections.abc import Callable

from vla.bridge import BridgeConfig
from vla.model import VLAConfig
from vla.train import TrainConfig


def tabletop() -> TrainConfig:
    """The quickstart's imitation on two CPU cores: the tabletop suites, two cameras, the embedded backbone."""
    return TrainConfig()


def smoke() -> TrainConfig:
    """Seconds, not skill: does everything once. For tests and `--smoke`."""
    return TrainConfig(
        model=VLAConfig(bridge=BridgeConfig(width=64)),
        steps=20,
        batch_size=16,
        warmup_steps=5,
        log_every=5,
        save_every=10,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {"tabletop": tabletop, "smoke": smoke}
