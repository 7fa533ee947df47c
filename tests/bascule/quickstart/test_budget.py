"""RL's budget in the quickstart: a number of updates; the clock protects, and what it takes is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bascule import main as cli
from bascule.quickstart.config import QuickstartConfig, smoke_config, worlds_of
from bascule.quickstart.recipes import with_budgets
from bascule.quickstart.refine import refine
from bascule.quickstart.stages import Outcome
from bascule.report.page import write_report
from envs import make_vec
from envs.demos.record import record
from rl.teacher import train_teacher
from tests.e2e.test_rl_command import untrained
from vla.runtime import console


def test_the_budget_is_a_number_of_updates_and_the_limit_follows_it():
    def budget(given=None, **changes):
        made = with_budgets(QuickstartConfig(**changes), given)
        return made.rl_updates, made.rl_seconds

    assert budget() == (16, 960.0) and budget(recipe="tabletop-robust") == (18, 1920.0)
    assert budget(rl_updates=32) == (32, 1920.0) and budget(rl_updates=4) == (4, 960.0)
    assert budget(recipe="tabletop-robust", rl_updates=36) == (36, 3840.0)
    assert budget(rl_seconds=100.0) == (16, 100.0), "a limit of the user's is one"
    assert budget(rl_updates=32, rl_seconds=100.0) == (32, 100.0)
    # no number is known: the clock is the budget, unless there is another
    assert budget(suite="tabletop-ten") == (None, 240.0) and budget(suite="tabletop-ten", rl_updates=9) == (9, None)


def test_a_smoke_run_has_no_more_worlds_than_episodes():
    assert worlds_of(QuickstartConfig()) == 48 and worlds_of(smoke_config(QuickstartConfig(smoke=True))) == 8
    assert worlds_of(QuickstartConfig(smoke=True, eval_episodes=400)) == 48


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A folder with demonstrations and an imitation policy (of random weights), and environments."""
    out = tmp_path_factory.mktemp("quickstart")
    untrained(out / "imitation")
    record("tabletop-pick", 2, out / "demos", num_workers=1)
    envs = make_vec("tabletop-pick", 2, num_workers=1)
    yield out, envs
    envs.close()


def test_a_run_that_the_clock_cut_short_says_so_in_the_report_and_on_the_page(ready, tmp_path, capsys, monkeypatch):
    out, envs = ready
    play = train_teacher.successes  # in one round, not in 48 of 2 episodes each
    monkeypatch.setattr(
        train_teacher, "successes", lambda policy, env, rounds, team: play(policy, env, rounds[:1], team)
    )
    config = replace(smoke_config(QuickstartConfig(smoke=True, workers=1)), rl_updates=2, rl_seconds=1e-6)
    told = "RL was cut short by the time limit of 1e-06 s after 0 of 2 updates: this policy had less training than was"

    def report(result, name):
        stages = [Outcome("online RL", "done", 1.0, result=result).row()]
        page = write_report({"stages": stages}, tmp_path / name)
        console.stdout().print(console.stage_table(stages))
        kept = json.loads((tmp_path / name / "report.json").read_text())["stages"][0]
        return kept, page.read_text(), " ".join(capsys.readouterr().out.split())

    result = refine(config, out, envs)
    assert f"warning: {told}" in " ".join(capsys.readouterr().err.split())
    row, page, table = report(result, "cut")
    assert row["stopped_by"] == "seconds" and row["warning"].startswith(told)
    assert row["warning"].endswith("run again on a quieter machine, or with --rl-seconds 60")
    assert told in page and page.count("less training than was planned") == 1 and "RL was cut short" in table

    result = refine(replace(config, rl_seconds=1e6), out, envs)  # goes on where it was
    assert capsys.readouterr().err == ""
    row, page, table = report(result, "whole")
    assert (row["stopped_by"], row["updates"]) == ("updates", 2) and "warning" not in row
    assert "cut short" not in page + table and "warning" not in page


@pytest.mark.parametrize("flag", ["--rl-updates", "--rl-seconds"])
def test_a_number_that_is_none_is_one_line(tmp_path, capsys, flag):
    assert cli.main(["quickstart", "--out", str(tmp_path / "x"), flag, "many"]) == 2
    assert flag in capsys.readouterr().err and not (tmp_path / "x").exists()
