"""The black box of a controller: every input and decision of every tick as JSON lines, replayable bit for bit.

Camera images are stored in LOG.frames (raw pixels, each frame once); a tick names the latest frame.
`policies.lerobot.recording` makes a LeRobotDataset of both. The last line says that the run was logged to its end; a
log without it is incomplete (a crash, or a full disk), and its reader reports that.

A log that can no longer be written does not stop the robot: the guards decide without it, and a sudden stop in the
middle of a movement would be the worse surprise. One line on stderr says so at once, and `close` raises it.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

import numpy as np

from policies.control.guards import Decision, Governor, GuardConfig, Inputs, Kind
from vla.core.config import decode, encode
from vla.core.disk import full, is_full
from vla.core.types import ActionSpec, Observation

FORMAT = 1


class LogIncomplete(OSError):
    """The run has ended, and its log lacks a part of it. One line that says why."""


class BlackBox:
    """Writes one line at the start of a run and one per tick. A thread of its own does: a disk that is busy must not
    hold up a robot. Lines are handed to the operating system one by one, as soon as they come.

    As a context manager its end raises `LogIncomplete` where the log could not be written to the end."""

    def __init__(self, path: Path) -> None:
        """ValueError if the file is there, or one with its pictures: a log is evidence, and not written over."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if frames_file(path).exists() and not path.exists():
            raise ValueError(f"{frames_file(path)} holds the pictures of a log: choose another file for this one")
        try:
            self._file: TextIO = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise ValueError(f"{path} is already there: choose another file for the log") from None
        self._frames = frames_file(path).open("wb")
        self._path = path
        self._ticks = 0
        self._began = self._closed = False
        self._problem: str | None = None
        self._shown: Observation | None = None
        self._frame = -1
        self._queue: SimpleQueue[dict[str, Any] | Observation | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._work, name="black box", daemon=True)
        self._writer.start()

    def start(
        self,
        config: GuardConfig,
        spec: ActionSpec,
        kinds: Sequence[Kind],
        rest: Sequence[float],
        proprio_names: Sequence[str],
        **more: Any,
    ) -> None:
        """Write the header line that a replay reads; `more` holds fields for people."""
        self._began = True
        self._write(
            {
                "blackbox": FORMAT,
                "guards": asdict(config),
                "action_spec": asdict(spec),
                "kinds": list(kinds),
                "rest": list(rest),
                "proprio_names": list(proprio_names),
                "ends": True,
                **more,
            }
        )

    def tick(self, inputs: Inputs, decision: Decision, *, obs: Observation | None = None, **more: Any) -> None:
        """`obs`: the latest observation; its pictures are written when it is another than at the last tick."""
        if obs is not None and obs is not self._shown:
            if self._shown is None or obs.instruction != self._shown.instruction:
                self._queue.put(
                    {"cameras": {n: i.shape[1:] for n, i in obs.images.items()}, "task": obs.instruction[0]}
                )
            self._queue.put(obs)
            self._shown, self._frame = obs, self._frame + 1
        self._queue.put({"inputs": inputs, "decision": decision, "frame": self._frame, **more})
        self._ticks += 1

    def event(self, **what: Any) -> None:
        """Log an event that happens between ticks, as one line with the fields of `what`."""
        self._began = True
        self._queue.put(what)

    def close(self) -> None:
        """Everything is on its way to the disk, the line that marks the end too. Safe to call twice.

        LogIncomplete, after closing, if some of it could not be written."""
        if not self._closed:
            self._closed = True
            self._queue.put({"end": self._ticks})
            self._queue.put(None)
            self._writer.join()
            for file in (self._file, self._frames):
                try:
                    file.close()
                except OSError as error:  # closing writes once more what could not be written
                    self._note(error)
        if self._problem is not None:
            raise LogIncomplete(self._problem)

    def __enter__(self) -> BlackBox:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except LogIncomplete:
            if kind is None:  # else that error is the one to tell
                raise
        if kind is not None and not self._began:  # refused before it began: no evidence, and in the way of the next try
            for path in (self._path, frames_file(self._path)):
                path.unlink(missing_ok=True)

    def _write(self, line: dict[str, Any]) -> None:
        self._queue.put(line)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._problem is not None:
                continue  # what comes now would leave a gap, and the memory must not fill
            try:
                self._put(item)
            except Exception as error:
                self._note(error)

    def _put(self, item: dict[str, Any] | Observation) -> None:
        if isinstance(item, Observation):
            for image in item.images.values():
                self._frames.write(np.ascontiguousarray(image[0]).tobytes())
            self._frames.flush()
            return
        # JSON has no NaN and no infinity, and here they are what matters: they become words.
        self._file.write(json.dumps(encode(item, not_finite=str), allow_nan=False) + "\n")
        self._file.flush()  # a run that ends badly is the one whose log is read

    def _note(self, error: Exception) -> None:
        """Record why the log ends here, and report it once on stderr."""
        if self._problem is None:
            reason = str(full(self._path)) if is_full(error) else f"{type(error).__name__}: {error}"
            self._problem = f"the log {self._path} is incomplete: {' '.join(reason.split())}"
            print(f"vla: warning: {self._problem}", file=sys.stderr, flush=True)


