"""A policy beside a recording: the exact error of each component and phase, chunk after chunk as executed."""

import json

import numpy as np
import pytest

from bascule.main import main
from policies.open_loop import open_loop, spread
from policies.serving.server import PolicyServer, serve_in_thread
from tests.vla.checking.recordings import NAMES, Arm
from vla.checking.check import check_dataset
from vla.core.types import ActionSpec, PolicySpec

WRONG = 0.2
"""Radians that the policy below adds to joint 2 in the last third of an episode."""


class Knows:
    """Finds the moment by the state and answers with the recorded actions from there on, joint 2 aside."""

    def __init__(self, arm, names=NAMES, order=None):
        self.arm, self.asked = arm, []
        self.order = list(range(len(NAMES))) if order is None else order
        low, high = (-9.0,) * len(names), (9.0,) * len(names)
        self.spec = PolicySpec(ActionSpec(names, low, high, 20.0), 6, 4, cameras=("wrist",))

    def reset(self, env_ids=None):
        pass

    def act(self, obs, *, prefix=None):
        assert list(obs.images) == ["wrist"]
        out = []
        for state, image in zip(obs.proprio, obs.images["wrist"], strict=True):
            far = [np.abs(part - state).max(1) for part in self.arm.state]
            episode = int(np.argmin([part.min() for part in far]))
            at = int(far[episode].argmin())
            np.testing.assert_array_equal(image, self.arm.pictures[episode]["observation.images.wrist"][at])
            self.asked.append((episode, at))
            action = self.arm.action[episode].copy()
            action[np.arange(len(action)) * 3 // len(action) == 2, 1] += WRONG
            out.append(action[np.minimum(np.arange(at, at + 6), len(action) - 1)])
        return np.array(out, np.float32)[:, :, self.order]


def test_the_error_of_each_component_and_phase(tmp_path):
    arm = Arm(episodes=4)
    report = check_dataset(arm.write(tmp_path, dtype=np.float64), pictures=0)
    policy = Knows(arm)
    assert spread(report, 2) == [0, 3]
    found = open_loop(policy, "knows", report, [0, 3], say=print)
    wanted = np.zeros((3, 7))
    wanted[2, 1] = WRONG / report.scales["action"].span[1]
    np.testing.assert_allclose(found.error, wanted, atol=1e-6)
    assert {episode for episode, _ in policy.asked} == {0, 3} and all(at % 4 == 0 for _, at in policy.asked)
    assert found.predicted[3].shape == (len(arm.state[3]), 7)
    told = found.finding()
    assert told.code == "policy_error" and "most in 'joint_2'" in told.text and "at the end of episodes" in told.text


def test_a_policy_no_better_than_the_mean_action_is_a_warning(tmp_path):
    arm = Arm(episodes=3)
    report = check_dataset(arm.write(tmp_path, dtype=np.float64), pictures=0)
    for part in arm.action:
        part += 2
    told = open_loop(Knows(arm), "lost", report, [1], say=print).finding()
    assert told.code == "policy_lost" and told.severity == "warning"


def test_components_are_matched_by_name_and_others_refused(tmp_path):
    arm, heard = Arm(episodes=3), []
    report = check_dataset(arm.write(tmp_path, dtype=np.float64), pictures=0)
    turned = open_loop(Knows(arm, NAMES[::-1], list(range(6, -1, -1))), "turned", report, [2], say=heard.append)
    assert turned.error[0].max() < 1e-6 and heard
    with pytest.raises(ValueError, match="the policy acts on 2 components .* the recording on 7"):
        open_loop(Knows(arm, NAMES[:2]), "other", report, [2], say=print)


def test_a_policy_on_a_server_is_compared_like_one_at_hand(tmp_path, capsys):
    arm = Arm(episodes=3)
    folder = arm.write(tmp_path / "recording", dtype=np.float64)
    near = open_loop(Knows(arm), "knows", check_dataset(folder, pictures=0), [0, 2], say=print)
    page, told = tmp_path / "page.html", tmp_path / "told.json"
    with serve_in_thread(PolicyServer(Knows(arm), port=0)) as server:
        address = f"ws://127.0.0.1:{server.port}"
        asked = ["--server", address, "--compared", "2", "--page", str(page), "--json", str(told)]
        assert main(["check", str(folder), *asked]) == 0
    found = json.loads(told.read_text())["open_loop"]
    assert found["policy"] == address and found["episodes"] == [0, 2]
    assert found["error"] == pytest.approx(near.error.mean(), abs=1e-6)
    assert address in page.read_text()
    capsys.readouterr()
    assert main(["check", str(folder), "--server", address]) == 2, "it has ended"
    error = capsys.readouterr().err
    assert address in error and error.count("\n") == 1
