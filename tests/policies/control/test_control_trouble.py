"""The control loop when robot, clock or policy do what they should not: it holds, says why, and goes on when it can."""

import contextlib
import signal
import threading
from functools import partial
from pathlib import PosixPath
from types import SimpleNamespace

import numpy as np
import pytest

from bascule.commands.control import _let_go
from policies.control.config import check_chunk
from policies.control.controller import ControlConfig, control
from policies.control.flight_log import BlackBox, replay
from policies.control.guards import GuardConfig
from policies.control.watched_robot import NOT_LET_GO
from tests.policies.control.toy_robot import HZ, SPEC, STEADY, Clock, Says, Slide, drive
from vla.core.types import Observation
from vla.runtime.console import EXIT_INTERRUPTED, interrupts_noted, run_guarded, signals_interrupt


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
    told = report.reasons["rate"]
    assert told.startswith("the robot was commanded 8.3 times a second instead of 50, and moved as much slower"), told
    assert "its observe() takes 100 ms, and there are 20 ms" in told and "rate: " in report.summary({})


def test_a_run_at_its_rate_says_nothing_of_it():
    robot, report = drive(STEADY, on_tick=lambda robot: robot.looks == 20 and robot.clock.sleep(0.05))
    assert report.overruns == 1 and report.reasons == {}


def test_pictures_that_a_driver_changes_later_stay_as_they_were_seen(tmp_path):
    """A driver that fills one buffer again and again: the log, and a policy that answers late, saw other pictures."""
    buffer, state, seen = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 2), np.float32), []
    depth = np.zeros((1, 4, 4), np.float32)

    class Reuses(Slide):
        def observe(self):
            obs, seen_s = super().observe()
            buffer[:], state[:] = self.looks % 200, obs.proprio
            depth[:] = self.looks % 200
            return Observation({"front": buffer}, state, ["go"], depth={"front": depth}), seen_s

        def send(self, action_A):
            buffer[:] = depth[:] = 255  # the grabbing thread is quicker than the log and the policy
            super().send(action_A)

    class Looks(Says):
        def act(self, obs):
            seen.append(obs)
            return super().act(obs)

    clock = Clock()
    with BlackBox(tmp_path / "log.jsonl") as box:
        drive(Looks(STEADY), Reuses(clock), log=box, seconds=0.5)
    pictures = np.frombuffer((tmp_path / "log.jsonl.frames").read_bytes(), np.uint8).reshape(-1, 48)
    assert (pictures == pictures[:, :1]).all() and (np.diff(pictures[:, 0]) == 1).all() and pictures.max() < 200
    assert len({int(obs.images["front"].max()) for obs in seen}) == len(seen) and seen[-1].images["front"].max() < 200
    assert all(obs.depth["front"].max() == obs.images["front"].max() for obs in seen)


def test_a_position_that_jumps_further_than_it_can_move_is_told(caplog):
    def on_tick(robot):
        if robot.looks >= 30:
            robot.position[0] -= 1.5  # the encoder wraps

    robot, report = drive([[0.9, 0.0, -1.0]] * 8, on_tick=on_tick)
    words = "'x' was measured at 0.9 and 20 ms later at -0.6: does its encoder wrap, was it zeroed anew"
    assert report.reasons["state"].startswith(words) and sum(words in line for line in caplog.messages) == 1
    _, report = drive([[0.9, 0.0, -1.0]] * 8, on_tick=lambda robot: robot.clock.sleep(0.3 * (robot.looks == 3)))
    assert "state" not in report.reasons


def test_a_server_that_never_answers_is_told_with_what_to_do():
    class Never(Says):
        def act(self, obs):
            if (said := super().act(obs)) is not None and self.asked > 1:
                forever.wait()
            return said

    forever, clock = threading.Event(), Clock()
    settings = ControlConfig(duration_s=9.0, server_timeout_s=1.0)
    report = control(Slide(clock), Never(STEADY), settings, clock=clock, sleep=clock.sleep)
    forever.set()
    assert report.ended == "stopped" and report.guards["dead_server"] > 50
    assert report.reasons["dead_server"].startswith("no answer for 1.0 s: the policy's server is gone, stuck or slow")
    assert "--server-timeout-s" in report.reasons["dead_server"]


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


def test_an_interrupt_that_could_not_let_the_robot_go_does_not_say_that_it_did(capsys):
    class Stuck(Slide):
        def disconnect(self):
            super().disconnect()
            raise RuntimeError("no status packet")

    class Interrupted(Slide):
        def disconnect(self):
            super().disconnect()
            raise KeyboardInterrupt

    def interrupted(robot):
        raise KeyboardInterrupt

    for make, words in (
        (Slide, "the robot was let go"),
        (Stuck, "its disconnect() failed: switch its power off (RuntimeError: no status packet)"),
        (Interrupted, "its disconnect() was interrupted: switch its power off"),
    ):
        robot = make(Clock(), interrupted)
        assert run_guarded(partial(drive, STEADY, robot), kept=lambda: "the robot was let go") == EXIT_INTERRUPTED
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("vla: interrupted; ") and line.endswith(words)


def test_a_third_interrupt_does_not_make_it_let_go(capsys):
    """The second one cut disconnect() short, the third the command's own try."""
    robot = Slide()
    robot.disconnect = lambda: (_ for _ in ()).throw(KeyboardInterrupt)

    def body():
        try:
            raise KeyboardInterrupt(NOT_LET_GO)
        finally:
            _let_go(robot)

    def cut():
        try:
            body()
        finally:
            raise KeyboardInterrupt  # a fourth

    for run in (body, cut):
        assert run_guarded(run, kept=lambda: "the robot was let go") == EXIT_INTERRUPTED
        assert capsys.readouterr().err == f"vla: interrupted; {NOT_LET_GO}\n"


