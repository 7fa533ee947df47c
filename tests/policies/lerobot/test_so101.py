"""A robot of LeRobot's that misbehaves in every way LeRobot's do, at 50 Hz: a hold, a stop, a reason, and a report."""

from types import SimpleNamespace

import numpy as np
import pytest
from lerobot.utils.errors import DeviceNotConnectedError

from policies.control.flight_log import BlackBox, replay
from policies.control.guards import GuardConfig
from tests.policies.lerobot.so101 import HZ, LIMITS, NAMES, drive, so101
from vla.core.types import ActionSpec, PolicySpec

STEADY = [[1.0, 2.0, 3.0, 4.0, 5.0, 80.0]] * 8
QUICK = GuardConfig(give_up_s=0.4, stop_s=0.1)


def test_it_plays_and_is_let_go(monkeypatch):
    arm = so101(monkeypatch)
    report, sent = drive(arm, STEADY)
    assert report.ended == "time" and report.guards == {} and report.reasons == {} and len(sent) == 50
    assert sent[-1].tolist() == STEADY[0] and arm.bus.torque is False and not arm.cameras["front"].is_connected


def test_observations_in_another_order_are_the_same(monkeypatch):
    seen = []

    class Looks:
        spec = PolicySpec()

        def reset(self, env_ids=None): ...

        def act(self, obs):
            seen.append(obs.proprio[0].tolist())
            return np.array([STEADY], np.float32)

    arm = so101(monkeypatch)
    arm.bus.at = {"shoulder_pan": 1.0, "shoulder_lift": 2.0, "elbow_flex": 3.0, "wrist_flex": 4.0, "wrist_roll": 5.0,
                  "gripper": 60.0}  # fmt: skip
    arm.bus.trouble = lambda bus, seen: dict(reversed(seen.items()))
    drive(arm, Looks())
    assert seen[0] == [1, 2, 3, 4, 5, 60]


def test_it_comes_back_from_outside_its_limits_no_faster_than_it_may(monkeypatch):
    """wrist_roll at 60 degrees, trained constant -12.5, `--velocity wrist_roll.pos 30`."""
    arm = so101(monkeypatch)
    arm.bus.at["wrist_roll"] = 60.0
    steady = [[0.0, 0.0, 0.0, 0.0, -12.5, 80.0]] * 8
    guards = GuardConfig(velocity={"wrist_roll.pos": 30.0})
    report, sent = drive(arm, steady, seconds=3.0, guards=guards, limits={**LIMITS, "wrist_roll.pos": (-12.5, -12.5)})
    at = np.array([60.0, *sent[:, 4]])
    assert np.abs(np.diff(at)).max() <= 30 / HZ + 1e-5 and at[-1] == -12.5
    assert report.guards["outside_limits"] == 121 and report.ended == "time"
    assert "wrist_roll.pos is at 60, its limits are -12.5 to -12.5" in report.reasons["outside_limits"]


def raising(error):
    def trouble(*_):
        raise error

    return trouble


def joint(value=None):
    def trouble(bus, seen):
        if value is None:
            return {name: at for name, at in seen.items() if name != "elbow_flex"}
        return {**seen, "elbow_flex": value}

    return trouble


ARM = {
    "RuntimeError": (raising(RuntimeError("bus is confused")), "bus is confused"),
    "ValueError": (raising(ValueError("no such motor")), "no such motor"),
    "ConnectionError": (raising(ConnectionError("Failed to sync read: no status packet")), "no status packet"),
    "empty": (raising(RuntimeError()), "RuntimeError"),
    "missing": (joint(), "'elbow_flex.pos' is missing from the robot's observation"),
    "nan": (joint(float("nan")), "'elbow_flex.pos' is measured as nan"),
    "text": (joint("up"), "'elbow_flex.pos' must be a number, the robot gives str"),
}
CAMERA = {
    "RuntimeError": (raising(RuntimeError("read thread is not running")), "read thread is not running"),
    "TimeoutError": (raising(TimeoutError("latest frame is too old")), "latest frame is too old"),
    "None": (lambda reads: None, "camera 'front' is missing"),
    "resized": (lambda reads: np.zeros((8, 6, 3), np.uint8), "shows 6x8 pixels of 3 channels, it was 6x4 pixels of 3"),
    "depth": (lambda reads: np.zeros((4, 6, 1), np.uint16), "camera 'front' gives 16-bit pictures"),
    "float": (lambda reads: np.full((4, 6, 3), 300.0), "floats must be in 0..1"),
    "lists": (lambda reads: "picture", "camera 'front'"),
}


