"""How fast a robot may be moved: no limit of position and no reaction commands more than the limit of speed allows."""

from fractions import Fraction

import numpy as np
import pytest

from policies.control.config import ControlConfig
from policies.control.controller import control
from policies.control.flight_log import BlackBox, read, replay
from policies.control.guards import Decision, Governor, GuardConfig, Inputs
from policies.control.playback import Plan
from policies.control.robots import LeRobotRobot
from tests.policies.control.toy_robot import HZ, STEADY, Clock, Says, Slide, drive
from vla.core.types import ActionSpec


def arm(names=("a.pos", "b.pos"), low=(-50.0, -12.5), high=(50.0, -12.5), hz=60.0):
    return ActionSpec(names, low, high, hz)


def say(wanted, t, **more):
    return Inputs(now_s=t, wanted=wanted, proprio=(), observation_age_s=0.0, **more)


def test_a_hold_does_not_pull_a_robot_into_its_limits():
    """wrist_roll at 60 degrees, in the demonstrations always at -12.5: the first tick jumped by 72.5 degrees."""
    governor = Governor(GuardConfig(velocity={"b.pos": 30.0}), arm(), ("position",) * 2, rest=(0.0, 60.0))
    for tick in range(20):
        decision = governor.decide(say(None, tick / 60))
        assert decision == Decision((0.0, 60.0), "hold", ("stale_action",)), "where it was measured"
    back = [governor.decide(say((0.0, -12.5), 1 + tick / 60)) for tick in range(160)]
    at = np.array([60.0, *(decision.action[1] for decision in back)])
    assert (np.abs(np.diff(at)) <= 30.0 / 60 + 1e-5).all() and at[-1] == -12.5
    recovering = [decision for decision in back if decision.reaction == "recover"]
    assert len(recovering) == 145 and all(decision.guards == ("outside_limits",) for decision in recovering)
    assert back[-1].reaction == "run" and "outside_limits" not in back[-1].guards


def test_without_a_velocity_limit_the_way_back_takes_as_long_as_a_range():
    """The component that stood still in the demonstrations has no range: it moves as the narrowest other one does."""
    governor = Governor(GuardConfig(), arm(), ("position",) * 2, rest=(90.0, 60.0))
    at = np.array([governor.decide(say((0.0, -12.5), tick / 60)).action for tick in range(300)])
    steps = np.abs(np.diff(at, axis=0, prepend=[[90.0, 60.0]]))
    recovering = at[:, 1] > -12.5
    assert steps[recovering].max() == pytest.approx(100 / 5 / 60, rel=1e-3) and at[-1].tolist() == [0.0, -12.5]


def test_a_robot_of_which_no_speed_is_known_holds_and_stops():
    spec = arm(("a.pos",), (-12.5,), (-12.5,))
    governor = Governor(GuardConfig(give_up_s=0.5), spec, ("position",), rest=(60.0,))
    assert governor.outside().endswith("nothing says how fast it may go back: give --velocity a.pos SPEED")
    decisions = [governor.decide(say((-12.5,), tick / 60)) for tick in range(90)]
    assert {decision.action for decision in decisions} == {(60.0,)} and decisions[-1].reaction == "stopped"
    assert decisions[0].guards == ("outside_limits",)


def test_a_stop_and_an_estop_on_the_way_back():
    def governor():
        return Governor(GuardConfig(velocity={"b.pos": 30.0}), arm(), ("position",) * 2, rest=(0.0, 60.0))

    stopped = governor()
    moving = [stopped.decide(say((0.0, -12.5), tick / 60)) for tick in range(10)]
    rest = [stopped.decide(say((0.0, -12.5), 0.2 + t / 60, fault="policy_error" if not t else None)) for t in range(40)]
    at = np.array([decision.action[1] for decision in (*moving, *rest)])
    speeds = np.abs(np.diff(at))
    assert (np.diff(speeds[9:]) <= 1e-5).all() and speeds[-1] == 0 and at[-1] > -12.5
    pressed = governor()
    pressed.decide(say((0.0, -12.5), 0.0))
    assert pressed.decide(say((0.0, -12.5), 0.02, fault="estop")) == Decision(None, "disconnect", ("estop",))


KINDS = ("position", "position", "displacement", "velocity", "switch")
NAMES = ("p", "q", "d", "v.vel", "s")


