"""Experiments by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bascule.experiments.latency import LatencyConfig, latency
from bascule.experiments.refinement import RLConfig, rl
from bascule.experiments.robustness import RobustnessConfig, robustness

if TYPE_CHECKING:
    from vla.model.config import VLAConfig

    Variant = Callable[[VLAConfig], VLAConfig]
from bascule.experiments.ablation import AblationConfig, ablation

EXPERIMENTS: dict[str, tuple[type[Any], Callable[..., dict[str, Any]]]] = {
    "ablation": (AblationConfig, ablation),
    "latency": (LatencyConfig, latency),
    "rl": (RLConfig, rl),
    "robustness": (RobustnessConfig, robustness),
}
"""By name: its configuration, and what runs it."""
