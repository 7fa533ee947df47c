"""Statistics of actions and proprio that normalise them: quantile ranges with a floor, standard scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.core.config import decode, encode

_NEGLIGIBLE = 1e-6
_NOISE = 1e-4
"""Half a state's range, as a share of its own value, up to which it counts as one that does not move."""

_FAINT = 1e-5
"""Share of what other components of a state move below which one's motion may well be noise, whatever its unit."""

_NARROW = 0.05
"""A quantile range below this share of the extremes' is replaced by them, which bounds targets to +-2 / 0.05."""


_SHORT = 20
"""Frames below which a recording is too short to say which of its values are rare."""

LEAST_RANGE = 0.01
"""Least half width of a component's recorded range, for one that hardly moved: raw units, or a share of its value."""


@dataclass(frozen=True)
class VectorStats:
    """Per-component statistics of a vector over a data set, raw units."""

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def dim(self) -> int:
        """Number of components X."""
        return len(self.q01)

    @staticmethod
    def from_array(values_FX: NDArray[np.floating], *, name: str) -> VectorStats:
        """Statistics of F frames of X components. ValueError naming `name` when empty, not 2-D or not finite."""
        values = np.asarray(values_FX, dtype=np.float64)
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"{name} must be (frames, components) with at least one of each, got shape {values.shape}")
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(f"{name} holds NaN or infinity, first in frame {row}, component {column}")
        q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
        # A switch (gripper: -1 or 1) keeps its values even if it is pressed in fewer than 1% of the frames.
        switch = np.isin(values, (-1.0, 1.0)).all(axis=0)
        q01, q99 = np.where(switch, -1.0, q01), np.where(switch, 1.0, q99)
        low, high = values.min(0), values.max(0)
        q01, q99 = widened(q01, q99, low, high)
        columns = (q01, q99, low, high, values.mean(0), values.std(0))
        return VectorStats(*(tuple(column.tolist()) for column in columns))

    def affine(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(centre, half width) such that (x - centre) / half spans [-1, 1] between the 1% and 99% quantiles.

        A component whose quantiles coincide is scaled by its extremes; one that never changes is only centred.
        """
        low, high = np.array(self.q01), np.array(self.q99)
        narrow = high - low < _NEGLIGIBLE
        low, high = np.where(narrow, self.min, low), np.where(narrow, self.max, high)
        half = (high - low) / 2
        return (low + high) / 2, np.where(half < _NEGLIGIBLE / 2, 1.0, half)

    @property
    def unmoved(self) -> NDArray[np.bool_]:
        """True for components (X,) that never change, but for noise (`noise_alone`)."""
        return noise_alone(np.array(self.min), np.array(self.max))

    def state_affine(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`affine` for a state: what has not moved has the half width infinity. Whatever it becomes, a policy that has
        never seen it move reads 0, as in training; nothing has taught it what else to make of it."""
        centre, half = self.affine()
        return centre, np.where(self.unmoved, np.inf, half)

    def released_affine(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(centre, half width) as the released VLA-Adapter code scales: 2 (x - q01) / (q99 - q01 + 1e-8) - 1 and back.

        A state that never changed reads -1; an action that never changed is that constant for any network output.
        """
        # Observations are float32: a constant must meet its own value, not the one with more digits in the file.
        low, high = (np.array(column, dtype=np.float32).astype(np.float64) for column in (self.q01, self.q99))
        half = (high - low + 1e-8) / 2
        return low + half, half


def noise_alone(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True where values between these extremes (X,) differ by a sensor's noise or the last digits of float32 alone.
    Values a whole unit apart, as an encoder's counts, are no noise."""
    noise = (high - low < 1.0) & (high - low < _NOISE * np.abs(low + high))
    return noise | (high - low < _NEGLIGIBLE)


def widened(
    q01: NDArray[np.float64], q99: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The quantiles (X,), or the extremes `low` and `high` of components whose quantiles span less than 5% of them.

    Such a component is at rest in nearly all frames, so its quantiles measure sensor noise: a button that is 1 in 0.7%
    of the frames and 1e-5 of noise otherwise would become a target of 40,000. Quantiles that coincide stay as they are
    (`VectorStats.affine` takes the extremes). Done when statistics are made: checkpoints keep those they have.
    """
    noise = (q99 - q01 >= _NEGLIGIBLE) & (q99 - q01 < _NARROW * (high - low))
    return np.where(noise, low, q01), np.where(noise, high, q99)


def rare_components(values_FX: NDArray[np.floating], names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, one clause that names it) of each component scaled by its extremes because it rarely leaves its resting
    value.

    Switches (only -1 and 1) and constants are none of these. One frame of a recording shorter than a hundred counts as
    rare too: there the quantiles that scale lie between it and the next, here they lie within.
    """
    values = np.asarray(values_FX, dtype=np.float64)
    methods = ("higher", "lower") if len(values) >= _SHORT else ("linear", "linear")
    q01, q99 = (np.quantile(values, q, axis=0, method=m) for q, m in zip((0.01, 0.99), methods, strict=True))
    low, high = values.min(0), values.max(0)
    rare = (q99 - q01 < _NARROW * (high - low)) & (high - low >= _NEGLIGIBLE) & ~np.isin(values, (-1.0, 1.0)).all(0)
    within = [f"{q01[i]:.3g}..{q99[i]:.3g} in 98% of the frames" for i in range(len(names))]
    return [
        (names[i], f"'{names[i]}' reaches {low[i]:.3g}..{high[i]:.3g} but stays in {within[i]}")
        for i in np.flatnonzero(rare)
    ]


def faint_components(values_FX: NDArray[np.floating], names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, one clause that names it) of each component that moves by less than `_FAINT` of what the others, two at
    least, usually do, and does not move by noise alone (`noise_alone`)."""
    values = np.asarray(values_FX, dtype=np.float64)
    low, high = values.min(0), values.max(0)
    wide, moves = high - low, np.flatnonzero(~noise_alone(low, high))
    found = []
    for i in moves if len(moves) > 2 else ():
        usual = float(np.quantile(wide[moves[moves != i]], 0.5, method="lower"))
        if wide[i] < _FAINT * usual:
            clause = f"'{names[i]}' moves by {wide[i]:.2g} in all, where the others move by {usual:.3g}"
            found.append((names[i], clause))
    return found


@dataclass(frozen=True)
class Stats:
    """Normalisation statistics of a training set. They travel with the checkpoint."""

    proprio: VectorStats
    action: VectorStats
    frames: int

    @staticmethod
    def from_arrays(proprio_FP: NDArray[np.floating], action_FA: NDArray[np.floating]) -> Stats:
        """Statistics of all F frames of a dataset, raw units. ValueError for NaN, infinity or different lengths."""
        if len(proprio_FP) != len(action_FA):
            raise ValueError(f"{len(proprio_FP)} proprio frames but {len(action_FA)} actions")
        return Stats(
            proprio=VectorStats.from_array(proprio_FP, name="proprio"),
            action=VectorStats.from_array(action_FA, name="action"),
            frames=len(proprio_FP),
        )

    def to_dict(self) -> dict[str, Any]:
        """The statistics as JSON values; `from_dict` reads them back."""
        return encode(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Stats:
        """The statistics that `to_dict` wrote."""
        return decode(Stats, data)
