"""Raw observation <-> model batch on tensors, alike in training and serving; the arithmetic is
`vla.processing.preprocess`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.core.types import Observation
from vla.processing.batch import ModelInput
from vla.processing.preprocess import Preprocessor, ProcessorConfig
from vla.processing.stats import Stats, VectorStats
from vla.processing.text import plain_text

__all__ = ["ModelInput", "Processor", "ProcessorConfig", "Stats", "VectorStats", "plain_text"]

_States = NDArray[np.floating] | None


class Processor(Preprocessor):
    """Observation -> ModelInput of tensors, and actions between environment units and the model's [-1, 1]."""

    def prepare(self, obs: Observation) -> ModelInput[Tensor]:
        """ValueError saying what the observation lacks or has wrong, and what was given."""
        return self.arrays(obs).map(torch.from_numpy)  # memory is shared

    def tokenise(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, T) int64 and mask (B, T) bool. A string seen before is not tokenised again."""
        ids, mask = map(torch.from_numpy, self.token_arrays(instructions))
        return ids, mask

    def normalise_proprio(self, proprio_BP: NDArray[np.floating], *, batch_size: int | None = None) -> Tensor:
        """Robot state (B, P) in raw units -> float32 tensor, [-1, 1] between the quantiles, limited to +-5."""
        return torch.from_numpy(self.scale_proprio(proprio_BP, batch_size=batch_size))

    @overload
    def normalise_action(self, action: Tensor, proprio_BP: _States = None) -> Tensor: ...
    @overload
    def normalise_action(self, action: NDArray[np.floating], proprio_BP: _States = None) -> NDArray[np.float32]: ...
    def normalise_action(
        self, action: Tensor | NDArray[np.floating], proprio_BP: _States = None
    ) -> Tensor | NDArray[np.float32]:
        """Extends `Preprocessor`'s method to tensors on any device."""
        if not isinstance(action, Tensor):
            return super().normalise_action(action, proprio_BP)
        self._check_action(action, len(self.config.action_names))
        centre, half = self._action
        raw = action.double()
        if (space := self.config.action_space) is not None:
            raw = space.to_predicted(raw, self._started(proprio_BP))
        normal = ((raw - _like(centre, action)) / _like(half, action)).float()
        if self.config.action_slots is None:
            return normal
        wide = normal.new_zeros(*normal.shape[:-1], self.action_width)
        return wide.index_copy(-1, _like(self.config.action_slots, normal), normal)

    @overload
    def unnormalise_action(self, action: Tensor, proprio_BP: _States = None) -> Tensor: ...
    @overload
    def unnormalise_action(self, action: NDArray[np.floating], proprio_BP: _States = None) -> NDArray[np.float32]: ...
    def unnormalise_action(
        self, action: Tensor | NDArray[np.floating], proprio_BP: _States = None
    ) -> Tensor | NDArray[np.float32]:
        """Extends `Preprocessor`'s method to tensors on any device."""
        if not isinstance(action, Tensor):
            return super().unnormalise_action(action, proprio_BP)
        self._check_action(action, self.action_width)
        centre, half = self._action
        if self.config.action_slots is not None:
            action = action[..., list(self.config.action_slots)]
        raw = action.double() * _like(half, action) + _like(centre, action)
        if (space := self.config.action_space) is not None:
            raw = space.to_recorded(raw, self._started(proprio_BP))
        low, high = (torch.from_numpy(bound).to(action.device) for bound in (self._low, self._high))
        return raw.float().clamp(low, high)


def _like(values: NDArray[np.float64] | Sequence[int], tensor: Tensor) -> Tensor:
    return torch.as_tensor(values).to(tensor.device)
