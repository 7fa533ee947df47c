"""The space in which a policy predicts a chunk of actions, where that is not the one in which they were recorded.

Recordings hold positions to go to (joints, a hand's place) or displacements of every step. A policy may learn positions
relative to where the robot is when the chunk begins, or as steps from one to the next, and displacements summed up from
the chunk's beginning. The policy gives actions in the units of the recording either way. For a given state all of it is
a bijection of chunks, and causal: the first n actions depend on the first n predicted ones alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vla.core.config import unknown
from vla.processing.stats import Stats, VectorStats

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["recorded", "relative", "delta", "summed"]
WORDS = ("recorded", "relative", "delta")
"""The kinds that a user names; relative displacements are summed."""
_DISPLACEMENT = re.compile(r"(d|delta[_.]?|rel[_.]?)(x|y|z|rx|ry|rz|roll|pitch|yaw|ax|ay|az)\b")
"""Names of components that say how far to go in this step."""
_GRIPPER = re.compile(r"gripper|hand_open|finger")
MOST_CHUNKS = 20_000
"""Chunks that statistics are taken of: all of a long recording would not fit into memory."""


@dataclass(frozen=True)
class ActionSpace:
    """One kind per action component."""

    kinds: tuple[Kind, ...]
    """recorded: as it is. relative: less the state at the chunk's beginning. delta: less the action before, and the
    first one less that state. summed: the sum of this and all displacements before it in the chunk."""
    state: tuple[int, ...]
    """The state component that tells where a relative or delta component is; -1 for others."""

    def to_predicted[T: (NDArray, Tensor)](self, action_BCA: T, proprio_BP: NDArray[np.floating]) -> T:
        """Chunks as the policy predicts them, from recorded ones that begin in these raw states `proprio_BP`."""
        out = action_BCA + 0  # a copy, of arrays and tensors alike
        for i, kind in self._changed():
            recorded = action_BCA[..., i]
            if kind == "summed":
                out[..., i] = recorded.cumsum(-1)
                continue
            start_B1 = self._start(recorded, proprio_BP, i)
            if kind == "relative":
                out[..., i] = recorded - start_B1
            else:
                out[..., 1:, i] = recorded[..., 1:] - recorded[..., :-1]
                out[..., :1, i] = recorded[..., :1] - start_B1
        return out

    def to_recorded[T: (NDArray, Tensor)](self, action_BCA: T, proprio_BP: NDArray[np.floating]) -> T:
        """The inverse of `to_predicted`."""
        out = action_BCA + 0
        for i, kind in self._changed():
            predicted = action_BCA[..., i]
            if kind == "summed":
                out[..., 1:, i] = predicted[..., 1:] - predicted[..., :-1]
                continue
            start_B1 = self._start(predicted, proprio_BP, i)
            out[..., i] = (predicted if kind == "relative" else predicted.cumsum(-1)) + start_B1
        return out

    def stats(self, recorded: Stats, chunks: Chunks) -> Stats:
        """The statistics of a recording with those of the predicted actions in place of the recorded ones."""
        action_FCA, mask_FC, proprio_FP = chunks
        predicted = self.to_predicted(action_FCA.astype(np.float64), proprio_FP.astype(np.float64))[mask_FC > 0]
        mine, old = VectorStats.from_array(predicted, name="action"), recorded.action
        # components that stay as they are keep their statistics to the bit: every frame counts once there
        pick = [kind != "recorded" for kind in self.kinds]
        columns = (
            tuple(new if own else was for own, new, was in zip(pick, getattr(mine, f), getattr(old, f), strict=True))
            for f in ("q01", "q99", "min", "max", "mean", "std")
        )
        return Stats(recorded.proprio, VectorStats(*columns), recorded.frames)

    def _changed(self) -> list[tuple[int, Kind]]:
        return [(i, kind) for i, kind in enumerate(self.kinds) if kind != "recorded"]

    def _start[T: (NDArray, Tensor)](self, like: T, proprio_BP: NDArray[np.floating], i: int) -> T:
        start_B1 = np.asarray(proprio_BP)[..., self.state[i], None]
        if isinstance(like, np.ndarray):
            return start_B1
        import torch

        return torch.from_numpy(start_B1).to(like)


Chunks = tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]
"""Actions (F, C, A) from each of some frames on, their mask (F, C), and the frames' states (F, P)."""


def action_space(
    wanted: Sequence[str], names: Sequence[str], state: Sequence[str] | None, switches: Sequence[bool]
) -> ActionSpace | None:
    """From what a user wants: one of `WORDS` for all components, then NAME=WORD for single ones; None if nothing
    changes.

    `names` of the action, `state` of the proprio; `switches`: components that are only ever one of two values. Grippers
    and switches stay as they were recorded unless they are named: what is closed is so wherever the hand was.
    ValueError naming a component that cannot be what is wanted, and what it can be.
    """
    word, single = _read(wanted, names)
    kinds: list[Kind] = []
    places: list[int] = []
    for name, switch in zip(names, switches, strict=True):
        own = single.get(name)
        kind = own or ("recorded" if switch or _GRIPPER.search(name) else word)
        place = _place(name, state or ())
        if kind == "recorded":
            place = -1
        elif place < 0 and _DISPLACEMENT.fullmatch(name):
            kind = "summed" if kind == "relative" else "recorded"
        elif place < 0:
            raise ValueError(
                f"--action-space: '{name}' cannot be {kind}: the state has no '{name}' that says where it is (it has "
                f"{', '.join(state or ()) or 'no names'}); give {name}=recorded"
            )
        kinds.append(kind)
        places.append(place)
    return None if set(kinds) <= {"recorded"} else ActionSpace(tuple(kinds), tuple(places))


def _read(wanted: Sequence[str], names: Sequence[str]) -> tuple[Kind, dict[str, Kind]]:
    """(the word for all components, words of single ones)."""
    word, single = "recorded", {}
    for i, entry in enumerate(wanted):
        name, equals, value = entry.rpartition("=")
        if value not in WORDS:
            raise ValueError(f"--action-space: {unknown(value, WORDS, 'space')}")
        if equals and name not in names:
            raise ValueError(f"--action-space: {unknown(name, names, 'action component')}")
        if not equals and i:
            raise ValueError(f"--action-space: '{entry}' must come first, and then NAME=SPACE for single components")
        if equals:
            single[name] = value
        else:
            word = value
    return word, single  # type: ignore[return-value]


def _place(name: str, state: Sequence[str]) -> int:
    """Where the state tells this component; -1 if it does not. LeRobot's datasets call a joint `shoulder_pan.pos`, or
    leave the suffix out on one side."""
    plain = [part.removesuffix(".pos") for part in state]
    return plain.index(name.removesuffix(".pos")) if name.removesuffix(".pos") in plain else -1