@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("where, case", [("arm", case) for case in ARM] + [("camera", case) for case in CAMERA])
def test_trouble_is_held_through_and_stopped_for_when_it_lasts(monkeypatch, where, case, lasts):
    arm = so101(monkeypatch)
    trouble, reason = ARM[case] if where == "arm" else CAMERA[case]
    good = np.full((4, 6, 3), 7, np.uint8)
    if where == "arm":
        arm.bus.trouble = lambda bus, seen: trouble(bus, seen) if 20 < bus.reads < (1000 if lasts else 30) else seen
    else:
        arm.cameras["front"].shows = lambda reads: trouble(reads) if 20 < reads < (1000 if lasts else 30) else good
    report, sent = drive(arm, STEADY, seconds=2.0, guards=QUICK)
    assert reason in report.reasons["robot_error"] and reason in report.error and "\n" not in report.error
    assert report.ended == ("stopped" if lasts else "time")
    assert report.guards.keys() == {"robot_error"} and report.guards["robot_error"] in ((21, 22) if lasts else (9,))
    assert (sent == STEADY[0]).all(), "it was held where it was"
    assert arm.bus.torque is False


@pytest.mark.parametrize("case", ARM)
def test_a_robot_that_never_says_where_it_is_is_not_moved(monkeypatch, tmp_path, case):
    arm = so101(monkeypatch)
    arm.bus.trouble, reason = ARM[case]
    with BlackBox(tmp_path / "log.jsonl") as box:
        report, sent = drive(arm, STEADY, guards=QUICK, log=box)
    assert report.ended == "stopped" and report.guards == {"robot_error": 1} and len(sent) == 0 == report.ticks
    assert reason in report.reasons["robot_error"] and replay(tmp_path / "log.jsonl") == []


def test_a_robot_that_is_slow_to_begin_is_waited_for(monkeypatch):
    arm = so101(monkeypatch)
    arm.cameras["front"].shows = lambda reads: np.zeros((4, 6, 3), np.uint8) if reads > 10 else None
    report, sent = drive(arm, STEADY)
    assert report.ended == "time" and report.guards == {} and len(sent) == 50


def test_a_camera_that_stood_still_is_asked_about_anew(monkeypatch):
    """2.5 s of a camera that raises, as LeRobot's do for an old frame: the plan has grown old meanwhile."""
    arm, good = so101(monkeypatch), np.full((4, 6, 3), 7, np.uint8)

    def shows(reads):
        if 50 < reads < 175:
            raise TimeoutError("the latest frame is 0.6 s old")
        return good

    arm.cameras["front"].shows = shows
    report, sent = drive(arm, STEADY, seconds=6.0)
    assert report.ended == "time" and report.guards["robot_error"] == 124 and report.ticks == 300
    assert report.guards.get("stale_action", 0) <= 1


def test_a_camera_that_is_gone_takes_the_robot_with_it_and_the_motors_are_let_go(monkeypatch):
    """LeRobot's SO-101 refuses everything, disconnecting too, as soon as one camera is not connected."""
    arm = so101(monkeypatch)

    def unplug(reads):
        if reads > 20:
            arm.cameras["front"].is_connected = False
            raise DeviceNotConnectedError("front is not connected")
        return np.zeros((4, 6, 3), np.uint8)

    arm.cameras["front"].shows = unplug
    report, sent = drive(arm, STEADY)
    assert report.ended == "disconnect" and report.guards == {"robot_lost": 1} and arm.bus.torque is False
    assert "front is not connected" in report.reasons["robot_lost"]


def test_torque_stays_on_where_that_was_asked_for(monkeypatch):
    arm = so101(monkeypatch, disable_torque_on_disconnect="false")

    def unplug(reads):
        arm.cameras["front"].is_connected = reads < 20
        return np.zeros((4, 6, 3), np.uint8)

    arm.cameras["front"].shows = unplug
    report, _ = drive(arm, STEADY)
    assert report.ended == "disconnect" and arm.bus.torque is True


def test_commands_that_fail(monkeypatch):
    arm = so101(monkeypatch)
    write, count = arm.bus.sync_write, []

    def fails(what, goal):
        count.append(1)
        if 20 < len(count) < 30:
            raise ConnectionError("no answer to a write")
        write(what, goal)

    arm.bus.sync_write = fails
    ramp = [[float(k), 0.0, 0.0, 0.0, 0.0, 80.0] for k in range(200)]
    report, sent = drive(arm, ramp, n_action_steps=200, guards=GuardConfig(velocity={"shoulder_pan.pos": 60.0}))
    assert report.ended == "time" and report.guards["robot_error"] == 9
    assert "no answer to a write" in report.reasons["robot_error"]
    assert np.abs(np.diff(sent[:, 0], prepend=0.0)).max() <= 60 / HZ + 1e-5, "and nothing is made up for in a jump"


