"""Intervals and tests of what was counted: one success rate, and two rates in the same scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z95 = 1.959964
RESAMPLES = 4000
"""Resamples of a bootstrap."""


def wilson95(successes: int, episodes: int) -> tuple[float, float]:
    """95% interval of a success probability from k of n, both in [0, 1]. Wilson 1927."""
    if episodes == 0:
        return 0.0, 1.0
    z, p = _Z95, successes / episodes
    centre = p + z * z / (2 * episodes)
    half = z * math.sqrt(p * (1 - p) / episodes + z * z / (4 * episodes * episodes))
    scale = 1 + z * z / episodes
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(frozen=True)
class Pairs:
    """Two policies in the same scenes, by who solved a scene."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, first_N: NDArray[np.bool_], second_N: NDArray[np.bool_]) -> Pairs:
        """The counts of two success vectors over the same N scenes."""
        counts = (first_N & second_N, first_N & ~second_N, ~first_N & second_N, ~first_N & ~second_N)
        return cls(*(int(each.sum()) for each in counts))

    @property
    def scenes(self) -> int:
        """All of them."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Success rate of the second less that of the first, -1..1."""
        return (self.only_second - self.only_first) / self.scenes if self.scenes else 0.0


def newcombe95(pairs: Pairs) -> tuple[float, float]:
    """95% interval of `pairs.difference`: Newcombe 1998, Statistics in Medicine 17:2635-2650, method 10.

    The two rates' Wilson intervals, joined with the correlation of the pairs. It stays within -1..1, and is not empty
    where no pair differs, nor where all do; a Wald interval and a bootstrap of the scenes have no width there.
    """
    n = pairs.scenes
    if n == 0:
        return -1.0, 1.0
    first, second = pairs.both + pairs.only_first, pairs.both + pairs.only_second
    p, q = second / n, first / n
    (p_low, p_high), (q_low, q_high) = wilson95(second, n), wilson95(first, n)
    margins = first * (n - first) * second * (n - second)
    phi = 0.0
    if margins:
        product = pairs.both * pairs.neither - pairs.only_first * pairs.only_second
        if product > 0:  # a correction for continuity, of a positive correlation only
            product = max(product - n / 2, 0)
        phi = product / math.sqrt(margins)

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    low = p - q - joined(p - p_low, q_high - q)
    high = p - q + joined(p_high - p, q - q_low)
    return max(-1.0, low), min(1.0, high)


def mcnemar(pairs: Pairs) -> float:
    """Exact two-sided p of "neither policy is better": the scenes that only one of them solved fall to either like a
    fair coin. McNemar 1947, with the binomial distribution in place of chi-square."""
    n, fewer = pairs.only_first + pairs.only_second, min(pairs.only_first, pairs.only_second)
    term = tail = 1
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def holm(values: Sequence[float]) -> list[float]:
    """p of several tests, each raised so that all of them together err in 5% at most. Holm 1979."""
    order, adjusted, least = np.argsort(values, kind="stable"), [0.0] * len(values), 0.0
    for rank, index in enumerate(order.tolist()):
        least = max(least, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = least
    return adjusted


def iqm(scores: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Interquartile mean: of n scores the lowest and the highest floor(n/4) are left out. Agarwal et al. 2021,
    "Deep reinforcement learning at the edge of the statistical precipice"."""
    ordered = np.moveaxis(np.sort(scores, axis=axis), axis, -1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


@dataclass(frozen=True)
class Resampled:
    """Bootstrap resamples of one arm. Shapes: B resamples, R policies in each, T tasks."""

    rates_BRT: NDArray[np.float64]
    """Success rate of a policy in a task."""
    scenes_T: NDArray[np.int64]
    """Scenes of every task."""

    def mean(self) -> NDArray[np.float64]:
        """(B,) success rate over all scenes."""
        return self.rates_BRT.mean(1) @ (self.scenes_T / self.scenes_T.sum())

    def of_task(self, task: int) -> NDArray[np.float64]:
        """(B,) success rate in one task."""
        return self.rates_BRT[:, :, task].mean(1)

    def iqm(self) -> NDArray[np.float64]:
        """(B,) interquartile mean over policies and tasks."""
        return iqm(self.rates_BRT.reshape(len(self.rates_BRT), -1))


def bootstrap(
    arms: Sequence[NDArray[np.bool_]], tasks_N: NDArray[np.int64], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Resampled]:
    """Resample training seeds and scenes of several arms, which share their scenes.

    `arms`: (R, N) success of each, R policies (training seeds) in N scenes; `tasks_N`: task of a scene, 0..T-1. Scenes
    are drawn within their task (stratified, as Agarwal et al. 2021 have it), the same for all arms, so that a
    difference of two arms keeps its pairs. A policy is drawn with all of its tasks, since it was trained once for all
    of them. Of R > 1 policies R - 1 are drawn: drawing R would make the variance of their mean too small by a factor of
    (R - 1) / R, a third for three seeds (Rao and Wu 1988). A single policy is always taken: the interval then holds for
    this policy, not for its training.
    """
    rng = np.random.default_rng(seed)
    scenes = np.bincount(tasks_N)
    rates = [np.empty((resamples, len(arm), len(scenes))) for arm in arms]
    for task, n in enumerate(scenes.tolist()):
        weights_BN = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
        for arm, found in zip(arms, rates, strict=True):
            found[:, :, task] = weights_BN @ arm[:, tasks_N == task].T.astype(np.float64)
    drawn = []
    for arm, found in zip(arms, rates, strict=True):
        if len(arm) > 1:
            chosen = rng.integers(len(arm), size=(resamples, len(arm) - 1))
            found = np.take_along_axis(found, chosen[:, :, None], axis=1)
        drawn.append(Resampled(found, scenes))
    return drawn


def rates_by_task(arm_RN: NDArray[np.bool_], tasks_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """(R, T) success rate of every policy in every task."""
    return np.stack([arm_RN[:, tasks_N == task].mean(1) for task in range(int(tasks_N.max()) + 1)], axis=1)


def middle95(values_B: NDArray[np.floating]) -> tuple[float, float]:
    """The middle 95% of resampled values, which is the percentile bootstrap's interval."""
    low, high = np.percentile(values_B, (2.5, 97.5))
    return float(low), float(high)


def verdict(
    first: str, second: str, difference: float, interval95: tuple[float, float], *, p: float | None = None
) -> str:
    """One sentence on `second` beside `first`; `difference` of their rates and its interval lie in -1..1. `p` of an
    exact test of the same scenes, where there is one: of few scenes it shows nothing, whatever the interval."""
    low, high = (100 * end for end in interval95)
    figures = f"{100 * difference:+.1f} points, 95% CI [{low:.1f}, {high:.1f}]"
    if p is not None and p >= 0.05 and not low <= 0 <= high:
        return f"Too few scenes to tell {second} from {first}: {figures}, but McNemar p, exact, is {p:.2g}."
    if low > 0 or high < 0:
        return f"{second} is {'better' if low > 0 else 'worse'} than {first}: {figures}."
    return f"No difference found between {second} and {first}: {figures}."