@pytest.mark.parametrize("seed", range(40))
def test_nothing_ever_moves_faster_than_its_limit(seed):
    """Random limits, states, commands and faults; sent and refused, taken and cut short by the robot."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(-2, 1, 5)
    high = low + rng.choice([0.0, 0.1, 3.0], 5)
    speed = rng.uniform(0.05, 20, 5)
    config = GuardConfig(
        velocity=dict(zip(NAMES, speed.tolist(), strict=True)),
        acceleration={name: float(rng.uniform(0.5, 500)) for name in NAMES if rng.random() < 0.5},
        give_up_s=float(rng.uniform(0.5, 3)),
        stop_s=float(rng.uniform(0.05, 1)),
    )
    rest = np.where(rng.random(5) < 0.5, rng.uniform(-4, 4, 5), (low + high) / 2)
    rest[2:4], rest[4] = 0.0, rng.choice([np.nan, 60.0])
    governor = Governor(config, ActionSpec(NAMES, tuple(low), tuple(high), HZ), KINDS, rest=tuple(rest.tolist()))
    last, before, sent, reactions = rest[:2], rest[:2], None, set()
    for tick in range(400):
        fault = "policy_error" if tick == 380 else "estop" if tick == 399 and seed % 2 else None
        wanted = None if rng.random() < 0.1 else tuple(rng.normal(0, 3, 5).tolist())
        trouble, age = rng.random() < 0.05, float(rng.choice([0.0, 0.0, 0.0, 9.0]))
        decision = governor.decide(Inputs(tick / HZ, wanted, (), age, fault=fault, robot_error=trouble, sent=sent))
        reactions.add(decision.reaction)
        sent = None
        if decision.action is None:
            continue
        action = np.array(decision.action)
        assert np.isfinite(action).all()
        assert (np.abs(action[:2] - last) <= speed[:2] / HZ * (1 + 1e-6) + 1e-6).all(), (tick, decision)
        assert abs(action[2]) <= speed[2] / HZ * (1 + 1e-6) and abs(action[3]) <= speed[3] * (1 + 1e-6)
        inside = (action[:2] >= np.minimum(low[:2], last) - 1e-6) & (action[:2] <= np.maximum(high[:2], last) + 1e-6)
        assert inside.all(), "never further outside than it was"
        before, last = last, action[:2]
        if rng.random() < 0.1:  # it did not arrive, or the robot went a part of the way
            last = before + (last - before) * rng.choice([0.0, 0.5])
            sent = (*last.tolist(), *action[2:].tolist())
    assert "hold" in reactions and reactions & {"run", "recover"}


def test_a_state_that_is_not_known_is_not_commanded():
    """A switch of which the robot says nothing: a hold before the first answer closed a gripper that counts to 100."""
    spec = ActionSpec(("a.pos", "gripper.pos"), (-1.0, 0.0), (1.0, 100.0), HZ)
    governor = Governor(GuardConfig(), spec, ("position", "switch"), rest=(0.25, np.nan))
    assert governor.decide(say(None, 0.0)) == Decision(None, "hold", ("stale_action",))
    assert governor.decide(say((0.25, 60.0), 0.02)).action == (0.25, 60.0)
    assert governor.decide(say(None, 0.04)).action == (0.25, 60.0), "and from then on its state is known"
    measured = Governor(GuardConfig(), spec, ("position", "switch"), rest=(0.25, 60.0))
    assert measured.decide(say(None, 0.0)).action == (0.25, 60.0)


def test_the_loop_reports_where_a_robot_began_and_the_log_replays(tmp_path):
    robot = Slide()
    robot.position[:] = (3.0, 0.0)
    with BlackBox(tmp_path / "log.jsonl") as box:
        from tests.policies.control.toy_robot import Clock

        robot.clock = clock = Clock()
        from policies.control.controller import ControlConfig, control
        from tests.policies.control.toy_robot import Says

        limits = GuardConfig(velocity={"x": 1.0})
        settings = ControlConfig(duration_s=4.0, asynchronous=False, guards=limits)
        report = control(robot, Says(STEADY), settings, log=box, clock=clock, sleep=clock.sleep)
    assert report.guards["outside_limits"] == pytest.approx(100, abs=2) and report.ended == "time"
    assert report.reasons["outside_limits"] == "when the run began, x is at 3, its limits are -1 to 1"
    at = np.array([3.0, *(action[0] for action in robot.sent)])
    assert np.abs(np.diff(at)).max() <= 1.0 / HZ + 1e-6 and at[-1] == np.float32(0.1)
    pairs = replay(tmp_path / "log.jsonl")
    assert len(pairs) == 200 and all(logged == again for logged, again in pairs)


def test_limits_that_are_none_are_refused():
    for limits in (GuardConfig(velocity={"x": 0.0}), GuardConfig(acceleration={"x": float("nan")})):
        with pytest.raises(ValueError, match="limit of x must be positive"):
            drive(STEADY, guards=limits)


def test_a_velocity_is_played_whole_at_any_rate_and_held_at_nothing():
    """LeKiwi's x.vel: a policy of 20 Hz says 0.2 m/s, and at 50 Hz it is 0.2 m/s in every tick."""
    spec = ActionSpec(("x.vel",), (-1.0,), (1.0,), HZ)
    plan = Plan(("velocity",), ticks_per_step=Fraction(5, 2), rest=(0.0,))
    plan.install(np.full((4, 1), 0.2), asked_at_step=0, seen_s=0.0)
    governor = Governor(GuardConfig(velocity={"x.vel": 0.15}), spec, ("velocity",), rest=(0.0,))
    for tick in range(8):
        assert plan.wanted() == (np.float32(0.2),)
        decision = governor.decide(say(plan.wanted(), tick / HZ))
        assert decision.action == (np.float32(0.15),) and decision.guards == ("velocity_limit",)
        plan.advance()
    assert governor.decide(say(None, 1.0)).action == (0.0,)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.vel", "velocity"), ("theta.vel", "velocity"), ("linear_velocity", "velocity"),
        ("mobile_base.vx", "velocity"), ("mobile_base.vtheta", "velocity"), ("elbow.pos", "position"),
        ("kLeftElbow.q", "position"),
    ],
)  # fmt: skip
def test_lerobots_names_say_what_a_component_is(name, kind):
    class Arm:
        action_features, observation_features = {name: float}, {name: float}

    assert LeRobotRobot(Arm(), instruction="go", control_hz=HZ, limits={name: (-1, 1)}).kinds == (kind,)


