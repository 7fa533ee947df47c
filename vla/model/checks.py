"""What is looked at before a run begins, because it would be known only at its end: that the policy can be loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vla.core.config import decode, encode, unknown
from vla.model.heads import HEADS
from vla.processing.processor import ProcessorConfig, Stats

if TYPE_CHECKING:
    from vla.model.model import VLA, VLAConfig


def model_problem(config: VLAConfig) -> str | None:
    """What is wrong with a model's configuration, or None."""
    if config.chunk_size < 1:
        return f"chunk_size must be at least 1, got {config.chunk_size}"
    steps = config.n_action_steps
    if steps is not None and not 1 <= steps <= config.chunk_size:
        return (
            f"n_action_steps must be in 1..{config.chunk_size} (the chunk size), got {steps}: play fewer actions of "
            f"each chunk (--n-action-steps {min(max(steps, 1), config.chunk_size)}), or make the chunks longer"
        )
    if config.head not in HEADS:
        return unknown(config.head, HEADS, "head")
    if config.refiner_width < 0:
        return f"refiner_width must be 0 (none) or positive, got {config.refiner_width}"
    if config.lora is not None and not config.freeze_backbone:
        return "lora trains adapters on a frozen backbone: leave freeze_backbone on, or drop lora"
    return config.bridge.problem() or (None if config.lora is None else config.lora.problem())


def check_loads(vla: VLA) -> None:
    """ValueError if this policy, saved, could not be loaded again. For the start of a run, not for its end."""
    from vla.model.model import VLAConfig

    if problem := model_problem(vla.config):
        raise ValueError(problem)
    _check("configuration", encode(vla.config), lambda data: decode(VLAConfig, data))
    for processor in (vla.processor, *vla.members.values()):
        _check("processor", encode(processor.config), lambda data: decode(ProcessorConfig, data))
        _check("statistics", processor.stats.to_dict(), Stats.from_dict)


def _check(name: str, part: Any, read: Any) -> None:
    """Write and read it as a checkpoint does, which has no NaN and no infinity."""
    try:
        read(json.loads(json.dumps(part, allow_nan=False)))
    except ValueError as problem:
        raise ValueError(f"this policy could be trained, but not saved and loaded: its {name}: {problem}") from None
