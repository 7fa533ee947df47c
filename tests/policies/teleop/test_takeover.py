"""A person takes over from a policy on the toy robot and hands back: what reaches robot, log and dataset."""

import json

import numpy as np
import pytest

from policies.control.config import ControlConfig
from policies.control.controller import control
from policies.control.flight_log import BlackBox, read, replay
from policies.control.guards import GuardConfig
from policies.lerobot.recording import to_dataset
from policies.teleop.resampling import steps_of
from policies.teleop.takeover import TAKE_OVER_KEY, Fade, TakeOver
from policies.teleop.teleoperators import lerobot_teleoperator, own_teleoperator
from tests.policies.control.toy_robot import HZ, KINDS, SPEC, Clock, Says, Slide
from tests.policies.teleop.hands import Hand, Still, person
from vla.data.lerobot_dataset import load_dataset

CHUNK = [[0.1, 0.01, -1.0]] * 8


def taken_over(first, last, x=-0.5):
    """A person who drives from tick `first` to before `last`, their arm resting at `x`."""
    return lambda tick: (first <= tick < last, {"x": x, "dy": -0.02, "gripper": 1.0})


def drive(
    script, policy=None, *, seconds=3.0, guards=None, log=None, make=Hand, robot=None, on_tick=None, by=None, **config
):
    clock = Clock()
    robot = robot or Slide(clock, on_tick)
    guards = guards or GuardConfig()
    settings = ControlConfig(duration_s=seconds, asynchronous=False, guards=guards, **config)
    who = person(script, robot, guards, make, by=by)
    report = control(robot, policy or Says(CHUNK), settings, log=log, person=who, clock=clock, sleep=clock.sleep)
    assert not robot.connected and not who.commands.teleop.connected
    return robot, report, who


def labels(log):
    return [line["driver"] for line in read(log)[1] if "inputs" in line]


def test_a_person_takes_over_and_hands_back_without_a_jump(tmp_path):
    log = tmp_path / "log.jsonl"
    with BlackBox(log) as box:
        robot, report, _ = drive(taken_over(20, 220), seconds=8.0, log=box)
    who, sent = labels(log), np.array(robot.sent)
    assert report.ended == "time" and report.guards == {} and report.takeovers == 1
    assert who[:20] == ["policy"] * 20 and set(who[20:150]) == {"hand_over", "human"} and who[150:220] == ["human"] * 70
    fast = 2.0 / GuardConfig().recovery_s / HZ  # the range of x, in the time for a whole one
    steps = np.abs(np.diff(sent[:, 0]))
    assert steps.max() <= fast + 1e-6, "neither taking over nor handing back is a jump"
    np.testing.assert_allclose(sent[200, :2], [-0.5, -0.02])
    assert who[-50:] == ["policy"] * 50, "the event has been off for long enough"
    np.testing.assert_allclose(sent[-1], [0.1, 0.01, -1.0])
    assert report.drivers["human"] == who.count("human") and "a person took over 1 times" in report.summary({})
    assert all(one == again for one, again in replay(log)) and len(replay(log)) == report.ticks


def test_guards_hold_for_a_persons_commands():
    limits = GuardConfig(velocity={"x": 0.5, "dy": 0.25}, workspace={"y": (-0.3, 0.5)})
    robot, report, _ = drive(lambda tick: (True, {"x": 5.0, "dy": -9.0, "gripper": 1.0}), guards=limits, seconds=6.0)
    assert (robot.speeds() <= [0.5 / HZ + 1e-6, 0.25 / HZ + 1e-6]).all()
    assert {"action_limit", "velocity_limit", "workspace"} <= set(report.guards) and report.ended == "stopped"


def test_the_old_chunk_is_dropped_and_a_new_one_is_asked_for_when_the_person_hands_back():
    asked = []

    class Remembers(Says):
        def reset(self, env_ids=None):
            asked.append("reset")

        def act(self, obs):
            asked.append(float(obs.proprio[0, 1]))
            return super().act(obs)

    # Each answer is of chunks whose displacement tells its number.
    policy = Remembers(lambda n: [[0.1, 0.001 * n, 1.0]] * 40)
    robot, _, _ = drive(taken_over(10, 20), policy, seconds=2.0, n_action_steps=30)
    back = next(i for i in range(25, 100) if robot.sent[i][1] > 0)
    assert robot.sent[back - 1][1] == pytest.approx(-0.02) and robot.sent[back][1] == pytest.approx(0.003, abs=1e-4)
    assert asked[-3:].count("reset") >= 1, "it may have remembered what it had decided before"
    after = asked[len(asked) - asked[::-1].index("reset")]
    assert after == pytest.approx(sum(action[1] for action in robot.sent[:back]), abs=1e-5), "of what is seen then"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (OSError("cable"), "the teleoperator fails: OSError: cable"),
        ({"x": float("nan"), "dy": 0.0, "gripper": 1.0}, "the teleoperator's 'x' is nan"),
        ({"x": 0.0, "gripper": 1.0}, "the teleoperator gives no 'dy'"),
        ({"x": 0.0, "dy": "up", "gripper": 1.0}, "the teleoperator's 'dy' is no number"),
        ([0.0, 0.0, 1.0], "get_action() must return a dict"),
    ],
)
@pytest.mark.parametrize("drives", [True, False])
def test_a_teleoperator_that_fails_holds_the_robot_and_stops_it(bad, why, drives):
    good = {"x": 0.0, "dy": 0.01, "gripper": 1.0}
    robot, report, _ = drive(lambda tick: (drives, good if tick < 20 else bad), seconds=9.0)
    assert report.ended == "stopped" and report.guards["teleop_error"] > 100 and not report.good
    assert why in report.reasons["teleop_error"]
    assert all(action[1] == 0 for action in robot.sent[30:])


