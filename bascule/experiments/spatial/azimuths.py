"""Where the fixed camera stands in the experiment xyz: degrees about the table, for training and held out."""

from __future__ import annotations

import numpy as np

_SECTORS = ((-60, -44), (-28, -12), (4, 20), (36, 52))
_BETWEEN = ((-40, -32), (-8, 0), (24, 32))
HELD_OUT: tuple[float, ...] = tuple(float(degree) for low, high in _BETWEEN for degree in range(low, high + 1))
"""Azimuths of the evaluation; none is within 4 degrees of one that training may have."""


def trained_azimuths(seed: int) -> tuple[float, ...]:
    """The azimuths of a training seed's demonstrations, drawn at random: one in each of four sectors."""
    rng = np.random.default_rng([seed, 20_260])
    return tuple(round(float(rng.uniform(low, high)), 1) for low, high in _SECTORS)
