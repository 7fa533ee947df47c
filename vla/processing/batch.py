"""A batch as the model reads it, in numpy arrays or in tensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class ModelInput[ArrayT]:
    """Inputs of B observations: numpy arrays (exported policies) or tensors (everything else)."""

    images_BVHWC: ArrayT
    """uint8 RGB."""
    token_ids_BT: ArrayT
    """int64, padded to max_text_tokens or to the longest instruction, if that is more."""
    token_mask_BT: ArrayT
    """bool, True = real token."""
    proprio_BP: ArrayT
    """float32, normalised."""

    @property
    def batch_size(self) -> int:
        """Number of observations B."""
        return self.proprio_BP.shape[0]

    @property
    def arrays(self) -> tuple[ArrayT, ArrayT, ArrayT, ArrayT]:
        """The four arrays, in the order of the fields."""
        return self.images_BVHWC, self.token_ids_BT, self.token_mask_BT, self.proprio_BP

    def map[OtherT](self, function: Callable[[ArrayT], OtherT]) -> ModelInput[OtherT]:
        """The batch of `function` of each array."""
        return ModelInput(*map(function, self.arrays))

    def to(self, device: Any) -> ModelInput[ArrayT]:
        """The same input on another device (tensors only)."""
        return self.map(lambda tensor: tensor.to(device))

    def select(self, index: Any) -> ModelInput[ArrayT]:
        """The observations in `index`, in that order."""
        return self.map(lambda array: array[index])

    def without_padding(self) -> ModelInput[ArrayT]:
        """The text as long as the longest instruction of the batch: a third of the time would go into padding."""
        text = trimmed_text(self.token_ids_BT, self.token_mask_BT)
        return ModelInput(self.images_BVHWC, *text, self.proprio_BP)

    @staticmethod
    def cat(parts: Sequence[ModelInput[ArrayT]], join: Callable[[list[ArrayT]], ArrayT]) -> ModelInput[ArrayT]:
        """One batch from several; `join` puts arrays one after the other (torch.cat, np.concatenate)."""
        return ModelInput(*(join(list(column)) for column in zip(*(part.arrays for part in parts), strict=True)))


def trimmed_text[ArrayT](ids_BT: ArrayT, mask_BT: ArrayT) -> tuple[ArrayT, ArrayT]:
    """Token ids and mask as long as the longest instruction, one token at least. Padding is at the end. ValueError for
    no instruction at all."""
    if len(mask_BT) == 0:
        raise ValueError("the observation is of no environment (B = 0): there is nothing to decide")
    length = max(1, int(mask_BT.sum(1).max()))
    return ids_BT[:, :length], mask_BT[:, :length]