def test_one_bad_reading_is_survived_and_one_that_is_gone_is_named():
    script = taken_over(0, 1000, x=0.2)
    robot, report, _ = drive(lambda tick: script(tick) if tick not in (50, 51) else (True, OSError("noise")))
    assert report.ended == "time" and report.guards == {"teleop_error": 2}

    def pull(robot):
        if robot.looks == 60:
            hand.connected = False

    clock = Clock()
    robot, hand = Slide(clock, pull), Hand(script)
    settings = ControlConfig(duration_s=9.0, asynchronous=False)
    who = TakeOver(hand, robot, GuardConfig())
    report = control(robot, Says(CHUNK), settings, person=who, clock=clock, sleep=clock.sleep)
    assert report.ended == "stopped" and "not connected any more" in report.reasons["teleop_error"]


def test_a_teleoperator_that_cannot_be_connected_ends_the_run_before_it_moves():
    class Locked(Hand):
        def connect(self):
            raise PermissionError("no rights on /dev/leader")

    clock = Clock()
    robot = Slide(clock)
    who = TakeOver(Locked(taken_over(0, 1)), robot, GuardConfig())
    report = control(robot, Says(CHUNK), ControlConfig(), person=who, clock=clock, sleep=clock.sleep)
    assert report.ended == "stopped" and robot.sent == [] and report.guards == {"teleop_error": 1}
    assert "cannot be connected, PermissionError: no rights on /dev/leader" in report.reasons["teleop_error"]


def test_the_key_takes_over_and_hands_back_and_any_other_is_the_stop():
    robot = Slide()
    who = person(taken_over(0, 0), robot, GuardConfig(), Still)
    assert who.by == "key" and not who.key(b"x")
    who.connect()
    seen = []
    for tick in range(6):
        if tick in (2, 4):
            assert who.key(TAKE_OVER_KEY)
        who.look((0.0, 0.0, 1.0), tick / HZ)
        seen.append(who.drives)
    assert seen == [False, False, True, True, False, False]
    eventful = person(taken_over(0, 0), robot, GuardConfig())
    assert eventful.by == "event" and not eventful.key(TAKE_OVER_KEY), "a key that means nothing is the stop"


def test_moving_the_leader_takes_over_and_letting_it_rest_hands_back():
    where = lambda tick: 0.3 + 0.01 * min(max(tick - 10, 0), 50)  # noqa: E731 - it moves from tick 10 to 60
    noise = lambda tick: 0.005 * (-1) ** tick  # noqa: E731
    _, _, who = drive(
        lambda tick: (False, {"x": where(tick) + noise(tick), "dy": 0.0, "gripper": 1.0}),
        make=Still, by="motion", seconds=1.0,
    )  # fmt: skip
    assert who.drives
    _, report, who = drive(
        lambda tick: (False, {"x": where(tick) + noise(tick), "dy": 0.0, "gripper": 1.0}),
        make=Still, by="motion", seconds=3.0,
    )  # fmt: skip
    assert not who.drives and report.takeovers == 1


def test_a_difference_fades_evenly_and_goes_on_from_where_a_guard_held_the_robot():
    fade, last = Fade(Slide(), GuardConfig()), (0.4, 0.0, 1.0)
    fade.begin()
    path = [0.4]
    while fade.lasts:
        last = fade((0.0, 0.01, 1.0), last)
        path.append(last[0])
    np.testing.assert_allclose(path, np.linspace(0.4, 0.0, len(path)), atol=1e-9)
    assert len(path) - 1 == pytest.approx(0.4 / 2.0 * 5.0 * HZ)
    fade((0.0, 0.0, 1.0), (0.0, 0.0, 1.0))
    fade((0.5, 0.0, 1.0), (0.0, 0.0, 1.0))  # the arm goes on while a guard holds the robot
    held = fade((0.8, 0.0, 1.0), (0.0, 0.0, 1.0))
    assert held[0] == pytest.approx(2.0 / 5.0 / HZ, abs=1e-6)


class Pad(Hand):
    """LeRobot's gamepad gives this: displacements of a stick, and a gripper that is closed, left or opened."""

    action_features = {"dtype": "float32", "shape": (4,), "names": {"delta_x": 0, "delta_y": 1, "gripper": 3}}


