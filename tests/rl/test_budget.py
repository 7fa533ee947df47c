"""The budget of a run: work that a slow machine does too, and what is said where the clock was in the way."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rl.budget import by_the_clock, cut_short, shown, sufficient_seconds, with_updates
from rl.configs.run import RunResult
from rl.recipes import RECIPES
from tests.rl.test_runner import start
from tests.rl.toy import config, evaluate


def ticking(step_s):
    """A clock that is `step_s` later every time it is read."""
    now = 0.0

    def monotonic():
        nonlocal now
        now += step_s
        return now

    return SimpleNamespace(monotonic=monotonic)


def test_a_slow_machine_makes_as_many_updates_as_a_fast_one(cloned, tmp_path, monkeypatch):
    runs = []
    for name, step_s in (("fast", 0.001), ("slow", 60.0)):
        monkeypatch.setattr("rl.runner.time", ticking(step_s))
        settings = config(max_updates=3, max_seconds=10_000.0)
        runner = start(cloned, tmp_path / name, settings)
        result = runner.run()
        assert (result.stopped_by, result.updates) == ("updates", 3) and cut_short(settings, result) == ""
        runs.append((result.seconds, [p.clone() for p in runner.model.parameters()]))
    assert runs[1][0] > 1000 * runs[0][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_a_run_that_the_clock_ended_says_so(cloned, tmp_path, monkeypatch):
    monkeypatch.setattr("rl.runner.time", ticking(60.0))
    settings = config(max_updates=50, max_seconds=1000.0)
    result = start(cloned, tmp_path, settings).run()
    assert result.stopped_by == "seconds" and 0 < result.updates < 50
    told = f"RL was cut short by the time limit of 1000 s after {result.updates} of 50 updates"
    assert cut_short(settings, result) == told
    assert sufficient_seconds(settings, result) * result.updates / result.seconds > 50
    # with the clock as its budget nothing was cut, however far it came
    assert cut_short(by_the_clock(settings, 1000.0), result) == ""


def ended(stopped_by, updates=6, env_steps=2_000):
    return RunResult(updates, env_steps, 100.0, 1.0, 0, (), stopped_by)


def test_what_the_clock_took_is_said_of_control_steps_and_of_the_teacher_too():
    steps = config(max_env_steps=10_000, max_seconds=100.0)
    steps = replace(steps, max_updates=None)
    assert cut_short(steps, ended("seconds")).endswith("limit of 100 s after 2,000 of 10,000 control steps")
    assert sufficient_seconds(steps, ended("seconds")) == 600
    counted = config(max_updates=16, max_seconds=960.0)
    assert "training of RL's teacher was cut short" in cut_short(counted, ended("updates", 16), {"cut_short": True})
    assert cut_short(counted, ended("updates", 16), {"successes": 3}) == ""
    assert cut_short(counted, ended("target"), None) == cut_short(counted, ended("patience")) == ""
    assert sufficient_seconds(counted, ended("seconds", 0, 0)) == 4 * 960


def test_the_last_update_is_evaluated_once(cloned, tmp_path):
    for updates, expected in ((6, [0, 4, 6]), (8, [0, 4, 8])):
        settings = config(max_updates=updates, eval_every=4, target_success=None)
        result = start(cloned, tmp_path / str(updates), settings, evaluate=evaluate).run()
        assert [update for update, _, _ in result.evaluations] == expected


def test_asked_for_updates_or_minutes():
    pick, lift, smoke = (RECIPES[name]() for name in ("tabletop-pick-guided", "robosuite-lift", "smoke"))
    more, fewer = with_updates(pick, 48), with_updates(pick, 3)
    assert (more.max_updates, more.max_seconds) == (48, 2 * pick.max_seconds)
    assert (fewer.max_updates, fewer.max_seconds) == (3, pick.max_seconds)
    assert (with_updates(lift, 3).max_updates, with_updates(lift, 3).max_seconds) == (3, None)
    timed = by_the_clock(pick, 600.0)
    assert (timed.max_updates, timed.max_env_steps, timed.max_seconds) == (None, None, 600.0)
    assert by_the_clock(RECIPES["tabletop-pick-grpo"](), 600.0).max_env_steps is None
    assert (by_the_clock(smoke, 600.0).max_updates, by_the_clock(smoke, 600.0).max_seconds) == (4, 600.0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_counts_its_work_or_says_that_it_does_not(name):
    recipe, says = RECIPES[name](), RECIPES[name].__doc__
    counted = recipe.max_updates is not None or recipe.max_env_steps is not None
    assert counted != ("Its budget is" in says), "its docstring says whether the clock is its budget"
    assert counted or recipe.max_seconds is not None


def test_the_bar_counts_the_budget_and_the_teacher_apart(monkeypatch):
    seen, open_now = [], []

    @contextmanager
    def progress(title, total=None, *, unit=""):
        assert not open_now, "two bars at once draw over each other"
        open_now.append(title)
        yield lambda done, note="": seen.append((title, done, total, unit))
        open_now.remove(title)

    monkeypatch.setattr("rl.budget.console.progress", progress)
    row = {"update": 2, "env_steps": 700, "seconds": 99.0, "success_rate": 0.5}
    for settings in (
        config(max_updates=16, max_seconds=50.0),
        replace(config(max_env_steps=9_000), max_updates=None),
        replace(config(max_seconds=50.0), max_updates=None),
    ):
        with shown(settings) as (on_update, on_teacher_update):
            on_teacher_update({"update": 1, "of": 40})
            on_update(row)
    assert seen[0::2] == [("online RL: training its teacher", 1, 40, "updates")] * 3
    assert seen[1::2] == [
        ("online RL", 2, 16, "updates"), ("online RL", 700, 9_000, "control steps"), ("online RL", 50.0, 50.0, "s"),
    ]  # fmt: skip
