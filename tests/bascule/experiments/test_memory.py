"""`vla experiment memory`: every arm through the real path, on little; and the control's memory is another's."""

import json

import numpy as np

from bascule.experiments.memory import OthersMemory
from bascule.main import main
from vla.model.config import MemoryConfig

SMALL = ["--suite", "tabletop-pick", "--demos", "2", "--steps", "2", "--episodes", "2", "--num-envs", "2"]
SMALL += ["--workers", "1", "--frames", "2", "--backbone", "tiny"]
ARMS = ["bank", "uniform", "shuffled"]


def test_every_arm_is_trained_on_one_cache_and_the_control_plays_the_firsts_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bascule.experiments.memory._TURNS", 2)
    out = tmp_path / "runs"
    arguments = ["experiment", "memory", "--seeds", "0", "--out", str(out), *SMALL, "--arms", *ARMS]
    assert main([*arguments, "--json", str(tmp_path / "result.json")]) == 0
    arms = json.loads((tmp_path / "result.json").read_text())["arms"]
    assert list(arms) == ARMS
    assert all(arm["episodes"] == 2 and arm["replan_ratio"] > 0 for arm in arms.values())
    assert sum(played for _, played in arms["bank"]["per_task"].values()) == 2
    assert not (out / "shuffled-0").exists()
    assert main([*arguments[:-3], "uniform", "shuffled"]) == 2
    assert "shuffled-0.json is of the policy of arm bank" in capsys.readouterr().err
    (kept,) = (out / "bank-0").glob("features-*")
    assert next((out / "uniform-0").glob("features-*")).resolve() == kept.resolve()


def test_an_unknown_arm_or_a_control_before_its_policy_is_refused(tmp_path, capsys):
    for arms, words in ((["bnak"], "did you mean 'bank'"), (["shuffled", "bank"], "name that arm before it")):
        assert main(["experiment", "memory", "--out", str(tmp_path), "--arms", *arms]) == 2
        assert words in capsys.readouterr().err


def test_the_controls_memory_is_never_the_episodes_own():
    memory = OthersMemory(MemoryConfig(frames=2), steps=4, seed=0)
    rng, seen = np.random.default_rng(0), []
    for _ in range(60):
        read = memory.read([0, 1, 2], 1)
        seen += [(env, value) for env in range(3) for value in read[env, :, 0].tolist() if value]
        rows = np.array([[1.0], [2.0], [3.0]], np.float32)  # what environment k keeps is k + 1
        memory.add([0, 1, 2], rows, rng.normal(size=(3, 4)).astype(np.float32))
    assert len(seen) > 100 and all(value != env + 1 for env, value in seen)
    assert len({(env, value) for env, value in seen}) == 6
    assert np.isfinite([value for _, value in seen]).all()
