"""Bascule: robot control policies from demonstrations. Importing this loads nothing: names resolve on first use.

It sets OpenMP's environment variables for threads that wait (`vla.waiting`), unless they are set already.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vla.waiting import sleep_while_waiting

if TYPE_CHECKING:
    from vla.bridge import Bridge, BridgeConfig
    from vla.features import Features
    from vla.model import VLA, VLAConfig, VLAPolicy
    from vla.processor import ModelInput, Processor, ProcessorConfig, Stats
    from vla.types import ActionChunk, ActionSpec, Observation, Policy, StepResult, VecEnv

__version__ = "0.1.0"

sleep_while_waiting()  # before torch is loaded, by us or by the caller

_HOME = {
    "ActionChunk": "vla.types",
    "ActionSpec": "vla.types",
    "Bridge": "vla.bridge",
    "BridgeConfig": "vla.bridge",
    "Features": "vla.features",
    "ModelInput": "vla.processor",
    "Observation": "vla.types",
    "Policy": "vla.types",
    "Processor": "vla.processor",
    "ProcessorConfig": "vla.processor",
    "Stats": "vla.processor",
    "StepResult": "vla.types",
    "VLA": "vla.model",
    "VLAConfig": "vla.model",
    "VLAPolicy": "vla.model",
    "VecEnv": "vla.types",
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
    """Public names load the file they live in when first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'vla' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
