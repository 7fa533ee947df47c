"""First pass over a recording's vectors: extremes, a sample for quantiles, and how the state follows the actions.

Everything is summed up episode by episode, so that memory does not grow with the recording.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_MOST_SAMPLED = 200_000
"""Frames of which quantiles are taken; more are thinned evenly."""
LAGS = range(-6, 21)
"""Frames between an action and the state's answer that are tried."""
_TINY = 1e-12
FEW_VALUES = 3
"""A component with at most so many different values is a switch."""


@dataclass
class Sample:
    """Rows (F, D) for quantiles: all of them, or every second, fourth, ... of a long recording."""

    _kept: list[NDArray[np.float64]] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0
    _count: int = 0

    def add(self, values: NDArray[np.float64]) -> None:
        """Add an episode's rows."""
        first = -self._seen % self._stride
        self._seen += len(values)
        self._kept.append(values[first :: self._stride])
        self._count += len(self._kept[-1])
        if self._count > _MOST_SAMPLED:
            self._kept = [self.rows()[::2]]
            self._stride *= 2
            self._count = len(self._kept[0])

    def rows(self) -> NDArray[np.float64]:
        """The rows kept."""
        return np.concatenate(self._kept) if self._kept else np.empty((0, 0))


@dataclass
class Following:
    """How each component of the state follows each action, by the frames between them.

    Two readings: an absolute target, whose changes the state repeats, and a relative one, whose values are the state's
    changes. Both are correlations over all episodes, (lags, A, P).
    """

    _products: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    frames: int = 0

    def add(self, action: NDArray[np.float64], state: NDArray[np.float64]) -> None:
        """Add an episode (T, A), (T, P)."""
        sums = correlations(action, state)
        self.frames += len(action)
        for name, part in sums.items():
            self._products[name] = self._products.get(name, 0.0) + part

    def correlation(self, kind: str) -> NDArray[np.float64]:
        """(lags, A, P) for kind "absolute" or "relative"; 0 where something never changes."""
        if not self._products:
            return np.zeros((len(LAGS), 0, 0))
        return correlation(self._products, kind)

    def at_once(self, kind: str) -> NDArray[np.float64]:
        """(A, P) correlations without a delay, of the frames that meet alone: in a short episode of slow motion the
        frames at its ends, which meet none, cost more than a delay of one frame would."""
        if not self._products:
            return np.zeros((0, 0))
        met = {f"{kind} product": self._products[f"{kind} product"][[LAGS.index(0)]]}
        met |= {f"{kind} {part}": self._products[f"{kind} {part} at once"] for part in ("action", "state")}
        return correlation(met, kind)[0]


def correlation(sums: dict[str, NDArray[np.float64]], kind: str) -> NDArray[np.float64]:
    """(lags, A, P) correlations from the sums of `correlations`."""
    product, of_action, of_state = (sums[f"{kind} {part}"] for part in ("product", "action", "state"))
    size = np.broadcast_to(np.sqrt(of_action[:, None] * of_state), product.shape)
    return np.divide(product, size, out=np.zeros_like(product), where=size > _TINY)


def correlations(action: NDArray[np.float64], state: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Sums of products and squares of an episode by which `correlation` relates actions and the state's changes."""
    length = len(action)
    action, state = without_spikes(action), without_spikes(state)
    moved = np.diff(state, axis=0)  # [t] is the way from t to t + 1
    readings = {"absolute": (np.diff(action, axis=0), -1), "relative": (action[:-1] - action.mean(0), 0)}
    sums = {}
    for kind, (wish, shift) in readings.items():
        products = []
        for lag in LAGS:
            # An absolute change [t] is the action of t + 1, which the state's change [t + 1 + lag] answers.
            first = lag - shift
            a = wish[max(0, -first) : max(0, length - 1 - max(first, 0))]
            s = moved[max(0, first) : max(0, first) + len(a)]
            a = a[: len(s)]
            products.append(a.T @ s)
            if lag == 0:
                sums[f"{kind} action at once"], sums[f"{kind} state at once"] = (a**2).sum(0), (s**2).sum(0)
        # Of the whole episode: a great lag, under which few frames meet, must not win by chance.
        sums |= {f"{kind} product": np.stack(products), f"{kind} action": (wish**2).sum(0)}
        sums[f"{kind} state"] = (moved**2).sum(0)
    return sums


def without_spikes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T, D) with each single frame that leaves its neighbours by half of the whole range laid between them: one such
    frame would outweigh all others in a product of changes."""
    if len(values) < 3:
        return values
    step = np.diff(values, axis=0)
    least = np.minimum(np.abs(step[:-1]), np.abs(step[1:]))
    wild = (least > 0.5 * np.ptp(values, axis=0)) & (np.sign(step[:-1]) != np.sign(step[1:]))
    out = values.copy()
    out[1:-1] = np.where(wild, (values[:-2] + values[2:]) / 2, values[1:-1])
    return out


@dataclass(frozen=True)
class Scale:
    """The usual range of components (D,), and their usual step from frame to frame."""

    low: NDArray[np.float64]
    """1% quantile."""
    high: NDArray[np.float64]
    """99% quantile."""
    least: NDArray[np.float64]
    most: NDArray[np.float64]
    step: NDArray[np.float64]
    """95% quantile of the absolute change between frames."""
    switch: NDArray[np.bool_]
    """True where there are but a few different values."""
    gripper: NDArray[np.bool_]
    """True for what opens and closes, by its name."""
    median: NDArray[np.float64]
    mean: NDArray[np.float64]

    @property
    def span(self) -> NDArray[np.float64]:
        """Between the quantiles, or between the extremes of what rarely moves; 1 for what never does."""
        wide = self.high - self.low
        whole = self.most - self.least
        wide = np.where(wide < 0.01 * whole, whole, wide)
        return np.where(wide > _TINY, wide, 1.0)

    @property
    def constant(self) -> NDArray[np.bool_]:
        """True where nothing ever changes."""
        return self.most - self.least <= _TINY

    @staticmethod
    def of(rows: NDArray[np.float64], steps: NDArray[np.float64], names: Sequence[str]) -> Scale:
        """That of sampled rows and of sampled absolute steps."""
        low, median, high = np.quantile(rows, (0.01, 0.5, 0.99), axis=0)
        step = np.quantile(steps, 0.95, axis=0) if len(steps) else np.zeros(rows.shape[1])
        switch = np.array([len(np.unique(column[:5000])) <= FEW_VALUES for column in rows.T], bool)
        gripper = np.array([is_gripper(name) for name in names], bool)
        return Scale(low, high, rows.min(0), rows.max(0), step, switch, gripper, median, rows.mean(0))


def is_gripper(name: str) -> bool:
    """True for names of what opens and closes."""
    return re.search(r"grip(?!_[xyz]\b)|finger|jaw|claw", name.lower()) is not None
