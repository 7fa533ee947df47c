"""A robot is held while its policy does not see what the instruction names, and goes on when it does."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

from policies.control.config import ControlConfig
from policies.control.controller import control
from policies.control.flight_log import BlackBox, read, replay
from policies.control.guards import GuardConfig
from policies.control.policy_process import PolicyProcess
from policies.serving.client import PolicyClient
from policies.serving.server import PolicyServer, serve_in_thread
from tests.policies.control.toy_robot import HZ, SPEC, STEADY, Clock, Says, Slide, drive
from vla.core.types import Observation, PolicySpec

sys.path.insert(0, str(Path(__file__).parent))  # the other process imports this file too, and finds no `tests` there
from toy_processes import Sure  # noqa: E402

TELLS = PolicySpec(SPEC, 8, 4, ("front",), 2, grounding_threshold=0.5)


class Sees(Says):
    """A policy that answers like `Says`, with the grounding confidence `sure(n)`, 0 to 1, in its n-th answer."""

    def __init__(self, sure, chunk=STEADY, spec=TELLS):
        super().__init__(chunk, spec)
        self.sure = sure

    def act(self, obs):
        chunk = super().act(obs)
        self.confidence = np.array([self.sure(self.asked)], np.float32)
        return chunk


def holds(robot):
    """Ticks in which the robot was sent that it stays as it is."""
    actions = np.array(robot.sent)
    return (actions == [0.0, 0.0, 1.0]).all(1)


def test_it_holds_until_it_first_sees_and_then_goes_on():
    # Question 1 is the warm-up; from the fifth on the object is in sight, and in the gripper from the seventh on.
    robot, report = drive(Sees(lambda n: {5: 0.9, 6: 0.8}.get(n, 0.1)), hold_below=0.5, n_action_steps=4, seconds=6.0)
    held = holds(robot)
    assert held[:12].all() and not held[12:].any(), "three questions of four ticks each"
    assert report.guards == {"not_grounded": 12} and report.ended == "time" and report.error is None and report.good
    assert report.reasons["not_grounded"] == "nothing in sight is what 'go' names: confidence 0.100, threshold 0.500"
    assert "not_grounded: nothing in sight" in report.summary({})
    np.testing.assert_array_equal(robot.sent[12], np.array(STEADY[0], np.float32))


def test_a_hold_for_it_lasts_as_long_as_the_run_and_is_no_failure(tmp_path):
    with BlackBox(tmp_path / "run.jsonl") as log:
        robot, report = drive(Sees(lambda n: 0.2), log=log, hold_below=0.5, seconds=10.0)
    assert report.ended == "time" and report.guards == {"not_grounded": 500} and holds(robot).all()
    assert report.held_by == ("not_grounded",) and report.good
    lines = read(tmp_path / "run.jsonl")[1]
    assert [line["not_grounded"] for line in lines if "not_grounded" in line] == [report.reasons["not_grounded"]]
    assert all(line["inputs"]["ungrounded"] for line in lines if "inputs" in line)
    pairs = replay(tmp_path / "run.jsonl")
    assert len(pairs) == 500 and all(logged == again for logged, again in pairs)


def test_another_instruction_is_looked_for_anew():
    told = ["the cup"]

    class Told(Slide):
        def observe(self):
            obs, seen_s = super().observe()
            told[0] = "the cup" if self.looks < 30 else "the bowl"
            return Observation(obs.images, obs.proprio, list(told)), seen_s

    clock = Clock()
    robot = Told(clock)
    fresh = [0.2, 0.02, 1.0]
    policy = Sees(lambda n: 0.9 if told[0] == "the cup" or n > 12 else 0.1)
    policy.chunk = lambda n: STEADY if told[0] == "the cup" else [fresh] * 8
    config = ControlConfig(duration_s=1.0, asynchronous=False, hold_below=0.5, n_action_steps=4)
    report = control(robot, policy, config, clock=clock, sleep=clock.sleep)
    moved = np.array(robot.sent)[:, 1] != 0
    assert moved[:28].all() and not moved[33:40].any() and moved[-1]
    begins = 33 + int(np.flatnonzero(moved[33:])[0])
    np.testing.assert_array_equal(robot.sent[begins], np.array(fresh, np.float32), "nothing of the old plan is left")
    assert "'the bowl'" in report.reasons["not_grounded"]


def test_nothing_changes_for_who_does_not_ask_for_it():
    robot, report = drive(Sees(lambda n: 0.0), n_action_steps=4)
    plain, _ = drive(STEADY, n_action_steps=4)
    np.testing.assert_array_equal(robot.sent, plain.sent)
    assert report.guards == {}
    with pytest.raises(
        ValueError, match="does not tell how surely it sees what its instruction names: leave out --hold"
    ):
        drive(STEADY, hold_below=0.5)


def test_a_dead_server_still_ends_a_run_that_is_held():
    def sure(n):
        if n > 5:
            raise ConnectionError("gone")
        return 0.1

    _, report = drive(Sees(sure), hold_below=0.5, n_action_steps=4, seconds=10.0, guards=GuardConfig(give_up_s=1.0))
    assert report.ended == "stopped" and report.guards["dead_server"] >= HZ and report.guards["not_grounded"] >= 12


@pytest.mark.parametrize("sure", [0.25, 0.75])
def test_the_confidence_reaches_the_robot_from_another_process_and_over_a_server(sure):
    obs, _ = Slide().observe()
    policy = PolicyProcess(functools.partial(Sure, sure))
    try:
        policy.act(obs)
        assert policy.confidence.tolist() == [sure] and policy.spec.grounding_threshold == 0.5
    finally:
        policy.close()
    with serve_in_thread(PolicyServer(Sees(lambda n: sure), port=0)) as server, PolicyClient(server.uri) as client:
        assert client.spec.grounding_threshold == 0.5 and client.metadata["grounding"] == {"threshold": 0.5}
        answer = client.infer({"images": {"front": obs.images["front"][0]}, "state": obs.proprio[0], "prompt": "go"})
        assert answer["grounding"] == {"confidence": sure, "threshold": 0.5, "below": sure < 0.5}
        robot, report = drive(client, hold_below=0.5)
        assert client.confidence.tolist() == [sure] and holds(robot).all() == (sure < 0.5)
    with serve_in_thread(PolicyServer(Says(STEADY, TELLS), port=0)) as server, PolicyClient(server.uri) as client:
        client.act(obs)
        assert client.confidence is None, "declared, but not told"
