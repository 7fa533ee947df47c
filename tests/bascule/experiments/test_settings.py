"""Settings of experiments: what a list may hold, and what an `--out` that was used before may be used for."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from bascule.experiments import arms
from bascule.main import main
from vla.core.config import load_json


def told(capsys, *args):
    """(exit code, the line on stderr)"""
    return main(["experiment", *args]), capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["ablation", "--seeds"], "--seeds: a value is missing"),
        (["memory", "--arms"], "--arms: a value is missing"),
        (["l2m", "--known-tasks"], "--known-tasks: a value is missing"),
        (["ablation", "--seeds", "0", "1", "0"], "--seeds names 0 twice, and would count it twice"),
        (["ablation", "--seeds", "2026"], "--seeds must be at most 49, got 2026"),
        (["rl", "--arms", "ppo", "ppo"], "--arms names ppo twice"),
        (["words", "--policy", "a=x", "a=x"], "--policy names a=x twice"),
        (["words", "--policy", "a=x", "a=./x"], "the policies of arm 'a' are the same"),
        (["latency", "--policy", "runs/a/best", "runs/b/best"], "two policies are called 'best'"),
        (["latency", "--policy", "a=x", "--arms", "blnd"], "did you mean 'blend'"),
        (["advantage", "--good", "2"], "advantage.good must be in (0, 1)"),
        (["advantage", "--guidance", "nan"], "guidance must be from 0 to 100"),
        (["advantage", "--steps-ahead", "0"], "steps_ahead"),
        (["advantage", "--noise", "nan"], "--noise must be from 0 to 10"),
        (["talk", "--episodes", "1"], "--episodes must be at least 2"),
        (["talk", "--suite", "robosuite-lift"], "robosuite-lift"),
        (["distil", "--steps", "10", "--align-steps", "10"], "--align-steps must be less than --steps"),
    ],
)
def test_settings_that_make_no_experiment_are_refused_before_it_begins(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text('{"checkpoint": {}}')
    code, line = told(capsys, *args)
    assert code == 2 and words in line and len(line.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_flag_with_nothing_behind_it_is_no_flag_left_out(capsys):
    assert main(["eval", "zero", "--perturb"]) == 2
    assert "--perturb: a value is missing" in capsys.readouterr().err


@dataclass
class Once:
    """One run of an experiment of one arm and seed: whether it ran, and what came out."""

    out: Path

    def __call__(self, **asked):
        ran = []
        row = {"successes": 1, "episodes": 2, "wrong_object": 0}
        result = arms.compare(
            "x", ["a"], [0], lambda arm, seed: ran.append(arm) or row, self.out, asked=asked, figures={},
            on_progress=None,
        )  # fmt: skip
        return ran, result


SUITE = (
    'description = "plates"\nscene = "counter"\ntasks = ["plate"]\nobjects_per_episode = 2\n'
    "plates_per_episode = 1\nhorizon = 5\neval_seed0 = 5_000_000\n"
)


def test_files_that_hold_something_else_than_before_are_other_settings(tmp_path):
    suite, backbone, run = tmp_path / "k.toml", tmp_path / "b", Once(tmp_path / "out")
    suite.write_text(SUITE)
    backbone.mkdir()
    (backbone / "weights").write_bytes(b"1")
    asked = {"suite": str(suite), "backbone": str(backbone)}
    ran, result = run(**asked)
    assert ran == ["a"] and "continued" not in result["arms"]["a"]
    assert run(**asked)[0] == []
    (backbone / "weights").write_bytes(b"2")
    with pytest.raises(ValueError, match=r"begun with another backbone, which .*b held before: choose another --out"):
        run(**asked)
    (backbone / "weights").write_bytes(b"1")
    suite.write_text(SUITE.replace("= 2", "= 3"))
    with pytest.raises(ValueError, match=r"begun with other scenes, which .*k.toml described before"):
        run(**asked)


def test_a_row_of_an_earlier_version_does_not_say_what_the_files_held(tmp_path):
    run = Once(tmp_path)
    (tmp_path / "k.toml").write_text(SUITE)
    run(suite=str(tmp_path / "k.toml"))
    row = load_json(tmp_path / "a-0.json")
    assert row["asked"].pop("suite_file")
    arms.save_json(tmp_path / "a-0.json", row)
    (tmp_path / "x-settings.json").unlink()
    with pytest.raises(ValueError, match="holds results of other settings"):
        run(suite=str(tmp_path / "k.toml"), steps=3)
    assert run(suite=str(tmp_path / "k.toml"))[0] == []


def test_what_an_interrupted_command_began_is_not_finished_with_other_settings(tmp_path):
    def cut(arm, seed):
        (tmp_path / "demos-0").mkdir()
        (tmp_path / "demos-0" / "episode").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arms.compare("x", ["a"], [0], cut, tmp_path, asked={"steps": 700}, figures={}, on_progress=None)
    with pytest.raises(ValueError, match=r"begun with other settings \({'steps': 700}\): choose another --out"):
        Once(tmp_path)(steps=100)
    ran, result = Once(tmp_path)(steps=700)
    assert ran == ["a"] and result["arms"]["a"]["continued"] == [0]  # its times are not those of the whole
    assert not list(tmp_path.glob("*.begun"))


def test_settings_of_which_nothing_has_come_may_be_mended(tmp_path):
    def fails(arm, seed):
        (tmp_path / "a-0").mkdir()
        raise ValueError("no such camera")

    with pytest.raises(ValueError, match="no such camera"):
        arms.compare("x", ["a"], [0], fails, tmp_path, asked={"cameras": ["side"]}, figures={}, on_progress=None)
    assert Once(tmp_path)(cameras=["front"])[0] == ["a"]


def test_nothing_is_kept_of_no_success_and_in_scenes_that_were_not_played():
    def row(successes, episodes):
        return {"successes": successes, "episodes": episodes, "success_rate": successes / max(episodes, 1)}

    assert arms.share_kept(row(3, 4), row(4, 4)) == 0.75 and arms.share_kept(row(0, 4), row(4, 4)) == 0.0
    assert arms.share_kept(row(1, 4), row(0, 4)) is None and arms.share_kept(row(0, 0), row(4, 4)) is None
