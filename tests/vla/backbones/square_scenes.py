"""A grounding set that needs no simulator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_set(folder: Path, scenes: int) -> Path:
    """Scenes of one bright square on black; the prompt asks for it and its colour decides the answer."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    picture = np.zeros((scenes, 2, 84, 84, 3), np.uint8)
    points = np.full((scenes, 8, 2, 9), np.nan, np.float32)
    texts = []
    for s in range(scenes):
        column, row, channel = *rng.integers(8, 76, 2), int(rng.integers(0, 2))
        picture[s, :, row - 6 : row + 6, column - 6 : column + 6, 2 * channel] = 255
        uv = np.array([column, row]) / 42 - 1
        points[s, :5, 0] = [uv[0] * 0.1, uv[1] * 0.1, 0, *uv, 1, *uv, 1]
        texts.append([["pick up the cube", ""]] * 5 + [["the cube", "yes" if channel else "no"]] * 3)
    np.save(folder / "images.npy", picture)
    np.save(folder / "points.npy", points)
    np.save(folder / "grip.npy", np.zeros((scenes, 3), np.float32))
    (folder / "questions.json").write_text(json.dumps(texts))
    return folder
