"""Several scenes in one picture, each with its caption: a contact sheet, and an animation that says how each ended."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.core.config import write_atomic

SUCCEEDED, FAILED = (46, 160, 67), (207, 60, 50)
"""RGB of the border of a scene that is over."""
_GAP, _BORDER, _LINE = 8, 4, 16


class Animation:
    """A grid of scenes that grows frame by frame. `add` frames, then `save`: only then is there a file."""

    def __init__(self, captions: Sequence[str]) -> None:
        self._captions = tuple(captions)
        count = len(self._captions)
        self._columns = count if count <= 4 else min(5, -(-count // 2))
        self._frames: list[Any] = []

    def add(self, pictures_BHWC: NDArray[np.uint8], succeeded_B: NDArray[np.bool_], over_B: NDArray[np.bool_]) -> None:
        """Append one frame: an RGB picture of every scene, bordered where the scene is over."""
        from PIL import Image, ImageDraw

        height, width = pictures_BHWC.shape[1:3]
        captions = [textwrap.wrap(words, max(1, int(width / 6.6)))[:3] for words in self._captions]
        cell_w, cell_h = width + 2 * _BORDER, height + 2 * _BORDER + _LINE * max(map(len, captions)) + 2
        rows = -(-len(captions) // self._columns)
        size = (self._columns * (cell_w + _GAP) + _GAP, rows * (cell_h + _GAP) + _GAP)
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        for k, words in enumerate(captions):
            x, y = _GAP + k % self._columns * (cell_w + _GAP), _GAP + k // self._columns * (cell_h + _GAP)
            if over_B[k]:
                box = (x, y, x + cell_w - 1, y + height + 2 * _BORDER - 1)
                draw.rectangle(box, fill=SUCCEEDED if succeeded_B[k] else FAILED)
            sheet.paste(Image.fromarray(pictures_BHWC[k]), (x + _BORDER, y + _BORDER))
            draw.text((x + _BORDER, y + height + 2 * _BORDER), "\n".join(words), fill="black", font_size=13)
        self._frames.append(sheet)

    def save(self, path: Path, *, frame_ms: int, hold_ms: int = 2000, quality: int = 60) -> None:
        """Write an endlessly repeating WebP; the last frame stays for `hold_ms`. ValueError without frames."""
        if not self._frames:
            raise ValueError(f"no frame was added to {path}")
        first, *others = self._frames
        durations = [frame_ms] * len(others) + [hold_ms]
        buffer = io.BytesIO()
        first.save(
            buffer, "WEBP", save_all=True, append_images=others, duration=durations, loop=0, quality=quality, method=4
        )
        write_atomic(path, buffer.getvalue())


def contact_sheet(views: list[NDArray[np.uint8]], captions: list[str], path: Path, *, columns: int = 4) -> None:
    """Save B scenes as a PNG: per scene its views (each (B, H, W, 3)) side by side, the caption below, wrapped."""
    from PIL import Image, ImageDraw

    scenes = np.concatenate(views, axis=2)
    gap, height, width = 8, *scenes.shape[1:3]
    wrapped = [textwrap.wrap(caption, max(1, int(width / 6.6))) or [""] for caption in captions]  # letters of 6 to 7 px
    line = 16 * max(map(len, wrapped)) + 2
    rows = -(-len(scenes) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (scene, words) in enumerate(zip(scenes, wrapped, strict=True)):
        x, y = gap + index % columns * (width + gap), gap + index // columns * (height + line + gap)
        sheet.paste(Image.fromarray(scene), (x, y))
        draw.text((x, y + height + 2), "\n".join(words), fill="black", font_size=13)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
