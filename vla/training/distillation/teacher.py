"""The interface of a teacher: for every demonstrated frame a latent, and a decoder from latents to actions.

A teacher may stand anywhere (a policy of ours, a privileged network of online RL, a policy of LeRobot's): what trains a
student knows this protocol only, and whoever reads a folder makes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vla.data.lerobot_dataset import DemoSet


@dataclass(frozen=True, eq=False)
class Decoder:
    """From a teacher's latents to its actions."""

    reads: Literal["head", "step", "chunk"]
    """`vla.model.config.DistilledConfig.reads`: latents are (B, C, width), or (B, width) for "chunk"."""
    width: int
    tensors: dict[str, Tensor]
    """The decoder's weights: those of a head, or "weight" and "bias" of a linear layer. Its output counts in units of
    the teacher's own."""
    centre: NDArray[np.float64]
    """(A,) action = centre + half * output, in the environment's units."""
    half: NDArray[np.float64]
    head: str = "l1"
    """Name of the action head, for "head"."""


class Teacher(Protocol):
    """An expert that is asked about demonstrated frames. Nothing of it is left in the student but its decoder."""

    chunk_size: int
    """Control steps of a chunk."""
    action_names: tuple[str, ...] | None
    """Components of its actions; None where it does not tell them."""
    decoder: Decoder

    def latents(self, demos: DemoSet, frames: slice) -> Tensor:
        """Its latents (B, C, width) or (B, width) of these frames, float32, on the CPU.

        The decoder makes the teacher's own actions of them. ValueError for demonstrations that it cannot read.
        """
