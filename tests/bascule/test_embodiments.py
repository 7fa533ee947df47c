"""A policy trained for several robots, at the command line: the choice is asked for, checked and kept."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bascule.commands.deploy import by_policy
from bascule.main import main
from policies.load import load_policy
from vla.core.types import ActionSpec
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.processing.processor import Processor, Stats

SPEC = ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, 20.0)
JOINTS = ("joint_0", "joint_1", "joint_2", "gripper")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """For "hand", which acts as the tabletop's worlds do, and "arm", which moves joints."""
    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(50, 8)), rng.uniform(-1, 1, (50, 4)))
    config = VLAConfig(backbone="tiny", bridge=BridgeConfig(width=32), chunk_size=4)
    vla = VLA.build(config, stats=stats, action_spec=SPEC, cameras=("front", "wrist"))
    hand = vla.processor
    vla.members = {"arm": Processor(replace(hand.config, action_names=JOINTS), stats, hand.tokenizer), "hand": hand}
    vla.processor = vla.members["arm"]
    folder = tmp_path_factory.mktemp("ckpt") / "both"
    vla.save(folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "POLICY"),
        ("serve", "POLICY", "--port", "0"),
        ("control", "POLICY"),
        ("export", "POLICY", "--out", "OUT"),
        ("rl", "smoke", "--init", "POLICY", "--out", "OUT"),
        ("rl", "reset-free", "--init", "POLICY", "--demos", "none", "--out", "OUT"),
        ("lerobot", "POLICY", "OUT"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_asks_which_robot_is_meant(command, checkpoint, tmp_path, capsys):
    words = [{"POLICY": str(checkpoint), "OUT": str(tmp_path / "out")}.get(word, word) for word in command]
    for more, said in (
        ([], "controls 2 embodiments (arm, hand): choose one with --embodiment NAME"),
        (["--embodiment", "hnad"], "has no embodiment 'hnad'; it controls: arm, hand"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_chosen_one_is_played_or_refused_by_its_names(checkpoint, tmp_path, capsys):
    out = tmp_path / "eval.json"
    words = ["eval", str(checkpoint), "--episodes", "1", "--workers", "1", "--no-controls", "--json", str(out)]
    assert main([*words, "--embodiment", "hand"]) == 0
    assert json.loads(out.read_text())["episodes"] == 1
    assert main([*words, "--embodiment", "arm"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "joint_0, joint_1, joint_2, gripper" in error and "dx, dy, dz, gripper" in error


def test_the_loaders_choose(checkpoint):
    assert load_policy(checkpoint, "hand").spec.action_spec.names == SPEC.names
    assert load_policy(checkpoint, "arm").spec.action_spec.names == JOINTS


def test_a_policy_for_one_robot_needs_no_choice_and_takes_none(checkpoint, tmp_path, capsys):
    vla = VLA.load(checkpoint, member="hand")
    vla.members = {}
    vla.save(tmp_path / "one")
    assert load_policy(tmp_path / "one").spec.action_spec.names == SPEC.names
    assert main(["serve", str(tmp_path / "one"), "--embodiment", "hand"]) == 2
    assert "leave out --embodiment hand" in capsys.readouterr().err


def test_served_policies_may_each_have_their_own():
    assert by_policy((), ["a", "b"]) == {"a": None, "b": None}
    assert by_policy(("arm",), ["a", "b"]) == {"a": "arm", "b": "arm"}
    assert by_policy(("b=hand", "arm"), ["a", "b"]) == {"a": "arm", "b": "hand"}
    with pytest.raises(ValueError, match="did you mean 'b'"):
        by_policy(("bb=hand",), ["a", "b"])
    for given, words in ((("arm", "hand"), "names arm and hand for all"), (("a=x", "a=y"), "names x and y for 'a'")):
        with pytest.raises(ValueError, match=words):
            by_policy(given, ["a", "b"])


def test_a_server_chooses_for_its_clients(checkpoint, capsys):
    assert main(["control", "ws://127.0.0.1:9", "--embodiment", "hand"]) == 2
    assert "goes to `vla serve`" in capsys.readouterr().err