def frames_file(log: Path) -> Path:
    """Where the pictures of a log are."""
    return log.with_name(log.name + ".frames")


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, lines) of a log, without the mark of its end; a last line cut by a crash is left out, too (`incomplete`
    tells). ValueError when it is no log of ours."""
    header, lines = _whole(path)
    return header, [line for line in lines if "end" not in line]


def _whole(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = list(_lines(path))
    if not lines or lines[0].get("blackbox") != FORMAT:
        raise ValueError(f"{path} is no black-box log of format {FORMAT}")
    # A run may write its header anew before its first tick, never after.
    if runs := sum("blackbox" in line and "blackbox" not in last for last, line in pairwise(lines)):
        raise ValueError(f"{path} holds the logs of {runs + 1} runs, put together: give each by itself")
    numbers = [line["tick"] for line in lines if "tick" in line]
    if wrong := [(before, now) for before, now in pairwise(numbers) if now <= before]:
        before, now = wrong[0]
        raise ValueError(f"{path} was changed after its run: behind tick {before} stands tick {now}")
    return lines[0], lines[1:]


def incomplete(path: Path) -> str | None:
    """How a log lacks the end of its run, None for a whole one. Logs of before this was noted count as whole, unless
    their last line is cut."""
    header, lines = _whole(path)
    if header.get("ends"):
        ticks = sum("inputs" in line for line in lines)
        end = next((line["end"] for line in reversed(lines) if "end" in line), None)
        if end is None:
            return f"the log {path} is incomplete: it breaks off after {ticks} ticks, before the run ended"
        if end != ticks:
            return f"the log {path} is incomplete: it holds {ticks} of {end} ticks"
    elif not Path(path).read_bytes().endswith(b"\n"):
        return f"the log {path} is incomplete: its last line is cut"
    return None


def pictures_lost(path: Path) -> str | None:
    """How LOG.frames lacks pictures that ticks of the log name, None where all are there."""
    _, lines = _whole(path)
    size = picture_bytes(lines)
    there = frames_file(path).stat().st_size // size if size else 0
    seen = [line["frame"] for line in lines if "inputs" in line and line["frame"] >= 0]
    lost = sum(frame >= there for frame in seen)
    named = max(seen, default=-1) + 1
    if there > named and incomplete(path) is None:
        return f"{frames_file(path).name} holds {there} views, and the log {path} {named}: is it of another run?"
    if not lost:
        return None
    name = frames_file(path).name
    return f"the log {path} is incomplete: {name} is cut, of {len(seen)} ticks the pictures of {lost} are missing"


def picture_bytes(lines: Sequence[dict[str, Any]]) -> int:
    """Bytes of one frame in LOG.frames, the pictures of all cameras; 0 in a log that saw none."""
    shapes = next((line["cameras"] for line in lines if "cameras" in line), {})
    return sum(int(np.prod(shape)) for shape in shapes.values())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """ValueError naming the log for lines of JSON that are not those of a log."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # it says more
        raise ValueError(
            f"{path} is damaged, was changed after its run, or is of another version: {type(error).__name__}: {error}"
        ) from error


def replay(path: Path) -> list[tuple[Decision, Decision]]:
    """(logged, decided again) of every tick: the guards run anew on the logged inputs. Equal unless they changed."""
    with reading(path):
        header, lines = read(path)
        governor = Governor(
            decode(GuardConfig, _number(header["guards"])),
            decode(ActionSpec, _number(header["action_spec"])),
            tuple(header["kinds"]),
            rest=_number(header["rest"]),
            proprio_names=tuple(header["proprio_names"]),
        )
        pairs = []
        for line in lines:
            if "inputs" in line:
                inputs = Inputs(**{name: _number(value) for name, value in line["inputs"].items()})
                logged = Decision(**{name: _number(value) for name, value in line["decision"].items()})
                pairs.append((logged, governor.decide(inputs)))
    return pairs


def changed(path: Path) -> str | None:
    """How a log does not agree with itself, as one that was edited; None where it does. Guards that have changed since
    it was written look the same."""
    ticks = [line for line in read(path)[1] if "inputs" in line]
    differ = [number for number, (logged, again) in enumerate(replay(path), 1) if logged != again]
    with reading(path):
        for number, (line, following) in enumerate(pairwise(ticks), 1):
            if "sent" in line and line["sent"] != following["inputs"].get("sent"):
                differ.append(number)
    if not differ:
        return None
    return (
        f"the log {path} does not agree with itself at {len(differ)} ticks, first at tick {min(differ)}: was it "
        "changed after its run, or written by another version?"
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with Path(path).open(encoding="utf-8-sig", errors="replace") as file:  # editors on Windows set a mark
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                continue
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise ValueError(
                    f"{path} is no log of `vla control --log`, or is damaged: line {number} is no JSON object"
                )
            yield found


_NOT_FINITE = ("nan", "inf", "-inf")


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _number(item) for name, item in value.items()}
    if isinstance(value, list):
        return tuple(_number(item) for item in value)
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value