def test_connecting_and_letting_go_that_fail_are_reported(monkeypatch):
    arm = so101(monkeypatch)
    arm.cameras["front"].connect = raising(RuntimeError("failed to set fps=30"))
    report, sent = drive(arm, STEADY)
    assert report.ended == "disconnect" and report.guards == {"robot_lost": 1} and len(sent) == 0
    assert "failed to set fps=30" in report.error and arm.bus.torque is False
    arm = so101(monkeypatch)
    arm.cameras["front"].disconnect = raising(RuntimeError("the camera hangs"))
    report, _ = drive(arm, STEADY)
    assert report.ended == "time" and "could not be let go" in report.reasons["disconnect"]
    assert "the camera hangs" in report.error


@pytest.mark.parametrize("open_at", [60.0, 0.0])
def test_a_gripper_of_0_to_100_is_held_as_it_is_before_the_first_answer(monkeypatch, open_at):
    arm = so101(monkeypatch)
    arm.bus.at["gripper"] = open_at
    report, sent = drive(arm, lambda asked: ConnectionError("not there yet"), guards=QUICK)
    assert len(sent) > 20 and (sent[:, 5] == open_at).all() and report.ended == "stopped"


def test_a_robot_with_limits_of_its_own_does_not_run_after_its_hold(monkeypatch):
    """max_relative_target cuts what is sent; a hold that follows must not go on to where it would have been."""
    arm = so101(monkeypatch, max_relative_target="2.0")
    answers = [[[80.0, 0, 0, 0, 0, 60.0]] * 12]
    report, sent = drive(
        arm, lambda n: np.array(answers[0]) if n < 3 else ConnectionError("gone"), guards=QUICK, n_action_steps=4
    )
    pan = sent[:, 0]
    assert pan[0] == 2 and np.diff(pan).max() <= 2 + 1e-6
    held = pan[-10:]
    assert np.ptp(held) == 0 and report.guards["dead_server"] > 5


def moves(arm, motion):
    """The servos go where `motion(motor, at, goal)` says at every command."""
    bus = arm.bus

    def write(what, goal):
        bus.written.append(dict(goal))
        bus.at.update({motor: motion(motor, bus.at[motor], to) for motor, to in goal.items()})

    bus.sync_write = write


def test_a_robot_without_torque_is_noticed(monkeypatch, tmp_path):
    """It accepts every command and never moves, or sinks."""
    for sinks in (0.0, 0.05):
        arm = so101(monkeypatch)
        moves(arm, lambda motor, at, to, sinks=sinks: at - sinks)
        path = tmp_path / f"{sinks}.jsonl"
        with BlackBox(path) as box:
            report, sent = drive(arm, [[40.0, 0, 0, 0, 0, 80.0]] * 8, seconds=6.0, guards=QUICK, log=box)
        assert report.ended == "stopped" and report.guards.keys() == {"not_following"} and report.seconds < 2
        assert "shoulder_pan.pos is commanded to 40 and stays at" in report.reasons["not_following"]
        assert "is torque on" in report.error and (sent[:, 0] == 40).all(), "it is held, and not sent elsewhere"
        assert all(logged == again for logged, again in replay(path))


def test_chunks_that_always_begin_where_it_stands_tell_that_it_has_no_torque(monkeypatch):
    arm = so101(monkeypatch)
    moves(arm, lambda motor, at, to: at)
    teeth = [[2.0 * k, 0, 0, 0, 0, 50.0] for k in range(20)]
    report, _ = drive(arm, teeth, seconds=10.0, guards=QUICK, n_action_steps=20)
    assert report.ended == "stopped" and "shoulder_pan.pos" in report.reasons["not_following"]


def test_a_robot_that_gets_its_torque_while_it_is_held_goes_on(monkeypatch):
    arm = so101(monkeypatch)
    moves(arm, lambda motor, at, to: at if len(arm.bus.written) < 70 else at + (to - at) / 10)
    report, _ = drive(arm, [[40.0, 0, 0, 0, 0, 80.0]] * 8, seconds=3.0)
    assert report.ended == "time" and 10 < report.guards["not_following"] < 30


@pytest.mark.parametrize(
    "motion",
    [
        lambda motor, at, to: at + (to - at) / 25,  # lags by half a second
        lambda motor, at, to: at + np.clip(to - at, -0.04, 0.04),  # 2 degrees a second
        lambda motor, at, to: to if motor != "gripper" else at,  # a gripper around something
        lambda motor, at, to: at + (to - at) / 10 if abs(to - at) > 15 else at,  # a lasting error under its load
    ],
    ids=["lag", "slow", "gripper", "load"],
)
def test_a_robot_that_lags_or_holds_something_follows(monkeypatch, motion):
    arm = so101(monkeypatch)
    moves(arm, motion)

    def waves(n):
        k = np.arange(50 * n, 50 * n + 50)[:, None] / HZ
        return np.hstack([np.sin(k * [1.0, 2.0, 0.5, 3.0, 0.2]) * [40, 80, 60, 30, 90], 50 + 50 * np.cos(k)])

    limits = {**LIMITS, "wrist_flex.pos": (0.0, 0.0)}
    report, _ = drive(arm, waves, seconds=12.0, switches=(), limits=limits, n_action_steps=50)
    assert report.ended == "time" and "not_following" not in report.guards