def test_a_gamepads_sticks_are_shares_of_what_a_tick_may_move():
    robot = Slide()
    robot.action_spec = type(SPEC)(("dx", "dy.vel", "gripper.pos"), (-0.4, -0.5, -1.0), (0.2, 0.5, 1.0), HZ)
    robot.kinds = ("displacement", "displacement", "switch")
    who = TakeOver(Pad(lambda tick: (True, {"delta_x": -1.0, "delta_y": 0.5, "gripper": tick})), robot, GuardConfig())
    who.connect()
    got = []
    for tick in range(3):
        who.look((0.0, 0.0, -0.25), tick / HZ)
        got.append(who.command(None))
    assert got == [(-0.4, 0.25, -1.0), (-0.4, 0.25, -0.25), (-0.4, 0.25, 1.0)]


def test_who_drove_is_a_feature_at_the_policys_rate_as_lerobot_records_it(tmp_path):
    for run in range(2):
        with BlackBox(tmp_path / "logs" / f"{run}.jsonl") as box:
            drive(taken_over(20, 60 + 40 * run, x=0.1), seconds=2.0, log=box, policy_hz=20.0)
    data = load_dataset(to_dataset(sorted((tmp_path / "logs").glob("*.jsonl")), tmp_path / "made"))
    assert data.fps == 20 and data.episodes == [0, 1] and data.num_frames == 80
    info = json.loads((tmp_path / "made" / "meta" / "info.json").read_text())
    assert info["features"]["intervention"] == {"dtype": "bool", "shape": [1], "names": None}
    assert info["features"]["driver"]["names"] == ["policy", "human", "hand_over"]
    log = tmp_path / "logs" / "1.jsonl"
    who, ticks = labels(log), [line for line in read(log)[1] if "inputs" in line]
    mine = data.episode_index == 1
    # Step k of the policy is from tick 2.5 k to 2.5 (k + 1).
    for k, (human, action, state) in enumerate(
        zip(data.intervention[mine], data.action[mine], data.proprio[mine], strict=True)
    ):
        share = [max(0.0, min(t + 1, 2.5 * (k + 1)) - max(t, 2.5 * k)) for t in range(len(ticks))]
        within = [t for t, part in enumerate(share) if part > 0]
        assert human == all(who[t] == "human" for t in within)
        sent = np.array([tick["decision"]["action"] for tick in ticks])
        assert action[1] == pytest.approx(np.dot(share, sent[:, 1]), abs=1e-5), "displacements add up"
        np.testing.assert_allclose(action[[0, 2]], sent[within[-1], [0, 2]], atol=1e-6)
        np.testing.assert_allclose(state, ticks[within[0]]["inputs"]["proprio"], atol=1e-6)
    assert data.intervention[mine].any() and not data.intervention[mine].all()
    np.testing.assert_allclose(data.action[mine][:, 1].sum(), sent[:, 1].sum(), atol=1e-4)


def test_a_step_is_a_persons_only_if_all_of_it_was():
    drivers = ["policy"] * 5 + ["human"] * 5 + ["hand_over", "policy"]
    assert steps_of(drivers, 50.0, 20.0).driver == ("policy", "policy", "human", "human")
    assert steps_of(["policy", *["human"] * 4], 50.0, 20.0).driver == ("hand_over", "human")
    assert steps_of(drivers, 50.0, None).driver == tuple(drivers)


def test_misuse_is_one_line():
    robot = Slide()
    with pytest.raises(ValueError, match="has no event for taking over: choose --take-over key, or motion"):
        person(taken_over(0, 0), robot, GuardConfig(), Still, by="event")
    wrong = Hand()
    wrong.action_features = {"shoulder.pos": float}
    with pytest.raises(ValueError, match=r"gives no 'x', which the robot is commanded by; it gives shoulder\.pos"):
        TakeOver(wrong, robot, GuardConfig())
    with pytest.raises(ValueError, match="LeRobot teleoperator"):
        lerobot_teleoperator("so101_lead", {})
    with pytest.raises(ValueError, match="teleoperator bascule_expert has no 'port'"):
        lerobot_teleoperator("bascule_expert", {"port": "x"})
    with pytest.raises(ValueError, match="has no method connect"):
        own_teleoperator("fractions:Fraction", {})
    assert KINDS[0] == "position"


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ({"is_intervention": "no"}, "is_intervention must be True or False, it is 'no'"),
        (None, "get_teleop_events() must return a dict, it returned NoneType"),
    ],
)
def test_an_event_that_is_neither_true_nor_false_gives_nobody_the_robot(events, words):
    """A text counts as true in Python: a person would have driven, whatever it said."""

    class Odd(Hand):
        def get_teleop_events(self):
            return events

    robot, report, _ = drive(taken_over(10, 20), make=Odd, seconds=5.0)
    assert report.ended == "stopped" and words in report.reasons["teleop_error"]
    assert "human" not in report.drivers
