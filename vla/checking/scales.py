"""First pass over a recording's vectors: extremes, a sample for quantiles, and how the state follows the actions.

Everything is summed up episode by episode, so that memory does not grow with the recording.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vla.data.lerobot_dataset import ACTION

_MOST_SAMPLED = 200_000
"""Frames of which quantiles are taken; more are thinned evenly."""
LAGS = range(-6, 21)
"""Frames between an action and the state's answer that are tried."""
_TINY = 1e-12
FEW_VALUES = 3
"""A component with at most so many different values is a switch."""
_STRAY_VISITS = 3
"""Times that the very same value must be reached and left by jumps; ..."""
_STRAY_RUN = 10
"""... each time for at most so many frames: a gripper and a joint at rest stay longer."""
_STRAY_SHARE = 1 / 3
"""Greatest share of the frames that may be such a value."""
_STRAY_JUMP = 0.25
"""Share of the other values' range that such a jump must cross; ..."""
_STRAY_STEPS = 6.0
"""... and times their usual step."""
_STRAY_TURN = 0.8
"""Share of it from which a jump that stays within is from end to end, as of an encoder that starts anew."""
_STRAY_FAR = 3.0
"""Ranges of the others by which an action's or a gripper's value must lie off: they jump themselves."""
_VARIED = 20
"""Different values that the rest must have: what knows a few levels jumps between them."""
TURNS = (360.0, 2 * np.pi)


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

    def met(self, kind: str) -> NDArray[np.float64]:
        """(lags, A, P) correlations of the frames that meet alone: in a short episode of slow motion the frames at its
        ends, which meet none, cost more than a delay of one frame would."""
        if not self._products:
            return np.zeros((len(LAGS), 0, 0))
        product, of_action, of_state = (self._products[f"{kind} {part}"] for part in ("product", "action met",
                                                                                      "state met"))  # fmt: skip
        size = np.sqrt(of_action[:, :, None] * of_state[:, None])
        return np.divide(product, size, out=np.zeros_like(product), where=size > _TINY)


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
        products: list[NDArray[np.float64]] = []
        met: tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]] = [], []
        for lag in LAGS:
            # An absolute change [t] is the action of t + 1, which the state's change [t + 1 + lag] answers.
            first = lag - shift
            a = wish[max(0, -first) : max(0, length - 1 - max(first, 0))]
            s = moved[max(0, first) : max(0, first) + len(a)]
            a = a[: len(s)]
            products.append(a.T @ s)
            met[0].append((a**2).sum(0))
            met[1].append((s**2).sum(0))
        # Of the whole episode: a great lag, under which few frames meet, must not win by chance.
        sums |= {f"{kind} product": np.stack(products), f"{kind} action": (wish**2).sum(0)}
        sums[f"{kind} state"] = (moved**2).sum(0)
        sums |= {f"{kind} action met": np.stack(met[0]), f"{kind} state met": np.stack(met[1])}
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


def stray_frames(
    column: NDArray[np.float64], value: float, span: float, step: float, most: float = np.inf
) -> tuple[NDArray[np.bool_], int]:
    """(T,) True where a component holds this value for some frames, reached or left by a jump, and the number of times
    that it was both reached and left so, to about where it was before. `span`, `step`: of the other values;
    `most`: greatest such jump."""
    same = np.concatenate([[False], column == value, [False]])
    starts, stops = np.flatnonzero(same[1:] & ~same[:-1]), np.flatnonzero(same[:-1] & ~same[1:])
    limit = jump_limit(span, step)
    frames, visits = np.zeros(len(column), bool), 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        around = [column[at] - value for at in (start - 1, stop) if 0 <= at < len(column)]
        jumps = [limit < abs(way) <= most and all(abs(abs(way) / t - 1) > 0.1 for t in TURNS) for way in around]
        if any(jumps) and stop - start <= _STRAY_RUN:
            frames[start:stop] = True
            both = len(jumps) == 2 and all(jumps)
            visits += both and abs(around[0] - around[1]) < 0.5 * min(map(abs, around))
    return frames, visits


def jump_limit(span: float, step: float) -> float:
    """The change between two frames from which it is no motion, of a component with this range and usual step."""
    return max(_STRAY_JUMP * span, _STRAY_STEPS * step)


