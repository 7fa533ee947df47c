"""A user's own robot that does something wrong: one line that names the method, and a robot that is stopped."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bascule.main import main
from policies.control.controller import ControlConfig, control
from policies.control.guards import GuardConfig, check_bounds
from policies.control.watched_robot import WatchedRobot, check_robot
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from tests.policies.control.toy_robot import Clock, Says
from vla.core.types import ActionSpec, Observation, PolicySpec

# `--robot MODULE:CLASS` finds it as a user's own module.
sys.path.insert(0, str(Path(__file__).parent))
from own_robots import NAMES, Right  # noqa: E402

STILL = np.zeros((8, 3), np.float32)
COMPONENTS = r"\(dx, dy, gripper\)"


def drive(robot, clock):
    settings = ControlConfig(duration_s=2.0, asynchronous=False, guards=GuardConfig(give_up_s=0.4, stop_s=0.1))
    return control(robot, Says(STILL), settings, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize(
    ("method", "answer", "words"),
    [
        ("instruction", "go", r"Observation.instruction is a list of B texts: write \['go'\]"),
        ("instruction", [], r"instruction must be a list of one text, .* got \[\]"),
        ("instruction", [b"go"], "instruction must be a list of one text"),
        ("rest", (0.0, 0.0), rf"rest\(\) must return 3 numbers {COMPONENTS}, it returned 2$"),
        ("rest", None, rf"rest\(\) must return 3 numbers {COMPONENTS}, it returned None"),
        ("rest", "abc", r"rest\(\) must return 3 numbers .*, it returned a str"),
        ("observe", None, r"observe\(\) must return an Observation and the time.monotonic\(\) .*, it returned None"),
        ("observe", (None, 1.0), r"observe\(\) must return an Observation first, it returned None"),
        ("send", [0.0, 0.0], rf"send\(\) must return None or 3 numbers {COMPONENTS}, it returned 2$"),
        ("send", True, r"send\(\) must return None or 3 numbers .*, it returned True"),
        ("send", ["a", "b", "c"], r"send\(\) must return None or 3 numbers .*, it returned a list"),
    ],
)
def test_what_a_method_returns_wrongly_is_named_and_stops_it(method, answer, words, caplog):
    import re

    clock = Clock()
    robot = Right(clock=clock)
    setattr(robot, method, lambda *given: answer)
    report = drive(robot, clock)
    assert report.ended == "stopped" and not robot.connected, report
    assert re.search(words, report.reasons["robot_error"]), report.reasons
    assert "\n" not in report.reasons["robot_error"] and not caplog.records, "no traceback"


def test_a_done_that_raises_stops_it():
    class Broken(Right):
        @property
        def done(self):
            raise RuntimeError("no counter")

    clock = Clock()
    report = drive(Broken(clock=clock), clock)
    assert report.ended == "stopped"
    assert report.reasons == {"robot_error": "the robot's done raises RuntimeError: no counter"}


@pytest.mark.parametrize("done", ["no", None, lambda: False, np.zeros(2)])
def test_a_done_that_is_neither_true_nor_false_stops_it(done):
    """A text or a function counts as true in Python: the run would end at its first tick and report success."""
    clock = Clock()
    robot = Right(clock=clock)
    robot.done = done
    report = drive(robot, clock)
    assert report.ended == "stopped" and not robot.connected
    assert "done must be True or False, it is " in report.reasons["robot_error"]


def test_a_done_that_is_a_method_is_told_before_the_robot_is_connected():
    class Asked(Right):
        def done(self):
            return False

    with pytest.raises(ValueError, match="robot Asked has a method done: it must be a property, or an"):
        check_robot(Asked())


@pytest.mark.parametrize("method", ["observe", "send", "rest", "disconnect"])
def test_a_call_that_does_not_return_is_told_while_it_lasts(method, caplog):
    """The loop waits for it and can say nothing: without a word the command would seem to work."""
    clock = Clock()
    robot = Right(clock=clock)
    answer, told = getattr(robot, method), []

    def stuck(*given):
        until = time.monotonic() + 20
        while robot.looks > 0 and not told and time.monotonic() < until:
            told.extend(record.getMessage() for record in caplog.records)
            time.sleep(0.02)
        return answer(*given)

    setattr(robot, method, stuck)
    report = drive(robot, clock)
    line = f"the robot's {method}() has not returned for 0.4 s: nothing is sent to it; Ctrl-C ends the run"
    assert told == [line]
    assert report.ended == "time" and not robot.connected


def test_what_send_reports_of_the_right_length_is_taken():
    clock = Clock()
    robot = Right(clock=clock)
    robot.send = lambda action_A: np.zeros(3, np.float32)
    assert drive(robot, clock).guards == {}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ((1.0,) * 3, (-1.0,) * 3, "the lowest and the highest value of 'dx', got low 1 and high -1"),
        ((-1.0, np.nan, -1.0), (1.0,) * 3, "the lowest and the highest value of 'dy', got low nan and high 1"),
        ((-1.0,) * 2, (1.0,) * 3, rf"action_spec.low needs 3 entries {COMPONENTS}, got 2"),
        ((-1.0,) * 3, (1.0,) * 4, rf"action_spec.high needs 3 entries {COMPONENTS}, got 4"),
    ],
)
def test_limits_that_are_none_are_refused_before_it_is_connected(low, high, words):
    clock = Clock()
    robot = Right(clock=clock)
    robot.action_spec = ActionSpec(NAMES, low, high, 50.0)
    robot.connect = lambda: pytest.fail("connected")
    with pytest.raises(ValueError, match=words):
        drive(robot, clock)


def test_a_component_that_cannot_move_is_one():
    check_bounds(ActionSpec(NAMES, (0.0, -1.0, -1.0), (0.0, 1.0, np.inf), 50.0))
    with pytest.raises(ValueError, match="names 'dx' twice"):
        check_bounds(ActionSpec(("dx", "dx"), (0.0, 0.0), (1.0, 1.0), 50.0))


@pytest.mark.parametrize("lacks", ["kinds", "proprio_names", "connect", "observe", "rest", "send", "disconnect"])
def test_what_a_robot_lacks_is_named(lacks):
    check_robot(Right())
    robot = Right()
    setattr(robot, lacks, None)
    with pytest.raises(ValueError, match=rf"robot Right .*{lacks}.*see `Robot` in policies/control/robots.py"):
        check_robot(robot)


@pytest.fixture(scope="module")
def server():
    spec = ActionSpec(NAMES, (-1.0,) * 3, (1.0,) * 3, 50.0)
    policy = Says(STILL, PolicySpec(spec, 8, 4, ("front",), 2, ("x", "y")))
    with serve_in_thread(PolicyServer({"toy": PolicySlot(policy)}, port=0)) as running:
        yield running.uri


@pytest.mark.parametrize(
    ("robot", "words"),
    [
        ("NoSpec", "robot NoSpec needs self.action_spec = ActionSpec(names, low, high, control_hz), it has none"),
        ("NoDriver", "cannot be made: ModuleNotFoundError: No module named 'a_driver_that_is_not_installed'"),
        ("Refuses", "cannot be made: RuntimeError: motor 3 is missing"),
        ("Nothing", "robot 'own_robots:Nothing': module own_robots has no 'Nothing'"),
        ("NAMES", "cannot be made: TypeError: 'tuple' object is not callable"),
        ("Reversed", "the lowest and the highest value of 'dx', got low 1 and high -1"),
    ],
)
def test_the_command_says_it_in_one_line(server, capsys, robot, words):
    assert main(["control", server, "--robot", f"own_robots:{robot}", "--hz", "50", "--duration-s", "0.2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line, line


def test_the_robot_that_is_right_runs_and_the_one_that_is_not_let_go_ends_in_an_error(server, capsys):
    args = ["control", server, "--hz", "50", "--duration-s", "0.2", "--max-observation-age-s", "5", "--robot"]
    assert main([*args, "own_robots:Right"]) == 0
    assert main([*args, "own_robots:DoesNotLetGo"]) == 1
    assert "disconnect() failed: switch its power off (RuntimeError: torque off failed)" in capsys.readouterr().out


def test_components_in_another_order_are_matched_by_name(server, capsys):
    args = ["control", server, "--hz", "50", "--duration-s", "0.2", "--max-observation-age-s", "5", "--robot"]
    assert main([*args, "own_robots:Swapped"]) == 0
    told = capsys.readouterr().err
    assert "the policy reads the state as x, y, the robot tells it as y, x: reordered by name" in told
    assert "acts on dx, dy, gripper, the robot on gripper, dy, dx: reordered by name" in told


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--velocity", "gripper", "1"), "--velocity gripper: it is a switch"),
        (("--follow-s", "2"), "--follow-s changes nothing with a robot that has no positions"),
    ],
)
def test_limits_that_would_change_nothing_are_refused(server, capsys, args, words):
    assert main(["control", server, "--hz", "50", "--robot", "own_robots:Right", *args]) == 2
    assert words in capsys.readouterr().err


def test_an_estop_file_of_before_is_named_and_nothing_is_connected(server, tmp_path, capsys):
    clock, file = Clock(), tmp_path / "stop"
    file.touch()
    robot = Right(clock=clock)
    robot.connect = lambda: pytest.fail("connected")
    settings = ControlConfig(duration_s=1.0, asynchronous=False, estop_file=file)
    report = control(robot, Says(STILL), settings, clock=clock, sleep=clock.sleep)
    assert report.ended == "disconnect" and report.guards == {"estop": 1} and robot.looks == 0
    assert f"the e-stop file {file} exists" in report.reasons["estop"] and "remove it" in report.reasons["estop"]
    args = ["control", server, "--robot", "own_robots:Right", "--hz", "50", "--estop-file", str(file)]
    assert main(args) == 1 and f"estop: the e-stop file {file} exists" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--velocity", "dx", "1", "dx", "2"), "--velocity gives 'dx' twice: give one of them"),
        (
            ("--velocity", "dx", "1", "--velocity", "dy", "2"),
            "--velocity is given twice: write all of its pairs behind",
        ),
        (("--acceleration", "dx", "1", "dy", "1", "dx", "1"), "--acceleration gives 'dx' twice"),
        (("--robot-args", "hz", "1", "hz", "2"), "--robot-args gives 'hz' twice"),
        (("--workspace", "x:0:1", "x:0:2"), "--workspace gives 'x' twice: give one of them"),
    ],
)
def test_a_limit_is_given_once(server, capsys, args, words):
    assert main(["control", server, "--robot", "own_robots:Right", "--hz", "50", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line, line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--task", "pick up the blue cube"), "--task is not for a robot class of your own: own_robots:Right says it"),
        (("--limits", "dx:-0.1:0.1"), "--limits is not for a robot class of your own"),
        (("--switches", "gripper"), "--switches is not for a robot class of your own"),
        (("--hz", "10"), "--hz 10: own_robots:Right runs at 50 Hz, as its action_spec says"),
    ],
)
def test_flags_that_an_own_robot_cannot_heed_are_refused(server, capsys, args, words):
    assert main(["control", server, "--robot", "own_robots:Right", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line, line


def test_a_run_that_ends_while_the_robot_fails_is_no_good_one():
    """The time is over before the guard gives up: the report says what held the robot."""
    clock = Clock()
    robot = Right(clock=clock)
    well, begun = robot.observe, clock()

    def observe():
        if clock() > begun + 1.0:
            raise RuntimeError("encoder 2 is silent")
        return well()

    robot.observe = observe
    settings = ControlConfig(duration_s=2.0, asynchronous=False, guards=GuardConfig(give_up_s=5.0))
    report = control(robot, Says(STILL), settings, clock=clock, sleep=clock.sleep)
    assert report.ended == "time" and "robot_error" in report.held_by and not report.good, report
    assert "encoder 2 is silent" in report.reasons["robot_error"]
    begun = clock()  # silent again, and the time is over in the middle of the slow stop
    settings = replace(settings, guards=GuardConfig(give_up_s=0.7, stop_s=0.5))
    report = control(robot, Says(STILL), settings, clock=clock, sleep=clock.sleep)
    assert report.ended == "stopped" and report.seconds == pytest.approx(2.0) and not report.good, report
    whole = control(Right(clock=clock), Says(STILL), settings, clock=clock, sleep=clock.sleep)
    assert whole.ended == "time" and whole.held_by == () and whole.good


class Reaches(Right):
    """Its hand moves 1 cm a tick for 3 s; `shows` makes the picture of a look."""

    def __init__(self, shows, **settings):
        super().__init__(**settings)
        self.shows = shows

    def observe(self):
        self.looks += 1
        image = self.shows(self.looks)
        state = np.array([[0.01 * self.looks, 0.0]], np.float32)
        return Observation({"front": image}, state, ["go"]), self.clock()


def watch(robot, clock, seconds=3.0):
    settings = ControlConfig(duration_s=seconds, asynchronous=False)
    return control(robot, Says(STILL), settings, clock=clock, sleep=clock.sleep)


def test_a_camera_that_stands_still_while_the_robot_moves_is_named_once(caplog):
    def frozen(look):  # one pixel of noise for a second, then the same picture from another buffer
        image = np.full((1, 40, 40, 3), 7, np.uint8)
        image[0, 33, 21, 1] = min(look, 50)
        return image

    report = watch(Reaches(frozen, clock=(clock := Clock())), clock, seconds=6.0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "camera 'front' has shown the very same picture for 2.0 s in which the robot moved" in line
    assert report.reasons == {"camera": line} and report.ended == "time" and report.good
    assert line in report.summary({})


def test_a_picture_drawn_into_one_buffer_is_not_frozen(caplog):
    buffer = np.zeros((1, 40, 40, 3), np.uint8)

    def drawn(look):
        buffer[0, 33, 21, 1] = look % 251
        return buffer

    assert watch(Reaches(drawn, clock=(clock := Clock())), clock).reasons == {} and not caplog.records


def test_a_robot_that_stands_may_see_the_same(caplog):
    assert watch(Right(clock=(clock := Clock())), clock).reasons == {} and not caplog.records


@pytest.mark.parametrize(
    ("seen_s", "guard", "words"),
    [
        (np.nan, "robot_error", r"observe\(\) must return a time.monotonic\(\) second, it returned nan"),
        (
            1.0,
            "stale_observation",
            r"answers with what was seen \d+\.\d s ago: .* time.monotonic\(\) of its pictures\?",
        ),
    ],
)
def test_a_time_that_does_not_go_on_is_named(seen_s, guard, words):
    import re

    clock = Clock()
    robot = Right(clock=clock)
    well = robot.observe
    robot.observe = lambda: (well()[0], seen_s)
    report = drive(robot, clock)
    assert report.ended == "stopped" and list(report.reasons) == [guard]
    assert re.search(words, report.reasons[guard]), report.reasons


@pytest.mark.parametrize("method", ["connect", "observe", "rest", "send", "disconnect"])
def test_a_driver_that_exits_is_let_go_and_reported(method):
    clock = Clock()
    robot = Right(clock=clock)

    def leave(*given):
        raise SystemExit(3)

    setattr(robot, method, leave)
    report = drive(robot, clock)
    assert "SystemExit: 3" in " ".join(report.reasons.values()) and not report.good
    assert method == "disconnect" or not robot.connected


def test_a_driver_that_exits_when_it_is_made(server, capsys):
    assert main(["control", server, "--robot", "own_robots:Exits", "--hz", "50", "--duration-s", "0.2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--robot own_robots:Exits cannot be made: SystemExit: no arm is plugged in" in line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--follow-fraction", "5"), "--follow-fraction must be at most 1, got 5"),
        (
            ("--estop-file", "nowhere/stop"),
            "--estop-file nowhere/stop: there is no folder nowhere, so nobody could stop",
        ),
    ],
)
def test_a_guard_that_could_never_trip_is_refused(server, capsys, args, words):
    assert main(["control", server, "--robot", "own_robots:Right", "--hz", "50", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line, line


def test_a_stop_file_without_its_folder_is_refused_before_it_is_connected(tmp_path):
    robot = Right()
    robot.connect = lambda: pytest.fail("connected")
    settings = ControlConfig(duration_s=1.0, estop_file=tmp_path / "none" / "stop")
    with pytest.raises(ValueError, match="there is no folder .*none, so nobody could stop the robot by it"):
        control(robot, Says(STILL), settings)


def test_a_robot_whose_letting_go_is_interrupted_is_not_said_to_be_let_go():
    class Slow(Right):
        def disconnect(self):
            raise KeyboardInterrupt

    told = WatchedRobot(Slow(), time.monotonic).disconnect()
    assert "could not be let go" in told and "switch its power off" in told
