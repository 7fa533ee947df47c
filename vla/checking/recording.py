"""A LeRobotDataset v3 opened for checking: its bookkeeping in memory, its vectors read episode by episode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla.data.dataset_meta import camera_keys, check_width, component_names, read_info
from vla.data.lerobot_dataset import ACTION, PROPRIO
from vla.data.tables import check_columns, data_files, numbers, read_parquet, read_table

FEATURES = (PROPRIO, ACTION)
_BATCH, _PICTURES = 4096, 64
"""Rows read at once, of vectors and of pictures."""


@dataclass(frozen=True, eq=False)
class Recording:
    """The facts about a dataset that are known before its vectors and pictures are read."""

    root: Path
    info: dict[str, Any]
    table: pa.Table
    """Bookkeeping of all frames, in recorded order: 40 bytes each."""
    order: NDArray[np.int64]
    """Where each row lies in the files."""
    names: dict[str, tuple[str, ...]]
    """Components of the state and of the action, by feature."""
    cameras: dict[str, str]
    """Camera -> feature."""
    episodes: NDArray[np.int64]
    """Numbers of the episodes, as recorded."""
    starts: NDArray[np.int64]
    """First row of each episode, and behind them the number of rows."""

    @property
    def fps(self) -> float:
        """The declared rate, frames per second."""
        return float(self.info["fps"])

    @property
    def frames(self) -> int:
        """Frames over all episodes."""
        return len(self.table)

    def rows(self, place: int) -> slice:
        """The rows of the episode at this place (not: of this number)."""
        return slice(int(self.starts[place]), int(self.starts[place + 1]))

    def encoded(self, key: str) -> bool:
        """True for a camera whose pictures lie in data/ one by one, not in videos."""
        return self.info["features"][key]["dtype"] == "image"

    def vectors(self, features: Sequence[str] = FEATURES) -> Iterator[tuple[int, pa.Table]]:
        """(place of an episode, its table with bookkeeping and these features), one episode after the other."""
        if (self.order == np.arange(self.frames)).all():
            batches = self._batches(features)
        else:  # the files are not in recorded order, which no tool of LeRobot's makes: read at once
            parts = [read_parquet(path, self.root, features) for path in data_files(self.root, self.info)]
            batches = iter([pa.concat_tables(parts, promote_options="permissive").take(pa.array(self.order))])
        waiting, count = [], 0
        for place in range(len(self.episodes)):
            rows = self.rows(place)
            length = rows.stop - rows.start
            while count < length:
                batch = next(batches)
                waiting.append(batch)
                count += len(batch)
            whole = pa.concat_tables(waiting, promote_options="permissive")
            part, rest = whole.slice(0, length), whole.slice(length)
            waiting, count = [rest], count - length
            table = self.table.slice(rows.start, length)
            for key in features:
                table = table.append_column(key, part.column(key))
            yield place, table

    def pictures(self, key: str) -> Iterator[tuple[int, Any]]:
        """(row, cell) of every picture of an image feature, as it lies in the files: encoded, in a few at a time."""
        row_at = np.argsort(self.order)  # of each place in the files
        place = 0
        for path in data_files(self.root, self.info):
            file = pq.ParquetFile(path)
            check_columns(file.schema_arrow.names, path, self.root, [key])
            for batch in file.iter_batches(_PICTURES, columns=[key]):
                for cell in batch.column(0):
                    yield int(row_at[place]), cell.as_py()
                    place += 1

    def values(self, table: pa.Table, key: str) -> NDArray[np.float64]:
        """(T, D) of a feature of an episode's table, also NaN and infinities. ValueError for what is no vector."""
        return numbers(table, self.info["features"], key).astype(np.float64)

    def _batches(self, features: Sequence[str]) -> Iterator[pa.Table]:
        for path in data_files(self.root, self.info):
            file = pq.ParquetFile(path)
            check_columns(file.schema_arrow.names, path, self.root, features)
            for batch in file.iter_batches(_BATCH, columns=list(features)):
                yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def open_recording(root: Path) -> Recording:
    """The dataset in this folder. ValueError, one line, where it cannot be read at all."""
    info = read_info(root)
    features = info["features"]
    for key in FEATURES:
        check_width(features, key, None)
    cameras = camera_keys(features, None)
    table, order = read_table(root, info, [])
    numbers_of = table.column("episode_index").to_numpy()
    starts = np.append(0, np.flatnonzero(np.diff(numbers_of)) + 1)
    names = {key: component_names(features, key) for key in FEATURES}
    return Recording(root, info, table, order, names, cameras, numbers_of[starts], np.append(starts, len(table)))
