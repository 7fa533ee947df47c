"""`vla experiment corrections`: every arm through the real path, on little."""

import json

from bascule.experiments.corrections.experiment import ARMS, CorrectionsConfig, Lesson
from bascule.main import main
from vla.core.checkpoint import weights_digest
from vla.core.config import load_json
from vla.data.lerobot_dataset import load_dataset
from vla.training.train_config import InterventionConfig

SMALL = ["--demos", "1", "--start-steps", "1", "--corrected", "1", "--steps", "1", "--episodes", "2", "--num-envs", "2"]
SMALL += ["--workers", "1", "--backbone", "tiny", "--seeds", "0"]
SUITE = """
description = "pick up a shape, soon"
scene = "tabletop"
tasks = ["pick"]
objects_per_episode = 3
plates_per_episode = 0
horizon = 30
eval_seed0 = 5000000
"""


def test_a_round_through_the_real_path(tmp_path):
    (tmp_path / "soon.toml").write_text(SUITE)
    out, told = tmp_path / "runs", tmp_path / "result.json"
    command = ["experiment", "corrections", "--suite", str(tmp_path / "soon.toml"), "--out", str(out), *SMALL]
    assert main([*command, "--arms", "round-1", "--json", str(told)]) == 0
    (arm,) = json.loads(told.read_text())["arms"].values()
    by_hand, frames = map(int, arm["frames"].split("/"))
    assert 0 < by_hand < frames <= 30 and arm["takeovers"] >= 1
    lessons = out / "seed-0"
    recorded = load_json(lessons / "corrected-1" / "meta" / "bascule.json")
    assert recorded["policy"] == weights_digest(lessons / "start") and recorded["seeds"][0] >= 10_000
    assert load_dataset(lessons / "corrected-1").intervention.sum() == by_hand


def test_rounds_go_on_from_one_another_and_every_arm_gets_as_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("policies.load.load_policy", str)
    monkeypatch.setattr("vla.core.checkpoint.weights_digest", str)
    lesson, recorded, learnt = Lesson(CorrectionsConfig(demos=20), 2, tmp_path), {}, {}

    def record(name, episodes, first, **more):
        recorded[name] = (first, episodes, more.get("policy", ("expert",))[0])
        return name

    def go_on(arm, before, rounds, data, how):
        learnt[arm] = (before, rounds, list(data), how)
        return arm

    lesson._recorded, lesson._gone_on = record, go_on
    lesson._learnt = lambda name, *rest: name
    for arm in ARMS:
        assert lesson.policy(arm) == arm
    each = [f"corrected-{number}" for number in (1, 2, 3)]
    assert recorded == {
        "demos": (0, 20, "expert"),
        "fresh": (5_000, 60, "expert"),
        "corrected-1": (10_000, 20, "start"),
        "corrected-2": (11_000, 20, "round-1"),
        "corrected-3": (12_000, 20, "round-2"),
    }
    people = InterventionConfig()
    assert learnt == {
        "round-1": ("start", 1, each[:1], people),
        "round-2": ("round-1", 1, each[:2], people),
        "corrections": ("round-2", 1, each, people),
        "everything": ("start", 3, each, InterventionConfig(policy_frames="learn")),
        "demonstrations": ("start", 3, ["fresh"], None),
        "shuffled": ("start", 3, each, InterventionConfig(shuffle_seed=2)),
    }
    assert "--demos must be less than" in CorrectionsConfig(demos=5000).problem()


def test_a_suite_that_nobody_can_correct_is_refused(capsys):
    assert main(["experiment", "corrections", "--suite", "tabletop-ten"]) == 2
    assert "does not know the tasks of tabletop-ten" in capsys.readouterr().err
    assert main(["experiment", "corrections", "--arms", "begin"]) == 2
    assert "arm" in capsys.readouterr().err
