"""The control loop when robot, clock or policy do what they should not: it holds, says why, and goes on when it can."""

from pathlib import PosixPath

import numpy as np
import pytest

from policies.control.config import check_chunk
from policies.control.controller import ControlConfig, control
from policies.control.guards import GuardConfig
from tests.policies.control.toy_robot import HZ, SPEC, STEADY, Clock, Says, Slide, drive


def test_a_view_that_stood_still_is_asked_about_anew():
    """2.5 s: the robot held, nothing was asked, and it stopped although camera and policy were well again."""

    def stand_still(robot):
        robot.seen_s = robot.clock() if robot.looks == 50 else None if robot.looks > 175 else robot.seen_s

    robot, report = drive(STEADY, on_tick=stand_still, seconds=6.0, n_action_steps=4)
    assert report.ended == "time" and 98 <= report.guards["stale_observation"] <= 101
    assert report.guards.get("stale_action", 0) <= 1
    moved = np.array(robot.sent)[:, 1]
    assert (moved[-100:] == np.float32(0.01)).all() and (moved[80:170] == 0).all()


def test_an_old_view_is_not_asked_about():
    robot = Slide()
    policy = Says(STEADY)
    drive(policy, on_tick=lambda robot: setattr(robot, "seen_s", robot.clock() - 1), seconds=1.0)
    assert policy.asked == 1, "only the warm-up's"
    assert robot.sent == []


@pytest.mark.parametrize("width", [2, 7, 32])
def test_a_policy_for_another_robot_is_refused_before_anything_moves(width):
    robot = Slide(clock := Clock())
    settings = ControlConfig(duration_s=1.0, asynchronous=False)
    message = rf"have {width} components, this robot takes 3 \(x, dy, gripper\): serve a policy for this robot"
    with pytest.raises(ValueError, match=message) as caught:
        control(robot, Says(np.zeros((8, width))), settings, clock=clock, sleep=clock.sleep)
    assert "\n" not in str(caught.value) and robot.sent == [] and not robot.connected


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (np.zeros((8, 32)), "have 32 components, this robot takes 3"),
        (np.zeros((0, 3)), r"must answer a chunk of actions \(C, 3\), it answers \(0, 3\)"),
        (np.zeros((8, 3, 1)), r"it answers \(8, 3, 1\)"),
    ],
)
def test_a_policy_that_becomes_another_one_stops_the_robot(chunk, words):
    robot, report = drive(Says(lambda n: STEADY if n < 4 else chunk))
    assert report.ended == "stopped" and report.guards["policy_error"] == 1
    assert words.replace("\\", "") in report.reasons["policy_error"]


@pytest.mark.parametrize("chunk", [None, [["a", "b", "c"]], [[True, False, True]]])
def test_answers_that_are_no_numbers(chunk):
    with pytest.raises(ValueError, match="must answer numbers, it answers"):
        check_chunk(chunk, SPEC)


def test_chunks_of_changing_length_are_played():
    robot, report = drive(Says(lambda n: STEADY[: 1 + n % 8]), seconds=2.0)
    assert report.ended == "time" and report.guards == {} and len(robot.sent) == 100


def test_a_clock_that_jumps():
    """Forward, as after a suspended machine; and back, after which the loop slept for as long as it had jumped."""
    slept = []
    for jump in (60.0, -60.0):
        clock = Clock()

        def on_tick(robot, clock=clock, jump=jump):
            if robot.looks == 20:
                clock.now += jump

        def sleep(seconds, clock=clock):
            slept.append(seconds)
            clock.sleep(seconds)

        robot = Slide(clock, on_tick)
        limits = GuardConfig(velocity={"x": 1.0})
        settings = ControlConfig(duration_s=2.0, asynchronous=False, guards=limits)
        report = control(robot, Says(STEADY), settings, clock=clock, sleep=sleep)
        assert report.ended == "time" and len(robot.sent) >= 18
        assert robot.speeds()[:, 0].max() <= 1.0 / HZ + 1e-6
    assert max(slept) <= 1 / HZ + 1e-9 and min(slept) >= 0


@pytest.mark.parametrize("seen_s", [np.inf, 1e9, None, "now"])
def test_a_time_that_is_none_is_no_fresh_view(seen_s):
    def on_tick(robot):
        robot.seen_s = seen_s if 20 < robot.looks < 30 else robot.clock()

    clock = Clock()
    robot = Slide(clock, on_tick)
    observe = robot.observe
    robot.observe = lambda: (observe()[0], robot.seen_s)
    report = control(
        robot, Says(STEADY), ControlConfig(duration_s=1.0, asynchronous=False), clock=clock, sleep=clock.sleep
    )
    assert report.ended == "time" and report.guards == {"robot_error": 9} and report.reasons["robot_error"]


def test_an_estop_file_that_cannot_be_looked_for_is_an_estop():
    class Hidden(PosixPath):
        def exists(self, *, follow_symlinks=True):
            raise PermissionError("no way in")

    robot, report = drive(STEADY, estop_file=Hidden("stop"))
    assert report.ended == "disconnect" and report.guards == {"estop": 1} and robot.sent == []


def test_a_mistake_of_the_loop_itself_is_reported_and_the_robot_let_go(monkeypatch):
    from policies.control.playback import Plan

    monkeypatch.setattr(Plan, "wanted", lambda self: 1 / 0)
    robot, report = drive(STEADY)
    assert report.ended == "disconnect" and "ZeroDivisionError" in report.reasons["controller"] and robot.sent == []


def test_a_policy_that_cannot_be_reset_is_an_error_of_the_policy():
    class Broken(Says):
        def reset(self, env_ids=None):
            raise RuntimeError("no memory to clear")

    robot, report = drive(Broken(lambda n: RuntimeError("nor to think")))
    assert report.ended == "stopped" and "nor to think" in report.reasons["policy_error"]


def test_a_robot_slower_than_the_loop_is_not_driven_faster_for_it():
    clock = Clock()
    robot = Slide(clock, lambda robot: clock.sleep(0.1))
    settings = ControlConfig(duration_s=3.0, asynchronous=False, guards=GuardConfig(velocity={"x": 0.5}))
    report = control(robot, Says(STEADY), settings, clock=clock, sleep=clock.sleep)
    assert report.ended == "time" and report.overruns == report.ticks and robot.speeds()[:, 0].max() <= 0.5 / HZ + 1e-6


def test_a_robot_that_asks_for_input_where_nobody_can_answer_is_told_what_to_do():
    """LeRobot's robots ask for a key when they are not calibrated; under systemd nobody presses one."""

    class Asks(Slide):
        def connect(self):
            raise EOFError("EOF when reading a line")

    clock = Clock()
    report = control(Asks(clock), Says(STEADY), ControlConfig(asynchronous=False), clock=clock, sleep=clock.sleep)
    assert report.ended == "disconnect" and report.guards == {"robot_lost": 1}
    assert (
        "in a terminal once (a LeRobot robot that is not calibrated: lerobot-calibrate)" in report.reasons["robot_lost"]
    )