def stray_values(
    rows: NDArray[np.float64], episodes: NDArray[np.float64], feature: str, names: Sequence[str]
) -> dict[int, tuple[float, ...]]:
    """Component -> values that stand for none, as -999 or 65535: repeated exactly, and reached and left by jumps within
    an episode. `episodes` (F,): which one each row is of."""
    apart = np.insert(rows, np.flatnonzero(np.diff(episodes)) + 1, np.nan, axis=0)
    found: dict[int, tuple[float, ...]] = {}
    for i, name in enumerate(names):
        rest, told = apart[:, i], []
        while True:
            value = _stray(rest, far=feature == ACTION or is_gripper(name))
            if value is None or len(told) == _STRAY_VISITS:
                break
            told.append(value)
            rest = rest[rest != value]
        if told and np.isin(rows[:, i], told).mean() <= _STRAY_SHARE:
            found[i] = tuple(told)
    return found


def _stray(column: NDArray[np.float64], *, far: bool) -> float | None:
    """A value of a component, NaN between episodes, that stands for none: of all, that which lies farthest off. `far`:
    only one that lies far outside of the others."""
    known = column[~np.isnan(column)]
    values, counts = np.unique(known, return_counts=True)
    moves = np.abs(np.diff(column))
    if len(values) <= _VARIED or not (moves > 0).any():
        return None
    often = (counts >= _STRAY_VISITS) & (counts <= _STRAY_SHARE * len(known))
    middle = float(np.median(known))
    least = float(np.quantile(moves[moves > 0], 0.25))  # for a first, cheap look
    for value in sorted(values[often].tolist(), key=lambda value: -abs(value - middle))[:_VARIED] + [0.0]:
        if stray_frames(column, value, 0.0, least)[1] < _STRAY_VISITS:
            continue
        rest = known[known != value]
        low, high = np.quantile(rest, (0.01, 0.99))
        off = max(low - value, value - high)
        if far and off < _STRAY_FAR * max(high - low, abs(middle)):
            continue
        steps = moves[(column[1:] != value) & (column[:-1] != value) & ~np.isnan(moves)]
        if high > low and len(steps):
            # Of two such values the other one's jumps are among the steps: it takes a share of them, not the most.
            usual = float(np.quantile(steps, 0.95 if off < _STRAY_FAR * (high - low) else 0.5))
            span = float(high - low)
            most = _STRAY_TURN * span if off < (1 - _STRAY_TURN) * span else np.inf
            _, visits = stray_frames(column, value, span, usual, most)
            if visits >= _STRAY_VISITS:
                return value
    return None


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
    strays: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Component -> values that stand for none; the figures above leave them out."""

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
    def of(
        rows: NDArray[np.float64],
        steps: NDArray[np.float64],
        episodes: NDArray[np.float64],
        feature: str,
        names: Sequence[str],
    ) -> Scale:
        """That of sampled rows, the episodes that they are of, and sampled absolute steps."""
        strays = stray_values(rows, episodes, feature, names)
        if strays:
            rows, steps = rows.copy(), steps.copy()
        for i, values in strays.items():
            stray = np.isin(rows[:, i], values)
            beside = np.flatnonzero(~stray)
            rows[:, i] = rows[:, i][beside[np.searchsorted(beside, np.arange(len(rows))).clip(max=len(beside) - 1)]]
            some = np.abs(np.diff(rows[:, i]))
            steps[:, i] = np.quantile(some, np.linspace(0, 1, len(steps))) if len(some) else 0.0
        low, median, high = np.quantile(rows, (0.01, 0.5, 0.99), axis=0)
        step = np.quantile(steps, 0.95, axis=0) if len(steps) else np.zeros(rows.shape[1])
        switch = np.array([len(np.unique(column[:5000])) <= FEW_VALUES for column in rows.T], bool)
        gripper = np.array([is_gripper(name) for name in names], bool)
        return Scale(low, high, rows.min(0), rows.max(0), step, switch, gripper, median, rows.mean(0), strays)


def is_gripper(name: str) -> bool:
    """True for names of what opens and closes."""
    return re.search(r"grip(?!_[xyz]\b)|finger|jaw|claw", name.lower()) is not None
