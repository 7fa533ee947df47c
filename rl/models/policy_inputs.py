"""Inputs of the trained part of a policy: computed once by the frozen part, kept for every epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla.backbones.features import Features, TensorBatch
from vla.model.heads.residual import Latents

PolicyInput = TensorBatch
"""Inputs of the trained part of a policy: `Features` (the bridge), `Latents` (the head and the residual) or
`StateInput`."""


@dataclass(frozen=True, eq=False)
class StateInput(TensorBatch):
    """Low-dimensional state of B observations: for policies that need no camera."""

    state_BS: Tensor
    """(B, S), always float32: half precision would cost fractions of a millimetre."""


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
        if (pointed := inputs.pointed_BQE) is not None:
            parts.append(pointed.flatten(1))
    return torch.cat([*parts, proprio_BP], 1).detach().float()
