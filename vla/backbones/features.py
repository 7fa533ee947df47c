"""Backbone features for the bridge: hidden states of the tapped layers, ready to be cached. No Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Index = Tensor | NDArray[np.int64] | Sequence[int] | slice

Mishearing = tuple[float, Tensor]
"""How much noise is on the words, 1 for as much as in pre-training; and the number of each observation's episode, (B,)
int64."""

_FP16_MAX = torch.finfo(torch.float16).max


class TensorBatch:
    """Tensors of B observations that are selected, stored and checked together: the base of frozen dataclasses.

    The first axis of each is the observation. A field may be None: it is left out everywhere.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    """Names of tensors without a batch dimension, which all observations share."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors with a batch dimension, by name."""
        every = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.shared}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    @property
    def batch_size(self) -> int:
        """Number of observations B."""
        return len(next(iter(self.tensors().values())))

    @property
    def device(self) -> torch.device:
        """The device that holds the tensors."""
        return next(iter(self.tensors().values())).device

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The batch of `function` of each tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def select(self, index: Index) -> Self:
        """The observations in `index`, in that order. A slice gives a view, everything else a copy."""
        if isinstance(index, slice):
            return self.map(lambda tensor: tensor[index])
        ids = torch.as_tensor(index, dtype=torch.int64, device=self.device)
        return self.map(lambda tensor: tensor.index_select(0, ids))

    def float(self) -> Self:
        """Everything in float32: the batch itself, unless a subclass keeps less precision."""
        return self

    def empty_like(self, batch_size: int) -> Self:
        """Uninitialised room for `batch_size` observations like these, to be filled with `write` (caches, buffers)."""
        return self.map(lambda tensor: tensor.new_empty((batch_size, *tensor.shape[1:])))

    def write(self, start: int, part: Self) -> None:
        """Copy `part` into rows start .. start + part.batch_size, casting to the precision kept here."""
        if start < 0 or start + part.batch_size > self.batch_size:
            raise ValueError(f"rows {start}..{start + part.batch_size} do not fit into {self.batch_size}")
        mine, theirs = self.tensors(), part.tensors()
        if differing := sorted(mine.keys() ^ theirs.keys()):
            raise ValueError(f"cannot mix batches with and without {differing[0]}")
        for name, tensor in mine.items():
            tensor[start : start + part.batch_size] = _cast(theirs[name], tensor.dtype)


