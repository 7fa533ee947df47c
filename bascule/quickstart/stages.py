"""A job in stages, each of which stores its result in a file, so that finished stages are never lost.

`OUT/stages/NAME.json` (written atomically; films as `NAME.npz` beside it) holds how a stage ended and what it
contributes to the report. A job that was killed, or had a stage that failed, continues with the rest.
"""

from __future__ import annotations

import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla.core.checkpoint import CONFIG, weights_digest
from vla.core.config import load_json, save_json, write_atomic
from vla.runtime import console
from vla.runtime.machine import peak_memory_gib

State = Literal["done", "failed", "not run"]


@dataclass
class Result:
    """The results of one stage."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Counts and figures shown next to its name."""
    parts: dict[str, Any] = field(default_factory=dict)
    """Its parts of the report, by their names there; tables of several stages are put together."""
    films: list[dict[str, Any]] = field(default_factory=list)
    """{"caption", "success", "wrong_object", "stage", "frames": (F, H, W, 3) uint8} each."""


@dataclass(frozen=True)
class Stage:
    """A named function, and the stages whose results it needs."""

    name: str
    work: Callable[[], Result]
    needs: tuple[str, ...] = ()
    makes: Path | None = None
    """The folder that it leaves, where that is a result of the job."""
    hands_on: Path | None = None
    """The folder that it leaves for stages that need it, where that is no result: it may go when they are done."""


@dataclass
class Outcome:
    """How a stage ended, as it is kept on disk."""

    name: str
    state: State = "not run"
    seconds: float = 0.0
    reason: str = ""
    """Why it failed, or what it waits for, in one line."""
    peak_memory_gib: float = 0.0
    result: Result = field(default_factory=Result)
    made: str = ""
    """Digest of the checkpoint that it left; "" for other stages, and in runs of before it was kept."""

    def row(self) -> dict[str, Any]:
        """The stage in the report."""
        reason = {"reason": self.reason} if self.reason else {}
        return {"name": self.name, "seconds": self.seconds, "state": self.state, **reason, **self.result.facts}


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    *,
    on_end: Callable[[list[Outcome]], None],
    before: Callable[[str], None] = lambda name: None,
    on_failure: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Do what is not done yet, in order; the outcome of every stage.

    A stage that raises has failed: the others go on, except those that need it. `on_end(outcomes of all stages)` is
    called whenever one ends, and writes the report; `before(name)` at every beginning, `on_failure()` where one fails.
    KeyboardInterrupt ends the job and leaves its stage as not run. ValueError where what a stage made is gone.
    """
    outcomes = [read_outcome(out, stage.name) for stage in stages]
    by_name = {outcome.name: outcome for outcome in outcomes}
    _check_made(stages, by_name)
    for number, stage in enumerate(stages):
        outcome = by_name[stage.name]
        if outcome.state == "done" and not _asked_again(stage, stages, by_name):
            console.say(f"[{number + 1}] {stage.name}: done before")
            continue
        missing = [name for name in stage.needs if by_name[name].state != "done"]
        if missing:
            outcome.state, outcome.reason = "not run", f"it needs {missing[0]}"
            on_end(outcomes)
            continue
        console.say(f"[{number + 1}] {stage.name}")
        before(stage.name)
        started = time.monotonic()
        try:
            result, state, reason = stage.work(), "done", ""
        except Exception as error:
            result, state, reason = Result(), "failed", _reason(error)
            _tell(error, out, stage.name, reason)
            on_failure()
        outcome.state, outcome.reason, outcome.result = state, reason, result
        outcome.seconds = round(time.monotonic() - started, 1)
        outcome.peak_memory_gib = peak_memory_gib()
        outcome.made = _digest(stage) if state == "done" else ""
        write_outcome(out, outcome)
        on_end(outcomes)
    return outcomes


def _asked_again(stage: Stage, stages: Sequence[Stage], by_name: Mapping[str, Outcome]) -> bool:
    """True of a finished stage whose folder is gone while a stage that needs it is not done."""
    gone = stage.hands_on is not None and not stage.hands_on.exists()
    return gone and any(stage.name in other.needs and by_name[other.name].state != "done" for other in stages)


def _check_made(stages: Sequence[Stage], by_name: Mapping[str, Outcome]) -> None:
    """ValueError for a finished stage whose result is gone or another one: what came after it was made from that
    one."""
    for stage in stages:
        if by_name[stage.name].state == "done" and stage.makes is not None and not stage.makes.exists():
            raise ValueError(
                f"{stage.makes} is gone, which the finished stage '{stage.name}' made and the report is about: put it "
                "back, or choose another --out"
            )
        made = by_name[stage.name].made
        if by_name[stage.name].state == "done" and made and made != _digest(stage):
            raise ValueError(
                f"{stage.makes} is not what the finished stage '{stage.name}' made and the report is about: put that "
                "back, or choose another --out"
            )


def _digest(stage: Stage) -> str:
    """Tells the checkpoint that a stage makes from others; "" where it makes none."""
    there = stage.makes is not None and (stage.makes / CONFIG).is_file()
    return weights_digest(stage.makes) if there else ""


def read_outcome(out: Path, name: str) -> Outcome:
    """The outcome of a stage stored in OUT; state "not run" without one."""
    path = _path(out, name, "json")
    if not path.exists():
        return Outcome(name)
    stored = load_json(path)
    films = stored.pop("films")
    result = Result(stored.pop("facts"), stored.pop("parts"))
    if films:
        with np.load(_path(out, name, "npz")) as frames:
            result.films = [{**film, "frames": frames[str(k)]} for k, film in enumerate(films)]
    return Outcome(**stored, result=result)


def write_outcome(out: Path, outcome: Outcome) -> None:
    """Store the outcome of a stage, its films first: the stage counts as done once its JSON file exists."""
    result = outcome.result
    if result.films:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{str(k): film["frames"] for k, film in enumerate(result.films)})
        write_atomic(_path(out, outcome.name, "npz"), buffer.getvalue())
    films = [{key: value for key, value in film.items() if key != "frames"} for film in result.films]
    stored = {
        "name": outcome.name, "state": outcome.state, "seconds": outcome.seconds, "reason": outcome.reason,
        "peak_memory_gib": outcome.peak_memory_gib, "made": outcome.made,
        "facts": result.facts, "parts": result.parts, "films": films,
    }  # fmt: skip
    save_json(_path(out, outcome.name, "json"), stored)


def merged_parts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The parts of the report that there are; tables that several stages contribute to ("controls") are joined."""
    report: dict[str, Any] = {}
    for outcome in outcomes:
        for name, part in outcome.result.parts.items():
            both = isinstance(part, Mapping) and isinstance(report.get(name), Mapping)
            report[name] = {**report[name], **part} if both else part
    return report


def _path(out: Path, name: str, kind: str) -> Path:
    return out / "stages" / f"{name.replace(' ', '-')}.{kind}"


def _reason(error: Exception) -> str:
    """In one line; the kind of an error of ours, which was not meant for users, is part of it."""
    line = console.one_line(error)
    return line if isinstance(error, console.USER_ERRORS) else f"{type(error).__name__}: {line}"


def _tell(error: Exception, out: Path, name: str, reason: str) -> None:
    console.say(f"{name} failed: {reason}")
    words = "".join(traceback.format_exception(error))
    if os.environ.get("BASCULE_TRACEBACK") == "1" or not isinstance(error, console.USER_ERRORS):
        print(words, file=sys.stderr, end="")
    write_atomic(_path(out, name, "error.txt"), words.encode())
