"""Optimiser setup: parameter groups, averaged weights, activation checkpointing, compiled parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vla.model.model import VLA
from vla.training.train_config import TrainConfig


def parameter_groups(objective: nn.Module, cfg: TrainConfig) -> tuple[list[dict[str, Any]], list[float]]:
    """AdamW's groups, and each one's learning rate as a fraction of the schedule's.

    Matrices decay; biases, norms, gates and learned positions or queries do not. A backbone that learns has two too.
    """
    vla: VLA = objective.vla
    free = [vla.bridge.position, getattr(vla.backbone, "queries", None)]
    if vla.pool is not None:  # a modulator that is not in use must not shrink
        free += vla.pool.parameters()
    words = [module.weight for module in vla.backbone.modules() if isinstance(module, nn.Embedding)]
    in_backbone = {id(parameter) for parameter in vla.backbone.parameters()}
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in objective.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(parameter is one for one in (*free, *words))
            kinds.setdefault((id(parameter) in in_backbone, decays), []).append(parameter)
    groups, scales = [], []
    for learns_slower in (False, True):
        for decays in (True, False):
            members = kinds.get((learns_slower, decays), [])
            if members or not learns_slower:
                groups.append({"params": members, "weight_decay": cfg.weight_decay if decays else 0.0})
                scales.append(cfg.backbone_lr if learns_slower else 1.0)
    return groups, scales


def average_into(average: list[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """Exponential moving average, in place."""
    torch._foreach_lerp_(average, list(parameters), 1 - decay)


def copy_into(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Overwrite parameters, in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


@contextmanager
def checkpoint_layers(backbone: nn.Module, enabled: bool) -> Iterator[None]:
    """Keep only the layers' inputs in the forward pass and recompute the rest (Chen et al. 2016)."""
    if not enabled:
        yield
        return
    vlm = getattr(backbone, "vlm", None)
    if not getattr(vlm, "supports_gradient_checkpointing", False):
        raise ValueError("this backbone cannot recompute its layers: turn checkpointing off, or accumulate more parts")
    vlm.gradient_checkpointing_enable({"use_reentrant": False})
    # The library also makes frozen embeddings ask for gradients, which only reentrant recomputation needs.
    vlm.disable_input_require_grads()
    try:
        yield
    finally:
        vlm.gradient_checkpointing_disable()


@contextmanager
def compile_parts(vla: VLA, backend: str | None) -> Iterator[None]:
    """Compile the bridge, and the backbone if it learns, for a while. The modules and their names stay as they are."""
    parts = [] if backend is None else [vla.bridge, *([vla.backbone] if vla.backbone_learns else [])]
    if backend is not None and backend not in torch._dynamo.list_backends(exclude_tags=()):
        known = ", ".join(torch._dynamo.list_backends())
        raise ValueError(f"there is no torch.compile backend '{backend}' (known: {known})")
    for part in parts:
        part.compile(backend=backend)
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None
