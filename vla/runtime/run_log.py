"""Where a run's figures go: always metrics.jsonl, and TensorBoard, Weights & Biases or Trackio on request."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vla.core.config import lookup, write_atomic
from vla.core.disk import writing

METRICS = "metrics.jsonl"
Log = Callable[[int, Mapping[str, float]], None]


class Metrics:
    """One line of JSON per record, flushed; the same numbers to every tracker. Use as a context manager."""

    def __init__(self, out: Path, trackers: tuple[str, ...] = (), *, first_step: int = 0, config: Any = None) -> None:
        """`first_step`: of a resumed run; what was logged after it is dropped, for it will be logged again."""
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / METRICS
        keep_metrics(self._path, first_step)
        opened = [lookup(name, TRACKERS, "tracker")(out, config, first_step) for name in trackers]
        self._logs, self._closes = [log for log, _ in opened], [close for _, close in opened]
        self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # closing writes once more what a full disk refused: it was told when it was logged
            self._file.close()
        for close in self._closes:
            close()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line of figures to the metrics file and pass them to the trackers."""
        with writing(self._path):
            self._file.write(json.dumps({"step": step, **figures}) + "\n")
            self._file.flush()
        for log in self._logs:
            log(step, figures)


def check_trackers(names: tuple[str, ...]) -> None:
    """ValueError for a tracker that there is not or whose package is missing, before the work that it would log."""
    for name in names:
        lookup(name, TRACKERS, "tracker")
        if importlib.util.find_spec(name) is None:
            how = "install bascule[train]" if name == "tensorboard" else f"pip install {name}"
            raise ValueError(f"tracker '{name}' needs its package: {how}")


def keep_metrics(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that is being resumed."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A killed run may have left half a line.
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line).get("step", 0) <= step]
        write_atomic(path, "".join(kept).encode())


def _tensorboard(out: Path, config: Any, first_step: int) -> tuple[Log, Callable[[], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tracker 'tensorboard' needs its package: install bascule[train]") from None
    writer = SummaryWriter(out / "tensorboard", purge_step=first_step + 1 if first_step else None)

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _run_tracker(module: str) -> Callable[[Path, Any, int], tuple[Log, Callable[[], None]]]:
    """wandb and trackio have the same three functions."""

    def start(out: Path, config: Any, first_step: int) -> tuple[Log, Callable[[], None]]:
        try:
            tracker = importlib.import_module(module)
        except ImportError:
            raise ValueError(f"tracker '{module}' needs its package: pip install {module}") from None
        where = {"dir": os.fspath(out)} if module == "wandb" else {}
        tracker.init(project="bascule", name=out.resolve().name, config=config, **where)

        def log(step: int, figures: Mapping[str, float]) -> None:
            tracker.log(dict(figures), step=step)

        return log, tracker.finish

    return start


TRACKERS: dict[str, Callable[[Path, Any, int], tuple[Log, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _run_tracker("wandb"),
    "trackio": _run_tracker("trackio"),
}


def mean_of(entries: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of logged figures, those that the last entry has; the learning rate is the last one's."""
    return {name: sum(entry[name] for entry in entries) / len(entries) for name in entries[-1]} | {
        "lr": entries[-1]["lr"]
    }
