"""What is the same over there: state seen from the hand, and demonstrations turned about the vertical.

A hand that moves by displacements over a table does, wherever it is and whichever way it comes, the same thing to reach
what lies before it. One demonstration then is one of every place and of every direction (equivariance, as in Wang et
al. 2022, "SO(2)-equivariant reinforcement learning", arXiv 2203.04439, here by data instead of by network).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.core.types import Pair, Plane


def from_hand(plane: Plane, privileged_dim: int, proprio_dim: int) -> tuple[Tensor, tuple[Pair, ...]]:
    """(S, S) V such that [privileged, proprio] @ V has its places as the hand sees them, and where the hand is no
    longer; and the pairs of columns that then point somewhere in the plane."""
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
    """(turns F, S), (turns F, C, A): all of it turned about the vertical by 0, 1, ... of `turns` equal angles.

    `names` of the action's components; ValueError if "dx" or "dy" is not among them.
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
