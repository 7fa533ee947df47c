"""What the trained part of a policy reads: frozen features or latents, computed once, or the pictures themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vla.backbones.features import Features, Index
from vla.model.residual_head import Latents


@dataclass(frozen=True, eq=False)
class Seen:
    """The model's input of B observations, as it is: for a backbone that learns, whose features may not be kept."""

    inp: Any
    """A `vla.processing.processor.ModelInput` (or another dataclass of tensors)."""

    def _each(self, change: Callable[[Tensor], Tensor]) -> Seen:
        return Seen(replace(self.inp, **{name: change(tensor) for name, tensor in self._parts().items()}))

    def _parts(self) -> dict[str, Tensor]:
        return {field.name: getattr(self.inp, field.name) for field in fields(self.inp)}

    @property
    def batch_size(self) -> int:
        return len(next(iter(self._parts().values())))

    def select(self, index: Index) -> Seen:
        """The observations in `index`, in that order."""
        return self._each(lambda tensor: tensor[index])

    def float(self) -> Seen:
        """Pixels stay bytes."""
        return self

    def empty_like(self, batch_size: int, *, dtype: torch.dtype | None = None) -> Seen:
        """Uninitialised room for `batch_size` observations; `dtype` is not followed."""
        return self._each(lambda t: torch.empty((batch_size, *t.shape[1:]), dtype=t.dtype, device=t.device))

    def write(self, start: int, part: Seen) -> None:
        """Copy `part` into rows start .. start + part.batch_size."""
        theirs = part._parts()
        for name, tensor in self._parts().items():
            tensor[start : start + part.batch_size] = theirs[name]

    def tensors(self) -> dict[str, Tensor]:
        """What may hold a NaN, by name."""
        return {name: tensor for name, tensor in self._parts().items() if tensor.is_floating_point()}


Conditions = Features | Latents | Seen
"""Everything before it is frozen."""


def summary(conditions: Features | Latents, proprio_BP: Tensor) -> Tensor:
    """(B, S) of a few hundred numbers, detached: what a small network beside the policy may read."""
    if isinstance(conditions, Latents):
        seen = [conditions.latent_BCD.mean(1), conditions.points_BE]
    else:
        tokens = conditions.queries_BLQD if conditions.queries_BLQD.shape[2] else conditions.raw_BLND
        seen = [tokens[:, -1].mean(1)]
        if conditions.points_BQE is not None:
            seen.append(conditions.points_BQE.flatten(1))
    return torch.cat([*seen, proprio_BP], 1).detach().float()
