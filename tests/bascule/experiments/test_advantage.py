"""`vla experiment advantage`: every arm through the real path, on little."""

import json

import numpy as np

from bascule.main import main
from vla.core.checkpoint import load_tensors
from vla.model.model import VLA
from vla.training.advantage.labels import LABELS

SMALL = ["--demos", "1", "--start-steps", "1", "--logs", "10", "--steps", "2", "--episodes", "2", "--num-envs", "2"]
SMALL += ["--workers", "1", "--backbone", "tiny", "--seeds", "0"]
ARMS = ["everything", "good", "bad"]
SUITE = """
description = "pick up a shape, soon"
scene = "tabletop"
tasks = ["pick"]
objects_per_episode = 3
plates_per_episode = 0
horizon = 30
eval_seed0 = 5000000
"""


def every_second(root, table, key):
    """Two steps of training teach no success: it is claimed of every second episode."""
    episode = table.column("episode_index").to_numpy()
    return np.append(np.diff(episode) != 0, True) & (episode % 2 == 0)


def test_every_arm_learns_from_the_same_logs_and_two_ask_the_third_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr("vla.data.lerobot_dataset.flags", every_second)
    monkeypatch.setattr("vla.training.advantage.value.ValueModel.learn", lambda *args, **kwargs: None)
    (tmp_path / "soon.toml").write_text(SUITE)
    out, told = tmp_path / "runs", tmp_path / "result.json"
    command = ["experiment", "advantage", "--suite", str(tmp_path / "soon.toml"), "--out", str(out), *SMALL]
    command += ["--arms", *ARMS]
    assert main([*command, "--json", str(told)]) == 0
    arms = json.loads(told.read_text())["arms"]
    assert list(arms) == ARMS
    assert all(arm["episodes"] == 2 and arm["logged"] == "5/10" for arm in arms.values())
    assert arms["good"]["auc"] == arms["bad"]["auc"] != "" and arms["everything"]["auc"] == ""
    lessons = out / "seed-0"
    folders = sorted(path.name for path in lessons.iterdir())
    assert folders == ["demos", "everything", "good", "logs", "start"]
    kept = {path.resolve() for path in lessons.glob("*/features-*")}
    assert len(kept) == 2, "demonstrations and logs are encoded once"
    assert set(load_tensors(lessons / "good" / LABELS)["label"].tolist()) == {-1.0, 1.0}
    assert VLA.load(lessons / "everything").config.advantage is None
