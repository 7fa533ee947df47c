"""A batch as the model reads it, in numpy arrays or in tensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
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
    depth_BVHW: ArrayT | None = None
    """float32, metres along each camera's axis, as large as the images; 0 where nothing was measured. Only for policies
    that read depth, like the cameras' matrices below (`vla.core.types.Observation`)."""
    intrinsics_BV33: ArrayT | None = None
    extrinsics_BV44: ArrayT | None = None

    @property
    def batch_size(self) -> int:
        """Number of observations B."""
        return self.proprio_BP.shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that this input has, in their order."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def arrays(self) -> tuple[ArrayT, ...]:
        """The arrays of `names`."""
        return tuple(getattr(self, name) for name in self.names)

    def map[OtherT](self, function: Callable[[ArrayT], OtherT]) -> ModelInput[OtherT]:
        """The batch of `function` of each array."""
        return ModelInput(**{name: function(getattr(self, name)) for name in self.names})

    def to(self, device: Any) -> ModelInput[ArrayT]:
        """The same input on another device (tensors only)."""
        return self.map(lambda tensor: tensor.to(device))

    def select(self, index: Any) -> ModelInput[ArrayT]:
        """The observations in `index`, in that order."""
        return self.map(lambda array: array[index])

    def without_padding(self) -> ModelInput[ArrayT]:
        """The text as long as the longest instruction of the batch: a third of the time would go into padding."""
        ids, mask = trimmed_text(self.token_ids_BT, self.token_mask_BT)
        return replace(self, token_ids_BT=ids, token_mask_BT=mask)

    @staticmethod
    def cat(parts: Sequence[ModelInput[ArrayT]], join: Callable[[list[ArrayT]], ArrayT]) -> ModelInput[ArrayT]:
        """One batch from several; `join` puts arrays one after the other (torch.cat, np.concatenate)."""
        return ModelInput(**{name: join([getattr(part, name) for part in parts]) for name in parts[0].names})


def trimmed_text[ArrayT](ids_BT: ArrayT, mask_BT: ArrayT) -> tuple[ArrayT, ArrayT]:
    """Token ids and mask as long as the longest instruction, one token at least. Padding is at the end. ValueError for
    no instruction at all."""
    if len(mask_BT) == 0:
        raise ValueError("the observation is of no environment (B = 0): there is nothing to decide")
    length = max(1, int(mask_BT.sum(1).max()))
    return ids_BT[:, :length], mask_BT[:, :length]
