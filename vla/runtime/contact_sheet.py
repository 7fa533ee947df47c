"""Pictures side by side in one image."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vla.core.config import write_atomic


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