@dataclass(frozen=True, eq=False)
class Features(TensorBatch):
    """Conditions of B observations for the bridge (VLA-Adapter, arXiv 2509.09372: C^R and C^AQ)."""

    shared = ("coords_NE",)

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
    raw_xyz_BNE: Tensor | None = None
    """Coordinates of each raw token in the robot's frame (`vla.model.xyz`). Always float32."""
    points_xyz_BQE: Tensor | None = None
    """Coordinates in the robot's frame of what each query points at. Always float32."""
    memory_BMK: Tensor | None = None
    """Rows of M earlier decisions (`vla.model.memory`); None for a policy that remembers none. Always float32."""
    words_BD: Tensor | None = None
    """Mean word vector of each instruction, for a policy that remembers; None for a backbone that does not tell its
    words. Always float32."""
    stop_BP: Tensor | None = None
    """While such a policy learns: where the robot stopped next (`vla.model.memory.foresight`). Always float32."""
    advantage_B: Tensor | None = None
    """Label that a policy is told about its actions (`vla.model.advantage`); None: what it asks
    for. Always float32."""

    @property
    def pointed_BQE(self) -> Tensor | None:
        """Where the queries point, as a policy reads it: places in the robot's frame, where they are known, else those
        in the pictures."""
        return self.points_BQE if self.points_xyz_BQE is None else self.points_xyz_BQE

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors (the shared coordinates once)."""
        return self.coords_NE.nbytes + sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Features:
        """Hidden states in another precision and/or everything on another device.

        Coordinates stay float32: they are small, and half precision would cost fractions of a millimetre.
        """
        exact = ("points_BQE", "raw_xyz_BNE", "points_xyz_BQE", "memory_BMK", "words_BD", "stop_BP", "advantage_B")
        return replace(
            self,
            raw_BLND=_cast(self.raw_BLND.to(device=device), dtype),
            raw_mask_BN=None if self.raw_mask_BN is None else self.raw_mask_BN.to(device=device),
            queries_BLQD=_cast(self.queries_BLQD.to(device=device), dtype),
            coords_NE=self.coords_NE.to(device=device, dtype=torch.float32),
            **{
                name: tensor.to(device=device, dtype=torch.float32)
                for name, tensor in self.tensors().items()
                if name in exact
            },
        )

    def float(self) -> Features:
        """Everything in float32."""
        return self.to(dtype=torch.float32)

    def detach(self) -> Features:
        """The same features without their gradient history. Memory is shared, not copied."""
        return replace(self.map(Tensor.detach), coords_NE=self.coords_NE.detach())

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """One batch from several of the same backbone. Holds both copies for a moment: see `empty_like`."""
        if not parts:
            raise ValueError("Features.cat needs at least one part")
        first = parts[0]
        for part in parts[1:]:
            if part.coords_NE.shape != first.coords_NE.shape or not torch.equal(part.coords_NE, first.coords_NE):
                raise ValueError("cannot join features of different token layouts: their coords_NE differ")
            if differing := sorted(part.tensors().keys() ^ first.tensors().keys()):
                raise ValueError(f"cannot join features with and without {differing[0]}")
        columns = {name: [part.tensors()[name] for part in parts] for name in first.tensors()}
        return replace(first, **{name: torch.cat(column) for name, column in columns.items()})

    def empty_like(self, batch_size: int, *, dtype: torch.dtype | None = None) -> Features:
        """Uninitialised room for `batch_size` observations like these; hidden states in `dtype`, if given."""

        def room(tensor: Tensor) -> Tensor:
            hidden = tensor is self.raw_BLND or tensor is self.queries_BLQD
            return tensor.new_empty((batch_size, *tensor.shape[1:]), dtype=dtype if hidden else None)

        return self.map(room)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor
    if dtype == torch.float16:
        # Language models have a few huge activations beyond float16's range; infinity would become NaN in a LayerNorm.
        return tensor.clamp(-_FP16_MAX, _FP16_MAX).to(dtype)
    return tensor.to(dtype)


def with_query_noise(features: Features, scale: float) -> Features:
    """The features with Gaussian noise on the query states, `scale` times each state's deviation, drawn from torch's
    generator; as they are for scale 0, and where nothing is pointed at and the states are all that is known."""
    if not scale or features.points_BQE is None:
        return features
    states, memory = features.queries_BLQD, features.memory_BMK
    noisy = states + scale * states.std(-1, keepdim=True) * torch.randn_like(states)
    if memory is not None:  # a row begins with that decision's states, of unit variance; an empty one stays as it is
        width = states.shape[2] * states.shape[3]
        noise = scale * torch.randn_like(memory[..., :width]) * (memory[..., -1:] >= 0)
        memory = torch.cat([memory[..., :width] + noise, memory[..., width:]], -1)
    return replace(features, queries_BLQD=noisy, memory_BMK=memory)


def hears_noise(backbone: object) -> bool:
    """True for a backbone whose word table can be heard with noise."""
    vlm = getattr(backbone, "vlm", None)
    return vlm is not None and hasattr(vlm.model.get_input_embeddings(), "misheard")


@contextmanager
def mishearing(backbone: Any, noise: Mishearing) -> Iterator[None]:
    """Within this, the instructions' words come with noise, the same throughout an episode: what reads the features
    learns to act on words that it has not heard. ValueError for a backbone that has no such noise."""
    if not noise[0]:
        yield
        return
    if not hears_noise(backbone):
        raise ValueError("word_noise is for the backbone 'small', which was pre-trained with noise on its words")
    backbone.misheard = noise
    try:
        yield
    finally:
        backbone.misheard = None
