"""Intervals of what was counted."""

from __future__ import annotations

import math


def wilson95(successes: int, episodes: int) -> tuple[float, float]:
    """95% interval of a success probability from k of n, both in [0, 1]. Wilson 1927."""
    if episodes == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / episodes
    centre = p + z * z / (2 * episodes)
    half = z * math.sqrt(p * (1 - p) / episodes + z * z / (4 * episodes * episodes))
    scale = 1 + z * z / episodes
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
