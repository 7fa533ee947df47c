"""Inputs of the trained part of a policy: computed once by the frozen part, kept for every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from vla.backbones.features import Features, Index
from vla.model.residual_head import Latents


class PolicyInput(Protocol):
    """Tensors of B observations that are selected, stored and checked together.

    `vla.backbones.features.Features` (the bridge reads them), `vla.model.residual_head.Latents` (the head and the
    residual read them) and `StateInput` are such inputs.
    """

    @property
    def batch_size(self) -> int:
        """Number of observations B."""
        ...

    def select(self, index: Index) -> Self:
        """Return the observations in `index`, in that order."""
        ...

    def float(self) -> Self:
        """Return the same in float32."""
        ...

    def empty_like(self, batch_size: int) -> Self:
        """Return uninitialised room for `batch_size` observations, in the same precision."""
        ...

    def write(self, start: int, part: Self) -> None:
        """Copy `part` into rows start .. start + part.batch_size."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; the first axis of each is the observation."""
        ...


@dataclass(frozen=True, eq=False)
class StateInput:
    """Low-dimensional state of B observations, (B, S) float32: for policies that need no camera."""

    state_BS: Tensor

    @property
    def batch_size(self) -> int:
        """Number of observations B."""
        return len(self.state_BS)

    def select(self, index: Index) -> StateInput:
        """Return the observations in `index`, in that order."""
        return StateInput(self.state_BS[index])

    def float(self) -> StateInput:
        """Return itself: state is always float32, since half precision would cost fractions of a millimetre."""
        return self

    def empty_like(self, batch_size: int) -> StateInput:
        """Return uninitialised room for `batch_size` observations."""
        return StateInput(self.state_BS.new_empty((batch_size, *self.state_BS.shape[1:])))

    def write(self, start: int, part: StateInput) -> None:
        """Copy `part` into rows start .. start + part.batch_size."""
        self.state_BS[start : start + part.batch_size] = part.state_BS

    def tensors(self) -> dict[str, Tensor]:
        """Return {"state_BS": ...}."""
        return {"state_BS": self.state_BS}


def storage_like(inputs: PolicyInput, rows: int) -> PolicyInput:
    """Return room for `rows` observations in the precision that buffers keep: hidden states, which are large, in
    float16, everything else as it is."""
    if isinstance(inputs, Features):
        return inputs.empty_like(rows, dtype=torch.float16)
    return inputs.empty_like(rows)


def summary(inputs: Features | Latents, proprio_BP: Tensor) -> Tensor:
    """Return (B, S) a few hundred numbers per observation, detached: the input of a small network such as the process
    reward model."""
    if isinstance(inputs, Latents):
        parts = [inputs.latent_BCD.mean(1), inputs.points_BE]
    else:
        tokens = inputs.queries_BLQD if inputs.queries_BLQD.shape[2] else inputs.raw_BLND
        parts = [tokens[:, -1].mean(1)]
        if inputs.points_BQE is not None:
            parts.append(inputs.points_BQE.flatten(1))
    return torch.cat([*parts, proprio_BP], 1).detach().float()
