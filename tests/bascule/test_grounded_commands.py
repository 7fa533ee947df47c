"""`--hold-ungrounded` at the command line: a real policy that never sees what it is told stands still."""

import json

import numpy as np
import pytest
import torch

from bascule.main import main
from vla.backbones.hub import load
from vla.core.types import ActionSpec
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.processing.processor import Stats

SPEC = ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, 20.0)


def saved(folder, threshold):
    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(50, 8)), rng.uniform(-1, 1, (50, 4)))
    backbone = load("tiny")
    backbone.grounding_threshold = threshold
    with torch.no_grad():
        backbone.sharp.visible[-1].bias -= 100  # whatever it is told, it sees it nowhere
    config = VLAConfig(bridge=BridgeConfig(width=32), chunk_size=8)
    VLA.build(config, stats=stats, action_spec=SPEC, cameras=("front", "wrist"), backbone=backbone).save(folder)
    return str(folder)


def test_eval_counts_what_was_held(tmp_path, capsys):
    policy, out = saved(tmp_path / "policy", 0.5), tmp_path / "eval.json"
    words = ["--episodes", "2", "--workers", "1", "--no-controls", "--json", str(out)]
    assert main(["eval", policy, "--hold-ungrounded", *words]) == 0
    report = json.loads(out.read_text())
    held = report["held"]
    assert held["episodes"] == 2 and held["held_decisions"] == held["decisions"] == 2 * -(-report["horizon"] // 8)
    told = capsys.readouterr()
    assert "held, nothing named in sight" in told.out and "warning: scenes" not in told.err


def test_eval_says_that_scenes_are_not_for_evaluation(tmp_path, capsys):
    words = ["--episodes", "1", "--workers", "1", "--no-controls", "--seed0", "17"]
    assert main(["eval", saved(tmp_path / "policy", None), *words]) == 0
    assert "warning: scenes 17 to 17 are for training: a policy may have learnt from them" in capsys.readouterr().err


def test_control_holds_and_says_why(tmp_path, capsys):
    policy, out = saved(tmp_path / "policy", 0.5), tmp_path / "run.json"
    patient = ("--max-observation-age-s", "--max-action-age-s", "--server-timeout-s", "--give-up-s")
    words = ["--duration-s", "1", "--no-estop-key", "--no-asynchronous", "--json", str(out)]
    words += [word for flag in patient for word in (flag, "1000")]  # however busy this machine is
    assert main(["control", policy, "--hold-ungrounded", *words]) == 0
    report = json.loads(out.read_text())["report"]
    assert report["guards"] == {"not_grounded": report["ticks"]} and report["held_by"] == ["not_grounded"]
    assert "not_grounded: nothing in sight is what '" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["eval", "control"])
def test_a_policy_that_tells_nothing_is_refused(command, tmp_path, capsys):
    policy = saved(tmp_path / "policy", None)
    assert main([command, policy, "--hold-ungrounded"]) == 2
    error = capsys.readouterr().err
    assert "does not tell how surely it sees what its instruction names" in error
    assert len(error.strip().splitlines()) == 1
    if command == "eval":
        assert main(["eval", "zero", "--hold-ungrounded"]) == 2
        assert "--hold-ungrounded is for checkpoints; 'zero' looks at nothing" in capsys.readouterr().err