def test_an_echo_in_other_units_is_not_believed(monkeypatch):
    arm = so101(monkeypatch)
    send = arm.send_action
    arm.send_action = lambda action: {name: np.deg2rad(value) for name, value in send(action).items()}
    steady = [[60.0, 0.0, 0.0, 0.0, 0.0, 80.0]] * 8
    report, sent = drive(arm, steady, guards=GuardConfig(velocity={"shoulder_pan.pos": 100.0}))
    assert (np.diff(sent[:, 0], prepend=0.0) >= 0).all() and sent[-1, 0] == 60 and report.ended == "time"
    assert "'shoulder_pan.pos'" in report.reasons["echo"] and "another unit" in report.reasons["echo"]


def test_a_limit_of_the_robots_own_that_shuts_out_where_it_stands_is_told(monkeypatch):
    """It goes to -20 where 3 is sent. Nothing shows yet that its echo has our unit, so the log keeps the 3."""
    arm = so101(monkeypatch)
    send = arm.send_action
    arm.send_action = lambda action: send(action | {"elbow_flex.pos": min(action["elbow_flex.pos"], -20.0)})
    report, sent = drive(arm, STEADY)
    assert sent[0, 2] == -20 and report.reasons["echo"].startswith(
        f"the robot says that it took -20 for 'elbow_flex.pos', where {STEADY[0][2]:g} was sent"
    )
    assert "echo" not in drive(so101(monkeypatch), STEADY)[0].reasons
    cutting = drive(so101(monkeypatch, max_relative_target="2.0"), [[80.0, 0, 0, 0, 0, 60.0]] * 8)[0]
    assert "echo" not in cutting.reasons, "a command that it cuts short on its way is believed and logged"
    for less, told in ((0.05, False), (2.0, True)):  # of a range of 180 and more
        near = so101(monkeypatch)
        near.send_action = lambda action, go=near.send_action, less=less: go(
            action | {"elbow_flex.pos": action["elbow_flex.pos"] - less}
        )
        assert ("for 'elbow_flex.pos'" in drive(near, STEADY)[0].reasons.get("echo", "")) == told


def test_an_estop_on_the_way_back(monkeypatch, tmp_path):
    arm, file = so101(monkeypatch), tmp_path / "stop"
    arm.bus.at["wrist_roll"] = 150.0
    arm.bus.trouble = lambda bus, seen: bus.reads == 30 and file.touch()
    report, sent = drive(arm, STEADY, estop_file=file)
    assert report.ended == "disconnect" and report.guards["estop"] == 1 and 90 < sent[-1, 4] < 150
    assert len(sent) < 30


def test_names_that_are_none_of_its_own(monkeypatch):
    arm = so101(monkeypatch)
    for more, message in (
        ({"switches": ("gripper",)}, "no component 'gripper' to switch"),
        ({"limits": {**LIMITS, NAMES[0]: (5.0, -5.0)}}, "'shoulder_pan.pos' must be lowest and highest"),
        ({"limits": {}}, "'shoulder_pan.pos' has no limits"),
    ):
        with pytest.raises(ValueError, match=message):
            drive(arm, STEADY, **more)


def test_a_policy_of_another_order_sees_and_moves_the_joints_of_its_names(monkeypatch, capsys):
    from bascule.commands.robots import robot_of

    arm = so101(monkeypatch)
    arm.bus.at = {name.removesuffix(".pos"): float(i) for i, name in enumerate(NAMES)}
    names, state = tuple(reversed(NAMES)), (*NAMES[3:], *NAMES[:3])
    low, high = zip(*(LIMITS[name] for name in names), strict=True)
    spec = PolicySpec(ActionSpec(names, low, high, HZ), proprio_dim=6, proprio_names=state, cameras=("front",))
    flags = SimpleNamespace(limits=(), switches=(), hz=HZ)
    robot = robot_of(flags, SimpleNamespace(spec=spec), arm, instruction="go")
    assert capsys.readouterr().err.count("reordered by name") == 2
    assert robot.action_spec.names == names and robot.action_spec.low == low
    robot.connect()
    assert robot.observe()[0].proprio[0].tolist() == [3, 4, 5, 0, 1, 2]
    robot.send(np.array([50.0, 4.0, 3.0, 2.0, 1.0, 0.5], np.float32))
    assert arm.bus.written[-1] == {name.removesuffix(".pos"): value for name, value in
                                   zip(names, [50.0, 4.0, 3.0, 2.0, 1.0, 0.5], strict=True)}  # fmt: skip
    robot.disconnect()
