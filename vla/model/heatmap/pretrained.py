"""Weights of heat-map heads that have learnt where named things are, before any demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vla.core.checkpoint import load_tensors, save_tensors
from vla.model.heatmap.model import HeatmapModel

SHIPPED = Path(__file__).parent / "assets" / "small-heatmap.safetensors"
"""The head of the backbone `small`."""
_OF_STATE = ("choose.", "flags.", "turn.")
"""Parts that read the robot's state, which pre-training does not see: they begin anew with each robot."""


def write_head(model: HeatmapModel, file: Path, facts: dict[str, Any]) -> None:
    """The head's weights in half precision, without what reads a robot's state."""
    kept = {name: value.half() for name, value in model.head.state_dict().items() if not name.startswith(_OF_STATE)}
    save_tensors(file, kept, {name: str(value) for name, value in facts.items()})


def read_head(model: HeatmapModel, source: str) -> tuple[str, ...]:
    """Take over a head's weights from `write_head`'s file, or "shipped"; returns their names. ValueError where they do
    not fit."""
    file = SHIPPED if source == "shipped" else Path(source)
    if not file.is_file():
        raise ValueError(f"there is no {file}: `vla pretrain heatmap` makes such a file, or begin without one")
    tensors = load_tensors(file)
    own = {name: value.shape for name, value in model.head.state_dict().items() if not name.startswith(_OF_STATE)}
    given = {name: value.shape for name, value in tensors.items()}
    if own != given:
        misfit = min(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise ValueError(
            f"{file} is for another backbone or width ({misfit} differs): pre-train a head for this one "
            "(`vla pretrain heatmap`), or begin without one"
        )
    model.head.load_state_dict({n: v.to(torch.float32) for n, v in tensors.items()}, strict=False)
    return tuple(tensors)
