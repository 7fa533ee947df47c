"""Retention: success on every imitation task before and after refinement, so that forgetting is visible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from envs.evaluation.evaluate import Count, EvalReport, wilson95
from vla.core.types import Policy

Play = Callable[[Policy, str], EvalReport]
"""Plays a policy on a suite's retention episodes: the same seeds at every call."""
Verdict = Literal["gained", "kept", "lost"]


@dataclass(frozen=True)
class TaskChange:
    """One task of one suite."""

    suite: str
    task: str
    before: Count
    after: Count

    @property
    def verdict(self) -> Verdict:
        """lost or gained when the rate after lies outside the Wilson interval of before."""
        low, high = wilson95(self.before.successes, self.before.episodes)
        rate = self.after.successes / max(1, self.after.episodes)
        return "lost" if rate < low else "gained" if rate > high else "kept"

    def to_dict(self) -> dict[str, Any]:
        """Return counts before and after and the verdict, JSON-ready."""
        return {
            "suite": self.suite,
            "task": self.task,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "verdict": self.verdict,
        }


def compare(before: Mapping[str, EvalReport], after: Mapping[str, EvalReport]) -> list[TaskChange]:
    """Per suite and task. ValueError when the two did not play the same episodes."""
    changes = []
    for suite, old in before.items():
        new = after[suite]
        if old.seeds != new.seeds or old.episodes != new.episodes:
            raise ValueError(f"retention on {suite} compares different episodes: {old.seeds} and {new.seeds}")
        changes += [TaskChange(suite, task, old.per_task[task], new.per_task[task]) for task in sorted(old.per_task)]
    return changes


def retention(before: Policy, after: Policy, suites: Sequence[str], play: Play) -> dict[str, Any]:
    """{"tasks": [...], "lost": [names], "mean_change": of the success rates over tasks}, JSON-ready."""
    old = {suite: play(before, suite) for suite in suites}
    changes = compare(old, {suite: play(after, suite) for suite in suites})
    rate = [(c.after.successes / c.after.episodes - c.before.successes / c.before.episodes) for c in changes]
    return {
        "tasks": [change.to_dict() for change in changes],
        "lost": [f"{change.suite}/{change.task}" for change in changes if change.verdict == "lost"],
        "mean_change": sum(rate) / max(1, len(rate)),
    }
