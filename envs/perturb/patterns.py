"""Procedural pictures of surfaces: the test axes' patterns and materials, and the patterns of training, all different.

Every picture is a pure function of its name: (SIZE, SIZE, 3) uint8 that repeats without a seam where nature allows.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vla.core.config import lookup

Picture = NDArray[np.uint8]
SIZE = 128
"""Height and width of a pattern, pixels."""

PATTERNS = ("checks", "stripes", "grain", "planks")
"""Grey patterns of the texture axis, which a surface's colour tints."""
MATERIALS = tuple(f"{kind}{k}" for kind in ("wood", "cloth", "marble", "print") for k in range(3))
"""Coloured surfaces of the materials axis, made to look real: three of each kind."""
TRAINING = tuple(
    f"{kind}{k}"
    for kind in ("clouds", "dots", "zigzag", "rings", "cells", "scribble", "ramps", "blots")
    for k in range(3)
)
"""Grey and coloured patterns that randomised training draws from; no test axis has any of them."""


def pattern_pixels(name: str, size: int = SIZE) -> Picture:
    """(size, size, 3) grey pattern of the texture axis."""
    y, x = np.mgrid[:size, :size] / size
    if name == "checks":
        level = ((x * 8).astype(int) + (y * 8).astype(int)) % 2
    elif name == "stripes":
        level = 0.5 + 0.5 * np.sin(2 * np.pi * 8 * (x + 0.5 * y))
    elif name == "grain":
        level = np.random.default_rng(7).uniform(size=(size // 4, size // 4)).repeat(4, 0).repeat(4, 1)
    else:
        lookup(name, dict.fromkeys(PATTERNS), "pattern")
        rows = (y * 8).astype(int)
        level = np.random.default_rng(8).uniform(0.2, 1.0, 8)[rows] * (np.abs(y * 8 % 1 - 0.5) < 0.46)
    return np.repeat((255 * (0.55 + 0.45 * level)).astype(np.uint8)[..., None], 3, axis=2)


def surface_pixels(name: str, size: int = SIZE) -> Picture:
    """(size, size, 3) picture of a material of the test axis, or of a pattern of training."""
    painter = lookup(name.rstrip("0123456789"), PAINTERS, "surface")
    rng = np.random.default_rng([zlib.crc32(name.encode()), 211])
    return (255 * np.clip(painter(rng, size), 0.0, 1.0)).astype(np.uint8)


def _noise(rng: np.random.Generator, size: int, cells: tuple[int, int], octaves: int = 4) -> NDArray[np.float64]:
    """(size, size) smooth noise in about 0..1, of `cells` (rows, columns) and finer; it repeats without a seam."""
    total, weight = np.zeros((size, size)), 0.0
    for octave in range(octaves):
        rows, columns = cells[0] << octave, cells[1] << octave
        if max(rows, columns) > size:
            break
        grid = rng.uniform(size=(rows, columns))
        y, x = np.arange(size) * rows / size, np.arange(size) * columns / size
        top, left = y.astype(int), x.astype(int)
        v, u = _smooth(y - top)[:, None], _smooth(x - left)[None]
        below, right = (top + 1) % rows, (left + 1) % columns
        upper = grid[np.ix_(top, left)] * (1 - u) + grid[np.ix_(top, right)] * u
        lower = grid[np.ix_(below, left)] * (1 - u) + grid[np.ix_(below, right)] * u
        total += 0.5**octave * (upper * (1 - v) + lower * v)
        weight += 0.5**octave
    return total / weight


def _smooth(t: NDArray[np.float64]) -> NDArray[np.float64]:
    return t * t * (3 - 2 * t)


def _mixed(level: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """(H, W, 3) colours between `low` and `high` by `level` (H, W)."""
    return low + level[..., None] * (high - low)


def _grid(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y, x = np.mgrid[:size, :size] / size
    return y, x


# ---------------------------------------------------------------------- the materials axis
def _wood(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    dark = np.array([[0.25, 0.15, 0.08], [0.55, 0.36, 0.2], [0.45, 0.27, 0.17]])[rng.integers(3)]
    light = rng.uniform(0.2, 0.35)
    y, _ = _grid(size)
    boards = int(rng.integers(3, 6))
    board = (y * boards).astype(int) % boards
    along = _noise(rng, size, (16, 2), 3) + rng.uniform(0, 9, boards)[board]
    fibres = 0.5 + 0.5 * np.sin(2 * np.pi * 5 * along)
    level = 0.6 * fibres + 0.25 * _noise(rng, size, (64, 4), 2) + 0.25 * rng.uniform(size=boards)[board]
    seam = np.abs(y * boards % 1 - 0.5) > 0.485
    return _mixed(level, dark, dark + light) * np.where(seam, 0.45, 1.0)[..., None]


def _cloth(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    colours = np.array(
        [[0.16, 0.2, 0.34], [0.62, 0.58, 0.5], [0.36, 0.37, 0.36], [0.42, 0.16, 0.17], [0.8, 0.79, 0.74]]
    )
    colour = colours[rng.integers(len(colours))]
    y, x = _grid(size)
    over = (np.floor(x * 64) + np.floor(y * 64)) % 2
    thread = 0.82 + 0.18 * np.where(over > 0, np.sin(np.pi * 64 * x) ** 2, np.sin(np.pi * 64 * y) ** 2)
    folds = 0.7 + 0.45 * _noise(rng, size, (2, 3), 3)
    return colour * (thread * folds)[..., None]


def _marble(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    grounds = np.array([[0.88, 0.87, 0.85], [0.2, 0.21, 0.22], [0.34, 0.42, 0.38]])
    veins = np.array([[0.5, 0.5, 0.53], [0.8, 0.78, 0.72], [0.82, 0.86, 0.82]])
    kind = rng.integers(3)
    y, x = _grid(size)
    warped = x + y + 1.6 * _noise(rng, size, (3, 3), 5)
    vein = (1 - np.abs(np.sin(np.pi * 2 * warped))) ** 5
    cloud = 0.85 + 0.25 * _noise(rng, size, (4, 4), 4)
    return _mixed(vein, grounds[kind] * cloud[..., None], veins[kind])


def _print(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """A table cloth with printed flowers in rows, on a pale ground."""
    picture = np.tile(rng.uniform(0.7, 0.95, 3), (size, size, 1))
    y, x = _grid(size)
    across = int(rng.integers(3, 5))
    petals, inks = int(rng.integers(5, 8)), rng.uniform(0.1, 0.8, (3, 3))
    for row in range(across):
        for column in range(across):
            shift = 0.5 * (row % 2)
            dy = (y - (row + 0.5) / across + 0.5) % 1 - 0.5
            dx = (x - (column + 0.5 + shift) / across + 0.5) % 1 - 0.5
            radius, angle = np.hypot(dx, dy) * across, np.arctan2(dy, dx)
            flower = radius < 0.3 * (0.65 + 0.35 * np.cos(petals * angle))
            picture[flower] = inks[(row + column) % 2]
            picture[radius < 0.08] = inks[2]
    return picture * (0.95 + 0.05 * rng.uniform(size=(size, size, 1)))


# ---------------------------------------------------------------------- training
def _inks(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two colours to mix: greys half of the time, so that a tint alone colours the pattern."""
    if rng.uniform() < 0.5:
        low = np.full(3, rng.uniform(0.25, 0.6))
        return low, low + rng.uniform(0.3, 0.4)
    hue, saturation, value = rng.uniform(size=2), rng.uniform(0.1, 0.6, 2), rng.uniform(0.35, 1.0, 2)
    low, high = (np.array(colorsys.hsv_to_rgb(*hsv)) for hsv in zip(hue, saturation, value, strict=True))
    return low, high


def _clouds(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    return _mixed(_noise(rng, size, (3, 3), 5), *_inks(rng))


def _dots(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    y, x = _grid(size)
    across, radius = int(rng.integers(4, 9)), rng.uniform(0.2, 0.4)
    inside = np.hypot(x * across % 1 - 0.5, y * across % 1 - 0.5) < radius
    return _mixed(inside.astype(float), *_inks(rng))


def _zigzag(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    y, x = _grid(size)
    across = int(rng.integers(3, 7))
    teeth = np.abs(x * across % 1 - 0.5)
    return _mixed(((y * across + teeth) % 1 < 0.5).astype(float), *_inks(rng))


def _rings(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    y, x = _grid(size)
    far = np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8))
    return _mixed(0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(4, 9) * far), *_inks(rng))


def _cells(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Each place has the colour of the nearest of some random points (Voronoi 1908)."""
    y, x = _grid(size)
    count = int(rng.integers(14, 40))
    points, level = rng.uniform(size=(count, 2)), rng.uniform(size=count)
    dy = np.abs(y[..., None] - points[:, 0])
    dx = np.abs(x[..., None] - points[:, 1])
    nearest = (np.minimum(dy, 1 - dy) ** 2 + np.minimum(dx, 1 - dx) ** 2).argmin(-1)
    return _mixed(level[nearest], *_inks(rng))


def _scribble(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    y, x = _grid(size)
    drawn = np.zeros((size, size))
    for _ in range(int(rng.integers(8, 20))):
        a, b, c = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.01, 0.03)
        line = a * x + b * y + 0.08 * np.sin(2 * np.pi * rng.uniform(1, 3) * x + rng.uniform(0, 6))
        drawn = np.maximum(drawn, np.abs(line - rng.uniform(-0.6, 0.8)) < c)
    return _mixed(drawn, *_inks(rng))


def _ramps(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    y, x = _grid(size)
    a, b = rng.integers(1, 4, 2)
    return _mixed((a * x + b * y + 0.1 * _noise(rng, size, (4, 4), 2)) % 1.0, *_inks(rng))


def _blots(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    level = _noise(rng, size, (6, 6), 4)
    return _mixed((level > np.quantile(level, rng.uniform(0.4, 0.7))).astype(float), *_inks(rng))


PAINTERS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "wood": _wood, "cloth": _cloth, "marble": _marble, "print": _print,
    "clouds": _clouds, "dots": _dots, "zigzag": _zigzag, "rings": _rings, "cells": _cells, "scribble": _scribble,
    "ramps": _ramps, "blots": _blots,
}  # fmt: skip
