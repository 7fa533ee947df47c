"""Talking at the command line: questions are made, learnt from, asked and answered, and refused in one line."""

import json
import re

import numpy as np
import pytest

from bascule.main import main
from vla.backbones.hub import load
from vla.core.types import ActionSpec
from vla.model.config import BridgeConfig, TalkerConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.processor import Stats

SPEC = ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, 20.0)


def saved(folder, *, talks):
    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(50, 8)), rng.uniform(-1, 1, (50, 4)))
    config = VLAConfig(bridge=BridgeConfig(width=32), talk=TalkerConfig(rank=2) if talks else None)
    parts = {"action_spec": SPEC, "cameras": ("front", "wrist"), "backbone": load("tiny")}
    VLA.build(config, stats=stats, **parts).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy that was taught to talk, in two steps, by the commands."""
    root = tmp_path_factory.mktemp("talk")
    demos, questions, policy = (str(root / name) for name in ("demos", "questions", "policy"))
    words = ["--workers", "1", "--image-size", "32"]
    assert main(["talk-data", "tabletop-pick", "--episodes", "2", "--out", questions, *words]) == 0
    assert main(["demos", "tabletop-pick", "--episodes", "1", "--out", demos, "--workers", "1"]) == 0
    recipe = ["--recipe", "smoke", "--steps", "2"]
    assert main(["train", "--dataset", demos, *recipe, "--out", policy, "--talk", questions]) == 0
    return policy


def test_a_policy_taught_by_the_commands_answers(trained, capsys):
    assert VLAPolicy.load(trained).spec.talks
    asked = ["what are you doing?", "where is the bowl?", "Xyzzy plugh 42!"]
    assert main(["ask", trained, *asked, "--seed", "5000001", "--decisions", "1"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("instruction: ")
    assert len(lines) == 3 and all(
        re.fullmatch(rf"{re.escape(question)} .*\(\d\.\d\d\)", line)
        for question, line in zip(asked, lines, strict=True)
    )


def test_control_logs_what_the_policy_says_it_does(trained, tmp_path, capsys):
    log = tmp_path / "run.jsonl"
    patient = ("--max-observation-age-s", "--max-action-age-s", "--server-timeout-s", "--give-up-s")
    words = ["--duration-s", "2", "--no-estop-key", "--no-asynchronous", "--log", str(log)]
    words += [word for flag in patient for word in (flag, "1000")]  # however busy this machine is
    assert main(["control", trained, "--account-s", "0.05", *words]) == 0
    told = [line["account"] for line in map(json.loads, log.read_text().splitlines()) if "account" in line]
    assert told and all(isinstance(one["text"], str) and 0 <= one["confidence"] <= 1 for one in told)
    capsys.readouterr()
    assert main(["control", str(log), "--replay"]) == 0  # and the log is one as before


@pytest.mark.parametrize(
    "words", [["ask", "{}", "what are you doing?"], ["control", "{}", "--account-s", "1", "--duration-s", "1"]]
)
def test_who_cannot_talk_is_refused_in_a_line(words, tmp_path, capsys):
    policy = saved(tmp_path / "policy", talks=False)
    assert main([word.format(policy) for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert "this policy cannot talk" in error and len(error.splitlines()) == 1


def test_a_question_is_needed_and_says_something(tmp_path, capsys):
    policy = saved(tmp_path / "policy", talks=True)
    for words, problem in (([], "say what to ask"), ([""], "must say something"), (["?!"], "must say something")):
        assert main(["ask", policy, *words]) == 2
        assert problem in capsys.readouterr().err


def test_data_that_is_none_is_refused_before_anything_is_trained(tmp_path, capsys, trained):
    words = ["--recipe", "smoke", "--out", str(tmp_path / "out"), "--talk", str(tmp_path)]
    demos = trained.replace("policy", "demos")
    assert main(["train", "--dataset", demos, *words]) == 2
    assert "`vla talk-data` makes one" in capsys.readouterr().err and not (tmp_path / "out" / "config.json").exists()
    assert main(["talk-data", "tabletop-spatial", "--out", str(tmp_path / "set")]) == 2
    assert "look alike" in capsys.readouterr().err
