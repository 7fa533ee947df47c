"""The budget of a run: what its progress bar counts, and what is said where the clock ended it too early."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from rl.configs.run import RunnerConfig, RunResult
from vla.runtime import console

OnUpdate = Callable[[Mapping[str, float]], None]


def with_updates(config: RunnerConfig, updates: int) -> RunnerConfig:
    """The configuration with this number of updates as its budget. Its time limit grows in proportion; where its budget
    was no number of updates, there is none."""
    limit = None
    if config.max_seconds is not None and config.max_updates is not None:
        limit = config.max_seconds * max(1.0, updates / config.max_updates)
    return replace(config, max_updates=updates, max_env_steps=None, max_seconds=limit)


def by_the_clock(config: RunnerConfig, seconds: float) -> RunnerConfig:
    """The configuration with this time as its budget, however much is learnt in it. A recipe that has no time limit
    (smoke) keeps its number of updates as well."""
    if config.max_seconds is None:
        return replace(config, max_seconds=seconds)
    return replace(config, max_updates=None, max_env_steps=None, max_seconds=seconds)


def cut_short(config: RunnerConfig, result: RunResult, teacher: Mapping[str, Any] | None = None) -> str:
    """A clause that says what the time limit took from a run whose budget is work; '' if it took nothing, or if the
    clock is the budget. `teacher` is the content of teacher.json."""
    if config.max_updates is not None:
        planned, done = f"{config.max_updates} updates", f"{result.updates}"
    elif config.max_env_steps is not None:
        planned, done = f"{config.max_env_steps:,} control steps", f"{result.env_steps:,}"
    else:
        return ""
    if result.stopped_by == "seconds":
        return f"RL was cut short by the time limit of {config.max_seconds:g} s after {done} of {planned}"
    if teacher and teacher.get("cut_short"):
        return f"the training of RL's teacher was cut short by the time limit of {config.max_seconds:g} s"
    return ""


def sufficient_seconds(config: RunnerConfig, result: RunResult) -> int:
    """A time limit in whole minutes with which the run, at its pace so far, would have come to its end."""
    needed = 4.0 * (config.max_seconds or 0.0)
    if config.max_updates is not None and 0 < result.updates < config.max_updates:
        needed = 1.2 * result.seconds * config.max_updates / result.updates
    elif config.max_env_steps is not None and 0 < result.env_steps < config.max_env_steps:
        needed = 1.2 * result.seconds * config.max_env_steps / result.env_steps
    return 60 * max(1, math.ceil(needed / 60))


@contextmanager
def shown(config: RunnerConfig) -> Iterator[tuple[OnUpdate, OnUpdate]]:
    """A progress bar of a run; yields what is to be called with every update and with every update of its teacher.

    Preparation and the teacher's training, in its updates, have bars of their own. The run's counts what its budget is:
    updates, control steps or seconds.
    """
    field, total, unit = "seconds", config.max_seconds, "s"
    if config.max_updates is not None:
        field, total, unit = "update", config.max_updates, "updates"
    elif config.max_env_steps is not None:
        field, total, unit = "env_steps", config.max_env_steps, "control steps"
    with ExitStack() as stack:
        bars: dict[str, console.Update] = {}

        def bar(title: str, total: float | None, unit: str) -> console.Update:
            if title not in bars:  # one after the other: two at once would draw over each other
                stack.close()
                bars.clear()
                bars[title] = stack.enter_context(console.progress(title, total, unit=unit))
            return bars[title]

        def on_update(row: Mapping[str, float]) -> None:
            done = row[field] if total is None else min(row[field], total)
            note = f"update {row['update']}, success {row.get('success_rate', 0):.2f} while exploring"
            bar("online RL", total, unit)(done, note=note)

        def on_teacher_update(row: Mapping[str, float]) -> None:
            note = f"success {row.get('success_rate', 0):.2f} while exploring"
            bar("online RL: training its teacher", row["of"], "updates")(row["update"], note=note)

        bar("online RL: preparing", None, "")
        yield on_update, on_teacher_update
