"""Planar symmetry: state in the gripper's frame, and demonstrations rotated about the vertical axis.

A gripper that moves by displacements over a table acts alike wherever it is and from whichever direction it comes. One
demonstration then serves for every place and direction (equivariance, as in Wang et al. 2022, "SO(2)-equivariant
reinforcement learning", arXiv 2203.04439, here by data instead of by network).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.core.types import Pair, PlanarSymmetry


def from_hand(plane: PlanarSymmetry, privileged_dim: int, proprio_dim: int) -> tuple[Tensor, tuple[Pair, ...]]:
    """Return V (S, S) such that [privileged, proprio] @ V has its positions relative to the gripper (whose own position
    becomes 0), and the pairs of columns that are then vectors in the plane."""
    hand, *hand_offsets = [_moved(pair, privileged_dim) for pair in (plane.hand, *plane.hand_offsets)]
    view = torch.eye(privileged_dim + proprio_dim)
    for axis in (0, 1):
        for place in plane.places:
            view[hand[axis], place[axis]] = -1.0
        view[hand[axis], hand[axis]] = 0.0
    return view, (*plane.places, *plane.offsets, *hand_offsets)


def _moved(pair: Pair, by: int) -> Pair:
    return pair[0] + by, pair[1] + by


def turned(
    state_FS: Tensor, action_FCA: NDArray[np.float32], pairs: Sequence[Pair], names: Sequence[str], turns: int
) -> tuple[Tensor, NDArray[np.float32]]:
    """Return states (turns F, S) and chunks (turns F, C, A), rotated about the vertical by `turns` equally spaced
    angles from 0.

    `names` are the action's components; ValueError if "dx" or "dy" is not among them.
    """
    if missing := {"dx", "dy"} - set(names):
        raise ValueError(f"only displacements can be turned: the actions have no {sorted(missing)[0]!r}")
    aim = (names.index("dx"), names.index("dy"))
    angles = [2 * math.pi * k / turns for k in range(turns)]
    states = torch.cat([torch.from_numpy(_turn(state_FS.numpy(), pairs, angle)) for angle in angles])
    return states, np.concatenate([_turn(action_FCA, [aim], angle) for angle in angles])


def _turn(values: NDArray[np.float32], pairs: Iterable[Pair], angle: float) -> NDArray[np.float32]:
    out, cos, sin = values.copy(), math.cos(angle), math.sin(angle)
    for x, y in pairs:
        out[..., x] = cos * values[..., x] - sin * values[..., y]
        out[..., y] = sin * values[..., x] + cos * values[..., y]
    return out
