"""LeRobot's own trainer without its detour on datasets of pictures: `python -m policies.lerobot.train ARGS`.

For every action of a chunk LeRobot 0.6 decodes the pictures of that control step too, and drops them (its issue 4392):
chunks of 16 actions are read 15 to 30 times more slowly than they need be. Here the numbers are gathered from the
table's columns. Batches are the same, bit for bit; nothing else is changed. Training runs faster, above all on a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lerobot.datasets.dataset_reader import DatasetReader
from torch import Tensor

from vla.core.config import save_json

_NUMBERS = ("float", "int", "uint", "bool")
_query = DatasetReader._query_hf_dataset


def read_numbers_by_column() -> None:
    """From now on LeRobot's datasets in this process gather vectors of numbers without decoding pictures."""
    DatasetReader._query_hf_dataset = _by_column


def _by_column(self: Any, query_indices: dict[str, list[int]]) -> dict[str, Tensor]:
    """{feature: the rows asked for}, as `DatasetReader._query_hf_dataset` returns them."""
    columns = self.__dict__.setdefault("_columns_of_numbers", {})
    found, others = {}, {}
    for key, rows in query_indices.items():
        feature = self._meta.features[key]
        if not str(feature["dtype"]).startswith(_NUMBERS) or self.hf_dataset._indices is not None:
            others[key] = rows  # pictures and words; and where rows are chosen in another order
            continue
        if key not in columns:
            values = self.hf_dataset.data.column(key).to_pylist()
            columns[key] = torch.from_numpy(np.asarray(values, feature["dtype"]))
        places = self._absolute_to_relative_idx
        found[key] = columns[key][rows if places is None else [places[row] for row in rows]]
    return found | (_query(self, others) if others else {})


class Stopwatch:
    """Times the steps of a run of LeRobot's trainer: from the first batch that was read to the last step."""

    def __init__(self, update: Callable[..., Any]) -> None:
        """`update` is LeRobot's step; the stopwatch takes its place."""
        self._update = update
        self._marks: list[tuple[float, float]] = []  # before the first step, and after every one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step."""
        if not self._marks:
            self._marks.append(_now())
        done = self._update(*args, **kwargs)
        self._marks.append(_now())
        return done

    def times(self) -> dict[str, float]:
        """Seconds by the wall's clock and of this process's computing, in all and after the first step."""
        begin, first, last = self._marks[0], self._marks[1], self._marks[-1]
        return {
            "seconds": last[0] - begin[0],
            "cpu_seconds": last[1] - begin[1],
            "seconds_after_first": last[0] - first[0],
            "cpu_seconds_after_first": last[1] - first[1],
        }


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def main() -> None:
    """Run `lerobot-train` with this process's arguments; `--times=FILE` is ours: where to write how long it took."""
    from lerobot.scripts import lerobot_train

    read_numbers_by_column()
    asked = [arg for arg in sys.argv if arg.startswith("--times=")]
    sys.argv = [arg for arg in sys.argv if arg not in asked]
    lerobot_train.update_policy = watch = Stopwatch(lerobot_train.update_policy)
    lerobot_train.main()
    for arg in asked:
        save_json(arg.removeprefix("--times="), watch.times())


if __name__ == "__main__":
    main()
