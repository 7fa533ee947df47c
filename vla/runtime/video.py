"""Short films as mp4, written as they grow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vla.core.config import write_atomic


class FilmWriter:
    """H.264 in an mp4 file. `add` frames, then `close`: only then is there a file, and it is whole."""

    def __init__(self, path: Path, fps: float) -> None:
        import av

        self._path, self._buffer = path, io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4")
        self._rate = round(fps)
        self._stream = None

    def add(self, frame_HWC: NDArray[np.uint8]) -> None:
        """Append an RGB frame; all frames of a film have one size. An odd last row or column is left out."""
        import av

        height, width = (side - side % 2 for side in frame_HWC.shape[:2])  # what the codec's half-size colours need
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._rate)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.options = {"crf": "20", "preset": "veryfast"}
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC[:height, :width]), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> Path:
        """Write the file. ValueError for a film without frames."""
        if self._stream is None:
            raise ValueError(f"no frame was added to {self._path}")
        self._container.mux(self._stream.encode())
        self._container.close()
        write_atomic(self._path, self._buffer.getvalue())
        return self._path