def test_a_driver_that_swallows_the_interrupt_is_stopped_all_the_same():
    def on_tick(robot, number):
        if robot.looks == 20:
            with contextlib.suppress(BaseException):  # a bare except in a driver
                signal.raise_signal(number)

    before = signal.getsignal(signal.SIGINT)
    for number, ignored in ((signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)):
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else before)  # as in a script's background
        try:
            with signals_interrupt(), interrupts_noted() as interrupted, pytest.raises(KeyboardInterrupt):
                clock = Clock()
                robot = Slide(clock, partial(on_tick, number=number))
                settings = ControlConfig(duration_s=1.0, asynchronous=False)
                control(robot, Says(STEADY), settings, interrupted=interrupted, clock=clock, sleep=clock.sleep)
            assert not robot.connected and len(robot.sent) < 20
        finally:
            signal.signal(signal.SIGINT, before)


def test_a_run_that_was_suspended_goes_on_and_says_so(tmp_path):
    """Even when a hold had just begun, whose 4 s were counted as those of a policy that does not answer."""
    clock = Clock()
    lost = [0]

    def sleep(seconds):
        lost[0] += 1
        clock.sleep(seconds if lost[0] != 30 else 4.2)

    policy = Says(lambda n: STEADY[:4] if n != 8 else TimeoutError("no answer"))  # holds from tick 25 on
    robot = Slide(clock)
    with BlackBox(tmp_path / "log.jsonl") as box:
        settings = ControlConfig(duration_s=6.0, asynchronous=False, n_action_steps=4)
        report = control(robot, policy, settings, log=box, clock=clock, sleep=sleep)
    assert report.ended == "time" and report.good
    assert report.reasons["suspended"].startswith("nothing ran for 4.2 s before tick 31: the process was suspended")
    assert '"suspended": "nothing ran' in (tmp_path / "log.jsonl").read_text()
    moved = np.array(robot.sent)[:, 1]
    assert (moved[-20:] == np.float32(0.01)).all() and moved.max() <= np.float32(0.01)
    assert all(logged == again for logged, again in replay(tmp_path / "log.jsonl"))


def test_a_hold_that_ends_the_run_is_told_in_words():
    silent = SimpleNamespace(busy=True, waiting_s=lambda: 0.5, fetch=lambda: None, close=lambda: None)
    clock = Clock()
    settings = ControlConfig(duration_s=6.0)
    report = control(Slide(clock), Says(STEADY), settings, asking=silent, clock=clock, sleep=clock.sleep)
    assert report.ended == "stopped" and report.error is None
    words = "the plan was played to its end, and the policy's next answer not there 0.5 s after it was asked for"
    assert report.reasons["stale_action"] == words


def test_a_rest_elsewhere_than_measured_moves_nothing():
    """It would be sent there at once, since a hold is sent first of all."""

    class Zero(Slide):
        def rest(self):
            return 0.0, 0.0, 1.0

    robot = Zero(clock := Clock(), lambda robot: robot.position.__setitem__(0, 0.6))
    report = control(
        robot, Says(STEADY), ControlConfig(duration_s=1.0, asynchronous=False), clock=clock, sleep=clock.sleep
    )
    assert report.ended == "stopped" and robot.sent == []
    assert "rest() says that 'x' stays at 0, where it is measured at 0.6" in report.reasons["robot_error"]


def test_a_run_whose_robot_shows_nothing_new_at_its_end_is_not_good():
    robot, report = drive(STEADY, on_tick=lambda r: setattr(r, "seen_s", 100.0) if r.looks > 20 else None, seconds=2.0)
    assert report.ended == "time" and report.held_by == ("stale_observation",) and not report.good


def test_a_send_that_took_no_number_is_trouble():
    """The dataset of its log would hold 0 for it."""
    robot = Slide(clock := Clock())
    robot.send = lambda action_A: (np.nan, 0.0, 1.0)
    settings = ControlConfig(duration_s=6.0, asynchronous=False)
    report = control(robot, Says(STEADY), settings, clock=clock, sleep=clock.sleep)
    assert report.ended == "stopped"
    assert report.reasons["robot_error"] == "ValueError: the robot's send() says that it took nan for 'x'"


def test_a_driver_that_answers_with_what_it_read_before_is_told():
    """Pictures and state stand still together, while displacements are sent: no guard of positions sees that."""
    _, report = drive([[0.0, 0.2, -1.0]] * 8, on_tick=lambda robot: robot.position.fill(0.0), seconds=3.0)
    assert "the state the very same numbers, while the robot was to move" in report.reasons["camera"]
    _, report = drive([[0.0, 0.0, -1.0]] * 8, seconds=3.0)
    assert "camera" not in report.reasons


def test_an_echo_from_far_off_is_told_and_never_gone_on_from():
    """In degrees, of 0.1 rad: the next command would have been 5.7."""

    class Degrees(Slide):
        def send(self, action_A):
            super().send(action_A)
            return (57.3 * float(action_A[0]), *map(float, action_A[1:]))

    robot = Degrees(clock := Clock())
    settings = ControlConfig(duration_s=1.0, asynchronous=False, guards=GuardConfig(velocity={"x": 2.0}))
    report = control(robot, Says([[0.8, 0.0, -1.0]] * 8), settings, clock=clock, sleep=clock.sleep)
    assert robot.speeds()[:, 0].max() <= 2.0 / HZ + 1e-6 and report.ended == "time"
    assert "send() says that it took" in report.reasons["echo"] and "in another unit?" in report.reasons["echo"]
