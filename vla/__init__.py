"""Bascule: robot control policies from demonstrations. Importing this loads nothing: names resolve on first use.

It sets OpenMP's environment variables for threads that wait (`vla.core.waiting`), unless they are set already.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vla.core.waiting import limit_spinning

if TYPE_CHECKING:
    from vla.backbones.features import Features
    from vla.core.types import ActionChunk, ActionSpec, Observation, Policy, StepResult, VecEnv
    from vla.model.bridge import Bridge
    from vla.model.config import BridgeConfig, VLAConfig
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy
    from vla.processing.batch import ModelInput
    from vla.processing.processor import Processor, ProcessorConfig, Stats

__version__ = "0.1.0"

limit_spinning()  # before torch is loaded, by us or by the caller

_HOME = {
    "ActionChunk": "vla.core.types",
    "ActionSpec": "vla.core.types",
    "Bridge": "vla.model.bridge",
    "BridgeConfig": "vla.model.config",
    "Features": "vla.backbones.features",
    "ModelInput": "vla.processing.batch",
    "Observation": "vla.core.types",
    "Policy": "vla.core.types",
    "Processor": "vla.processing.processor",
    "ProcessorConfig": "vla.processing.processor",
    "Stats": "vla.processing.processor",
    "StepResult": "vla.core.types",
    "VLA": "vla.model.model",
    "VLAConfig": "vla.model.config",
    "VLAPolicy": "vla.model.policy",
    "VecEnv": "vla.core.types",
}

__all__ = [  # noqa: F822 (resolved by __getattr__)
    "VLA",
    "ActionChunk",
    "ActionSpec",
    "Bridge",
    "BridgeConfig",
    "Features",
    "ModelInput",
    "Observation",
    "Policy",
    "Processor",
    "ProcessorConfig",
    "Stats",
    "StepResult",
    "VLAConfig",
    "VLAPolicy",
    "VecEnv",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Public names load the file they live in on first access (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'vla' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
