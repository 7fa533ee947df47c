"""Means that leave padding out: what every head's loss ends with."""

from __future__ import annotations

from torch import Tensor


def by_component(mask: Tensor, value_BCA: Tensor) -> Tensor:
    """A mask of steps (B, C), or of steps and components (B, C, A), as bool (B, C, A)."""
    return (mask if mask.ndim == 3 else mask[..., None]).bool().expand_as(value_BCA)


def masked_mean(value_BCA: Tensor, mask: Tensor) -> Tensor:
    """Mean over unmasked components (B, C or B, C, A), each of the same weight; 0 when all are masked."""
    keep = by_component(mask, value_BCA).to(value_BCA.dtype)
    return (value_BCA * keep).sum() / keep.sum().clamp(min=1.0)
