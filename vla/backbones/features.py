"""Backbone features for the bridge: hidden states of the tapped layers, ready to be cached. No Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Index = Tensor | NDArray[np.int64] | Sequence[int] | slice

_FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class Features:
    """Conditions of B observations for the bridge (VLA-Adapter, arXiv 2509.09372: C^R and C^AQ)."""

    raw_BLND: Tensor
    """Hidden states of the N image (and text) tokens at L layers, width D."""
    raw_mask_BN: Tensor | None
    """bool, True = real token; None when every token is real."""
    queries_BLQD: Tensor
    """Hidden states of the Q action queries at the same layers."""
    points_BQE: Tensor | None
    """Explicit coordinates that each query points at; None when the backbone does not point. Always float32."""
    coords_NE: Tensor
    """(N, 3) of each raw token: x, y in [-1, 1] and view id. Shared by the batch. Always float32."""

    @property
    def batch_size(self) -> int:
        """Number of observations B."""
        return self.raw_BLND.shape[0]

    @property
    def device(self) -> torch.device:
        """The device that holds the hidden states."""
        return self.raw_BLND.device

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors (the shared coordinates once)."""
        return self.coords_NE.nbytes + sum(tensor.nbytes for tensor in self.tensors().values())

    def select(self, index: Index) -> Features:
        """The observations in `index`, in that order. A slice gives a view, everything else a copy."""
        if isinstance(index, slice):
            pick = lambda tensor: tensor[index]  # noqa: E731
        else:
            ids = torch.as_tensor(index, dtype=torch.int64, device=self.device)
            pick = lambda tensor: tensor.index_select(0, ids)  # noqa: E731
        return replace(
            self,
            raw_BLND=pick(self.raw_BLND),
            raw_mask_BN=None if self.raw_mask_BN is None else pick(self.raw_mask_BN),
            queries_BLQD=pick(self.queries_BLQD),
            points_BQE=None if self.points_BQE is None else pick(self.points_BQE),
        )

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Features:
        """Hidden states in another precision and/or everything on another device.

        Coordinates stay float32: they are small, and half precision would cost fractions of a millimetre.
        """
        return Features(
            raw_BLND=_cast(self.raw_BLND.to(device=device), dtype),
            raw_mask_BN=None if self.raw_mask_BN is None else self.raw_mask_BN.to(device=device),
            queries_BLQD=_cast(self.queries_BLQD.to(device=device), dtype),
            points_BQE=None if self.points_BQE is None else self.points_BQE.to(device=device, dtype=torch.float32),
            coords_NE=self.coords_NE.to(device=device, dtype=torch.float32),
        )

    def float(self) -> Features:
        """Everything in float32."""
        return self.to(dtype=torch.float32)

    def detach(self) -> Features:
        """The same features without their gradient history. Memory is shared, not copied."""
        return replace(
            self,
            raw_BLND=self.raw_BLND.detach(),
            queries_BLQD=self.queries_BLQD.detach(),
            points_BQE=None if self.points_BQE is None else self.points_BQE.detach(),
            coords_NE=self.coords_NE.detach(),
        )

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """One batch from several of the same backbone. Holds both copies for a moment: see `empty_like`."""
        if not parts:
            raise ValueError("Features.cat needs at least one part")
        first = parts[0]
        for part in parts[1:]:
            if part.coords_NE.shape != first.coords_NE.shape or not torch.equal(part.coords_NE, first.coords_NE):
                raise ValueError("cannot join features of different token layouts: their coords_NE differ")
        return replace(
            first,
            raw_BLND=torch.cat([part.raw_BLND for part in parts]),
            raw_mask_BN=_cat_optional([part.raw_mask_BN for part in parts], "raw_mask_BN"),
            queries_BLQD=torch.cat([part.queries_BLQD for part in parts]),
            points_BQE=_cat_optional([part.points_BQE for part in parts], "points_BQE"),
        )

    def empty_like(self, batch_size: int, *, dtype: torch.dtype | None = None) -> Features:
        """Uninitialised room for `batch_size` observations like these, to be filled with `write` (caches, buffers)."""

        def room(tensor: Tensor, kind: torch.dtype | None = None) -> Tensor:
            return torch.empty((batch_size, *tensor.shape[1:]), dtype=kind or tensor.dtype, device=tensor.device)

        return replace(
            self,
            raw_BLND=room(self.raw_BLND, dtype),
            raw_mask_BN=None if self.raw_mask_BN is None else room(self.raw_mask_BN),
            queries_BLQD=room(self.queries_BLQD, dtype),
            points_BQE=None if self.points_BQE is None else room(self.points_BQE, torch.float32),
        )

    def write(self, start: int, part: Features) -> None:
        """Copy `part` into rows start .. start + part.batch_size, casting to the precision kept here."""
        if start < 0 or start + part.batch_size > self.batch_size:
            raise ValueError(f"rows {start}..{start + part.batch_size} do not fit into {self.batch_size}")
        if (self.raw_mask_BN is None) != (part.raw_mask_BN is None) or (self.points_BQE is None) != (
            part.points_BQE is None
        ):
            raise ValueError("cannot mix features with and without raw_mask_BN or points_BQE")
        rows = slice(start, start + part.batch_size)
        self.raw_BLND[rows] = _cast(part.raw_BLND, self.raw_BLND.dtype)
        self.queries_BLQD[rows] = _cast(part.queries_BLQD, self.queries_BLQD.dtype)
        if self.raw_mask_BN is not None:
            self.raw_mask_BN[rows] = part.raw_mask_BN
        if self.points_BQE is not None:
            self.points_BQE[rows] = part.points_BQE

    def tensors(self) -> dict[str, Tensor]:
        """Tensors with a batch dimension, by name; the shared coordinates are not among them."""
        every = {
            "raw_BLND": self.raw_BLND,
            "raw_mask_BN": self.raw_mask_BN,
            "queries_BLQD": self.queries_BLQD,
            "points_BQE": self.points_BQE,
        }
        return {name: tensor for name, tensor in every.items() if tensor is not None}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor
    if dtype == torch.float16:
        # Language models have a few huge activations beyond float16's range; infinity would become NaN in a LayerNorm.
        return tensor.clamp(-_FP16_MAX, _FP16_MAX).to(dtype)
    return tensor.to(dtype)


def _cat_optional(tensors: list[Tensor | None], name: str) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    if len(present) != len(tensors):
        raise ValueError(f"cannot join features with and without {name}")
    return torch.cat(present)