class Base:
    """A LeRobot robot with a position, a speed and a switch. `faster`: than this it does not go."""

    action_features = observation_features = dict.fromkeys(("a.pos", "b.vel", "g.pos"), float)

    def __init__(self, fastest=1.0, connects=True, lets_go=True):
        self.fastest, self.connects, self.lets_go = fastest, connects, lets_go
        self.is_connected, self.asked_to_let_go, self.at = False, 0, dict.fromkeys(self.action_features, 0.0)

    def connect(self):
        self.is_connected = self.connects

    def get_observation(self):
        return dict(self.at)

    def send_action(self, action):
        self.at |= {name: action[name] for name in ("a.pos", "g.pos")}
        return action | {"b.vel": min(action["b.vel"], self.fastest), "g.pos": float(action["g.pos"] > 0.5)}

    def disconnect(self):
        self.asked_to_let_go += 1
        self.is_connected = not self.lets_go


def drive_base(base, chunk, log=None):
    clock = Clock()
    limits = {"a.pos": (-1, 1), "b.vel": (-1, 1), "g.pos": (0, 1)}
    robot = LeRobotRobot(base, instruction="go", control_hz=HZ, limits=limits, switches=("g.pos",), clock=clock)
    settings = ControlConfig(duration_s=1.0, asynchronous=False)
    return control(robot, Says(chunk), settings, log=log, clock=clock, sleep=clock.sleep)


def test_a_speed_or_switch_that_the_robot_took_otherwise_is_what_its_log_holds(tmp_path):
    """A base that goes at 0.3 where 0.8 is commanded, and a gripper that is open or closed: a dataset of the command
    would teach motions that were not."""
    with BlackBox(tmp_path / "log.jsonl") as box:
        report = drive_base(Base(0.3), [[0.1, 0.2, 0.7]] * 4 + [[0.1, 0.8, 0.7]] * 4, box)
    sent = [line["sent"] for line in read(tmp_path / "log.jsonl")[1] if "inputs" in line]
    assert report.ended == "time" and "echo" not in report.reasons
    assert {tuple(np.round(one[1:], 3)) for one in sent if one} == {(0.2, 1.0), (0.3, 1.0)}


def test_a_robot_that_says_otherwise_is_neither_driven_nor_held_for_let_go():
    base = Base(connects=False)
    report = drive_base(base, [[0.1, 0.2, 0.7]] * 8)
    assert report.ended == "disconnect" and base.asked_to_let_go == 1 and base.at["a.pos"] == 0
    assert "it says that it is not connected" in report.reasons["robot_lost"]
    report = drive_base(Base(lets_go=False), [[0.1, 0.2, 0.7]] * 8)
    assert not report.good and "the robot says that it is connected" in report.reasons["disconnect"]


def test_a_call_that_took_long_is_told_in_the_report():
    """Two of 50 ticks were played, and the run came to its time all the same."""
    robot, report = drive(STEADY, on_tick=lambda robot: robot.looks == 4 and robot.clock.sleep(1.0), seconds=1.0)
    assert report.reasons["stuck"] == "its observe() took 1.0 s in one call, and nothing was sent meanwhile"
