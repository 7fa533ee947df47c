"""Raw observation <-> model batch on tensors, alike in training and serving; the arithmetic is
`vla.processing.preprocess`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.core.types import Observation
from vla.processing.preprocess import ModelArrays, Preprocessor, ProcessorConfig
from vla.processing.stats import Stats, VectorStats
from vla.processing.text import plain_text

__all__ = ["ModelInput", "Processor", "ProcessorConfig", "Stats", "VectorStats", "plain_text"]


@dataclass(frozen=True, eq=False)
class ModelInput:
    """A batch as the model reads it."""

    images_BVHWC: Tensor
    """uint8 RGB."""
    token_ids_BT: Tensor
    """int64, padded to max_text_tokens."""
    token_mask_BT: Tensor
    """bool, True = real token."""
    proprio_BP: Tensor
    """float32, normalised."""

    @property
    def batch_size(self) -> int:
        """Number of observations B."""
        return self.proprio_BP.shape[0]

    @staticmethod
    def of(arrays: ModelArrays) -> ModelInput:
        """The tensors of these arrays; memory is shared."""
        return ModelInput(*(torch.from_numpy(getattr(arrays, field.name)) for field in fields(arrays)))

    def to(self, device: torch.device | str) -> ModelInput:
        """The same input on another device."""
        return ModelInput(
            self.images_BVHWC.to(device),
            self.token_ids_BT.to(device),
            self.token_mask_BT.to(device),
            self.proprio_BP.to(device),
        )

    def select(self, index: Tensor | Sequence[int] | slice) -> ModelInput:
        """The observations in `index`, in that order."""
        return replace(
            self,
            images_BVHWC=self.images_BVHWC[index],
            token_ids_BT=self.token_ids_BT[index],
            token_mask_BT=self.token_mask_BT[index],
            proprio_BP=self.proprio_BP[index],
        )


class Processor(Preprocessor):
    """Observation -> ModelInput, and actions between environment units and the model's [-1, 1]."""

    def prepare(self, obs: Observation) -> ModelInput:
        """ValueError saying what the observation lacks or has wrong, and what was given."""
        return ModelInput.of(self.arrays(obs))

    def tokenise(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, T) int64 and mask (B, T) bool. A string seen before is not tokenised again."""
        ids, mask = self.token_arrays(instructions)
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def normalise_proprio(self, proprio_BP: NDArray[np.floating], *, batch_size: int | None = None) -> Tensor:
        """Robot state (B, P) in raw units -> float32 tensor, [-1, 1] between the quantiles, limited to +-5."""
        return torch.from_numpy(self.scale_proprio(proprio_BP, batch_size=batch_size))

    @overload
    def normalise_action(self, action: Tensor) -> Tensor: ...
    @overload
    def normalise_action(self, action: NDArray[np.floating]) -> NDArray[np.float32]: ...
    def normalise_action(self, action: Tensor | NDArray[np.floating]) -> Tensor | NDArray[np.float32]:
        """Extends `Preprocessor`'s method to tensors on any device."""
        if not isinstance(action, Tensor):
            return super().normalise_action(action)
        self._check_action(action, len(self.config.action_names))
        centre, half = self._action
        normal = ((action.double() - _like(centre, action)) / _like(half, action)).float()
        if self.config.action_slots is None:
            return normal
        wide = normal.new_zeros(*normal.shape[:-1], self.action_width)
        return wide.index_copy(-1, _like(self.config.action_slots, normal), normal)

    @overload
    def unnormalise_action(self, action: Tensor) -> Tensor: ...
    @overload
    def unnormalise_action(self, action: NDArray[np.floating]) -> NDArray[np.float32]: ...
    def unnormalise_action(self, action: Tensor | NDArray[np.floating]) -> Tensor | NDArray[np.float32]:
        """Extends `Preprocessor`'s method to tensors on any device."""
        if not isinstance(action, Tensor):
            return super().unnormalise_action(action)
        self._check_action(action, self.action_width)
        centre, half = self._action
        if self.config.action_slots is not None:
            action = action[..., list(self.config.action_slots)]
        raw = (action.double() * _like(half, action) + _like(centre, action)).float()
        low, high = (torch.from_numpy(bound).to(action.device) for bound in (self._low, self._high))
        return raw.clamp(low, high)


def _like(values: NDArray[np.float64] | Sequence[int], tensor: Tensor) -> Tensor:
    return torch.as_tensor(values).to(tensor.device)
