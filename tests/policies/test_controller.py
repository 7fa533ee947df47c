"""The control loop on small robots: each guard is tripped on purpose, and what reaches the robot is what is checked."""

import contextlib
import threading
import time

import numpy as np
import pytest

from policies.blackbox import BlackBox, read, replay
from policies.client import PolicyClient
from policies.controller import ControlConfig, ControlLoop, control
from policies.guards import GuardConfig
from policies.joining import Blend
from policies.plan import Answer, Inference, Plan
from policies.robots import WorldRobot
from policies.server import PolicyServer, serve_in_thread
from vla.types import ActionSpec, Observation

HZ = 50.0
SPEC = ActionSpec(("x", "dy", "gripper"), (-1.0, -0.5, -1.0), (1.0, 0.5, 1.0), HZ)
KINDS = ("position", "displacement", "switch")


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Slide:
    """Two axes and a gripper that do at once what they are told. `on_tick(robot)` runs at every observation."""

    action_spec, kinds, proprio_names = SPEC, KINDS, ("x", "y")

    def __init__(self, clock=time.monotonic, on_tick=None):
        self.clock, self.on_tick = clock, on_tick
        self.position, self.sent, self.times, self.seen_s = np.zeros(2, np.float32), [], [], None
        self.looks, self.connected, self.done = 0, False, False

    def connect(self):
        self.connected = True

    def observe(self):
        self.looks += 1
        if self.on_tick is not None:
            self.on_tick(self)
        images = {"front": np.zeros((1, 4, 4, 3), np.uint8)}
        seen_s = self.clock() if self.seen_s is None else self.seen_s
        return Observation(images, self.position[None].copy(), ["go"]), seen_s

    def rest(self):
        return (float(self.position[0]), 0.0, 1.0)

    def send(self, action_A):
        assert self.connected, "a robot that was let go was sent an action"
        self.sent.append(action_A.copy())
        self.times.append(self.clock())
        self.position = np.array([action_A[0], self.position[1] + action_A[1]], np.float32)

    def disconnect(self):
        self.connected = False

    def speeds(self):
        """Per tick, of x and y: what a person standing near would see."""
        actions = np.array(self.sent)
        return np.abs(np.stack([np.diff(actions[:, 0], prepend=0.0), actions[:, 1]], 1))


class Says:
    """A policy: `chunk` (C, A), or what it returns for the number of the question (exceptions are raised)."""

    def __init__(self, chunk):
        self.chunk, self.asked = chunk, 0

    def reset(self, env_ids=None):
        pass

    def act(self, obs):
        self.asked += 1
        chunk = self.chunk(self.asked) if callable(self.chunk) else self.chunk
        if isinstance(chunk, Exception):
            raise chunk
        return np.array(chunk, np.float32)[None]


STEADY = [[0.1, 0.01, -1.0]] * 8


def drive(policy, robot=None, log=None, *, on_tick=None, seconds=1.0, guards=None, **config):
    """One run in simulated time, the policy answering inside the loop."""
    clock = Clock()
    robot = robot or Slide(clock, on_tick)
    settings = ControlConfig(duration_s=seconds, asynchronous=False, guards=guards or GuardConfig(), **config)
    policy = policy if hasattr(policy, "act") else Says(policy)
    report = control(robot, policy, settings, log=log, clock=clock, sleep=clock.sleep)
    assert not robot.connected
    return robot, report


def test_actions_reach_the_robot_at_its_rate():
    robot, report = drive(STEADY)
    assert report.ended == "time" and report.ticks == len(robot.sent) == 50 and report.guards == {}
    np.testing.assert_array_equal(robot.sent, np.array([STEADY[0]] * 50, np.float32))
    assert report.overruns == 0 and set(report.delays) == {0}


def came_to_rest(robot, report, guard):
    """A slow stop: it was `guard`, it ended the run, and the speed only fell from there to nothing."""
    assert report.ended == "stopped" and report.guards[guard] >= 1
    assert np.isfinite(robot.sent).all()
    last = robot.speeds()[-25:]
    assert (np.diff(last[-20:], axis=0) <= 1e-6).all() and (last[-1] <= 1e-6).all() and (last[0] > 0).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_guard_nonfinite_action_slow_stop(bad):
    moving = [[0.02 * k, 0.01, 1.0] for k in range(8)]
    robot, report = drive([*moving[:6], [bad, 0.01, 1.0], moving[7]], n_action_steps=8)
    came_to_rest(robot, report, "nonfinite_action")
    damaged, report = drive(Says(lambda n: STEADY if n < 4 else FloatingPointError("weights are damaged")))
    came_to_rest(damaged, report, "nonfinite_action")


def test_guard_policy_error_slow_stop():
    robot, report = drive(Says(lambda n: STEADY if n < 4 else KeyError("camera")))
    came_to_rest(robot, report, "policy_error")


def test_guard_action_limit_clips():
    robot, report = drive([[3.0, -2.0, -7.0]] * 4)
    assert report.guards == {"action_limit": 50} and report.ended == "time"
    np.testing.assert_array_equal(robot.sent[0], np.array([1.0, -0.5, -1.0], np.float32))


def test_guard_velocity_limit_slows():
    limits = GuardConfig(velocity={"x": 0.5, "dy": 0.25})
    robot, report = drive([[0.8, 0.3, 1.0]] * 4, guards=limits)
    assert (robot.speeds() <= [0.5 / HZ + 1e-6, 0.25 / HZ + 1e-6]).all() and report.guards["velocity_limit"] == 50
    assert robot.position[0] == pytest.approx(0.5, abs=1e-3)


def test_guard_acceleration_limit_eases():
    robot, report = drive([[0.8, 0.05, 1.0]] * 4, guards=GuardConfig(acceleration={"dy": 10.0}))
    changes = np.diff(robot.speeds()[:, 1], prepend=0.0)
    assert (changes <= 10.0 / HZ**2 + 1e-7).all() and report.guards["acceleration_limit"] > 5
    assert robot.sent[-1][1] == pytest.approx(0.05)


def test_guard_workspace_slow_stop():
    robot, report = drive(STEADY, guards=GuardConfig(workspace={"y": (-0.2, 0.2)}))
    came_to_rest(robot, report, "workspace")
    assert 0.2 < robot.position[1] < 0.2 + 0.01 * 26


def freeze(robot):
    if robot.looks == 12:
        robot.seen_s = robot.clock()


def test_guard_stale_observation_holds_then_stops():
    limits = GuardConfig(max_observation_age_s=0.1, give_up_s=0.5)
    robot, report = drive(STEADY, on_tick=freeze, guards=limits, seconds=5.0)
    assert report.ended == "stopped" and report.guards["stale_observation"] in (26, 27)
    held = robot.sent[-20]
    assert held[0] == np.float32(0.1) and held[1] == 0 and held[2] == -1, "where it was, the gripper as it was"
    assert report.ticks < 75


def test_a_hold_ends_when_its_cause_does():
    def blink(robot):
        robot.seen_s = robot.clock() - 1 if 10 < robot.looks < 20 else None

    robot, report = drive(STEADY, on_tick=blink)
    assert report.ended == "time" and report.guards == {"stale_observation": 9}
    assert robot.position[1] == pytest.approx(0.01 * 41, abs=1e-5)


def test_guard_stale_action_holds():
    # An answer about a world of half a minute ago, to a robot that sees well.
    def late(robot):
        robot.seen_s = robot.clock() - 30 if robot.looks == 2 else None

    limits = GuardConfig(max_observation_age_s=60, max_action_age_s=0.5, give_up_s=0.2)
    robot, report = drive(STEADY, on_tick=late, guards=limits, n_action_steps=8)
    assert report.ended == "stopped" and report.guards["stale_action"] == 12
    assert robot.position[1] == 0


def test_guard_estop_disconnects(tmp_path):
    file = tmp_path / "estop"
    robot, report = drive(STEADY, on_tick=lambda robot: robot.looks == 20 and file.touch(), estop_file=file)
    assert report.ended == "disconnect" and report.guards == {"estop": 1}
    assert len(robot.sent) == 18, "nothing after the file was there (the first look is the warm-up's)"
    stays_put, report = drive(STEADY, estop_file=file)
    assert report.ended == "disconnect" and stays_put.sent == []


def test_guard_robot_lost_disconnects():
    def unplug(robot):
        if robot.looks == 9:
            raise ConnectionError("cable")

    robot, report = drive(STEADY, on_tick=unplug)
    assert report.ended == "disconnect" and report.guards == {"robot_lost": 1} and len(robot.sent) == 7


def test_guard_dead_server_holds_and_a_server_that_returns_is_used_again():
    policy = Says(STEADY)

    def serve(port=0):
        server = PolicyServer(policy, action_spec=SPEC, cameras=("front",), port=port, proprio_dim=2)
        running.enter_context(serve_in_thread(server))
        return server

    def on_tick(robot):
        moving = np.array(robot.sent or np.zeros((1, 3)))[:, 1] > 0
        if robot.looks == 15:
            running.close()  # the server is gone, with the connection
        elif robot.looks == 75:
            serve(port)
        robot.done = robot.looks > 75 and bool(moving[-20:].all())

    with contextlib.ExitStack() as running:
        server = serve()
        port = server.port
        client = PolicyClient(server.uri)
        client.timeout_s = 0.5
        robot = Slide(on_tick=on_tick)
        report = control(robot, client, ControlConfig(duration_s=20.0, guards=GuardConfig(give_up_s=15)))
    assert report.ended == "done" and report.guards["dead_server"] > 0
    sent = np.array(robot.sent)
    stop = int(np.argmin(sent[12:, 1] > 0)) + 12
    assert not sent[stop : stop + 15, 1].any() and (sent[stop : stop + 15, 0] == np.float32(0.1)).all()


def test_a_server_that_never_answers_is_dead():
    release = threading.Event()

    class Hangs(Says):
        def act(self, obs):
            if self.asked >= 3:
                release.wait(20)
            return super().act(obs)

    limits = GuardConfig(give_up_s=0.3, stop_s=0.1)
    robot = Slide()
    report = control(robot, Hangs(STEADY), ControlConfig(duration_s=10, server_timeout_s=0.2, guards=limits))
    release.set()
    assert report.ended == "stopped" and report.guards["dead_server"] >= 5 and report.seconds < 3


def test_interpolation_to_the_robots_rate():
    chunk = [[0.2, 0.03, -1.0], [0.4, 0.06, 1.0]]
    robot, report = drive(chunk, policy_hz=HZ / 2, n_action_steps=2, seconds=0.08)
    sent = np.array(robot.sent)
    np.testing.assert_allclose(sent[:, 0], [0.1, 0.2, 0.3, 0.4], atol=1e-6)
    np.testing.assert_allclose(sent[:, 1], [0.015, 0.015, 0.03, 0.03], atol=1e-6)
    np.testing.assert_array_equal(sent[:, 2], [-1, -1, 1, 1])
    with pytest.raises(ValueError, match="policy_hz must be at most"):
        drive(chunk, policy_hz=60)


def test_interpolation_between_rates_that_do_not_divide():
    """Policy at 20 Hz, robot at 50 Hz: ticks end after 0.4, 0.8, 1.2, 1.6, 2 actions."""
    robot, _ = drive([[0.2, 0.1, -1.0], [0.4, -0.1, 1.0]], policy_hz=20, n_action_steps=2, seconds=0.2)
    sent = np.array(robot.sent)
    np.testing.assert_allclose(sent[:5, 0], [0.08, 0.16, 0.24, 0.32, 0.4], atol=1e-6)
    np.testing.assert_allclose(sent[:5, 1], [0.04, 0.04, 0.02 - 0.02, -0.04, -0.04], atol=1e-6)
    np.testing.assert_array_equal(sent[:5, 2], [-1, -1, 1, 1, 1])
    assert len(sent) == 10 and sent[5:, 1].sum() == pytest.approx(0, abs=1e-6), "every action's displacement in full"


def test_a_late_chunk_loses_the_actions_already_played_and_no_others():
    plan = Plan(KINDS, ticks_per_step=1, rest=(0, 0, 1))
    first = np.arange(24, dtype=float).reshape(8, 3)
    assert plan.install(first, asked_at_step=0, seen_s=0) == 0
    for _ in range(3):
        plan.advance()
    assert plan.install(first + 100, asked_at_step=1, seen_s=1) == 2
    assert plan.wanted() == tuple(first[2] + 100) and plan.remaining == 6
    assert plan.install(first[:2], asked_at_step=0, seen_s=2) == 3 and plan.wanted() == tuple(first[2] + 100)


def test_blending_goes_from_old_to_new_and_leaves_switches_alone():
    plan = Plan(KINDS, ticks_per_step=1, rest=(0, 0, 1), join=Blend(3))
    plan.install(np.array([[0.0, 0.0, 1.0]] * 8), asked_at_step=0, seen_s=0)
    plan.install(np.array([[1.0, 0.4, -1.0]] * 8), asked_at_step=0, seen_s=0)
    played = []
    for _ in range(5):
        played.append(plan.wanted())
        plan.advance()
    np.testing.assert_allclose(played, [[w, 0.4 * w, -1] for w in (0.25, 0.5, 0.75, 1, 1)], atol=1e-6)


def test_inference_runs_beside_the_loop():
    def finish(robot):
        robot.done = robot.looks > 60

    robot = Slide(on_tick=finish)

    def thinks(n):
        """For three of the robot's ticks, however long they take."""
        until = len(robot.sent) + 3 if n > 1 else 0
        while len(robot.sent) < until and robot.connected:
            time.sleep(0.001)
        return STEADY

    limits = GuardConfig(max_action_age_s=60, give_up_s=60)
    report = control(robot, Says(thinks), ControlConfig(duration_s=60, n_action_steps=2, guards=limits))
    assert report.ended == "done" and report.answers > 4
    assert max(report.delays) >= 2, "actions were played while the policy thought"


def test_questions_in_flight_are_answered_in_their_order():
    """Two connections; the second answers first, and is kept until the first has."""
    go = {1.0: threading.Event(), 2.0: threading.Event()}

    class Waits:
        def act(self, obs):
            x = float(obs.proprio[0, 0])
            assert go[x].wait(10)
            return np.full((1, 2, 3), x)

    def look(x):
        return Observation({}, np.array([[x]], np.float32), ["go"])

    def fetched(timeout_s=5.0):
        until = time.monotonic() + timeout_s
        while (answer := inference.fetch()) is None and time.monotonic() < until:
            time.sleep(0.001)
        return answer and (answer.asked_at_step, float(answer.chunk[0, 0]))

    inference = Inference(Waits(), Waits(), asynchronous=True)
    inference.ask(look(1.0), step=0, seen_s=0.0)
    assert not inference.busy
    inference.ask(look(2.0), step=3, seen_s=0.1)
    assert inference.busy
    go[2.0].set()
    assert fetched(0.2) is None, "the older question is still out"
    go[1.0].set()
    assert fetched() == (0, 1.0) and fetched() == (3, 2.0)
    assert not inference.busy and inference.waiting_s() == 0
    inference.close()


def test_in_flight_counts_the_connections():
    with pytest.raises(ValueError, match="in_flight"):
        control(Slide(), Says(lambda n: STEADY), ControlConfig(in_flight=2))
    with pytest.raises(ValueError, match="in_flight"):
        control(Slide(), Says(lambda n: STEADY), ControlConfig(in_flight=2, asynchronous=False), Says(lambda n: STEADY))


def test_a_slow_link_is_asked_more_often_than_it_answers():
    """Each answer takes five ticks; with five connections there is one at every tick."""
    robot = Slide()

    def slow(n):
        time.sleep(5 / HZ)
        return STEADY

    limits = GuardConfig(max_action_age_s=60, give_up_s=60)
    answers = {}
    for in_flight in (1, 5):
        config = ControlConfig(duration_s=1.5, in_flight=in_flight, guards=limits)
        answers[in_flight] = control(robot, Says(slow), config, *(Says(slow) for _ in range(in_flight - 1))).answers
    assert answers[5] > 2.5 * answers[1]


def test_inference_inside_the_loop_costs_deadlines_and_none_is_made_up_for_in_a_burst():
    clock = Clock()

    def thinks(n):
        clock.sleep(0.05)
        return STEADY

    robot = Slide(clock)
    report = control(
        robot,
        Says(thinks),
        ControlConfig(duration_s=1.0, n_action_steps=2, asynchronous=False),
        clock=clock,
        sleep=clock.sleep,
    )
    assert report.overruns == report.answers >= 10 and report.ticks < 40
    assert np.diff(robot.times).min() >= 1 / HZ - 1e-9
    assert report.latency_ms["p50"] == pytest.approx(50)


def test_a_robot_that_runs_dry_asks_earlier_and_late_displacements_are_made_up_for():
    """An answer takes five ticks; it says how far it is to 0.4 from where the hand was when it was asked."""
    clock, robot = Clock(), None

    class Post:
        """Inference in virtual time."""

        asked = None
        busy = property(lambda self: self.asked is not None)

        def ask(self, obs, *, step, seen_s, prefix=None):
            self.asked = (float(obs.proprio[0, 1]), step, seen_s, clock.now)

        def fetch(self):
            if self.asked is None or clock.now < self.asked[3] + 5 / HZ - 1e-9:
                return None
            (y, step, seen_s, _), self.asked = self.asked, None
            return Answer(np.array([[0.0, (0.4 - y) / 12, 1.0]] * 12, np.float32), None, step, seen_s, 0.1)

        def waiting_s(self):
            return 0.0

    def run(catch_up_steps):
        nonlocal robot
        robot = Slide(clock)
        robot.connect()
        config = ControlConfig(n_action_steps=12, join="switch", catch_up_steps=catch_up_steps)
        loop = ControlLoop(robot, Post(), config, clock=clock)
        loop.chunk_size = 8
        loop.start()
        held = []
        for _ in range(60):
            held.append("stale_action" in loop.tick(clock.now).guards)
            clock.sleep(1 / HZ)
        return held, float(robot.position[1])

    held, reached = run(3)
    assert all(held[:5]) and any(held[5:25]) and not any(held[40:]), "it learnt to ask five actions before the end"
    assert reached == pytest.approx(0.4, abs=0.01)
    _, overshot = run(0)
    assert abs(overshot - 0.4) > abs(reached - 0.4), "without, what was played meanwhile is played twice"


def test_dry_run_sends_nothing():
    robot, report = drive(STEADY, dry_run=True)
    assert robot.sent == [] and report.ticks == 50 and report.answers > 0


def test_the_black_box_replays_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    wild = Says(lambda n: rng.normal(0, [0.6, 0.3, 1.0], (8, 3)) if n < 9 else [[np.nan] * 3] * 8)
    limits = GuardConfig(velocity={"x": 5.0}, acceleration={"x": 200.0}, workspace={"y": (-50, 50)})
    box = BlackBox(tmp_path / "log.jsonl")
    robot, report = drive(wild, log=box, guards=limits, policy_hz=HZ / 2, seconds=3.0)
    box.close()
    pairs = replay(tmp_path / "log.jsonl")
    assert report.ended == "stopped" and len(pairs) == report.ticks
    assert all(logged == again for logged, again in pairs)
    np.testing.assert_array_equal([logged.action for logged, _ in pairs], np.array(robot.sent))
    assert {"velocity_limit", "acceleration_limit", "action_limit", "nonfinite_action"} <= set(report.guards)
    header, lines = read(tmp_path / "log.jsonl")
    assert header["control"]["policy_hz"] == HZ / 2 and lines[-1]["report"]["ended"] == "stopped"
    # Cut by a crash, it still reads; with another limit, it would have gone otherwise.
    text = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text(text[: len(text) // 2])
    assert 0 < len(replay(tmp_path / "cut.jsonl")) < len(pairs)
    (tmp_path / "other.jsonl").write_text(text.replace('"x": 5.0', '"x": 4.0', 1))
    assert any(logged != again for logged, again in replay(tmp_path / "other.jsonl"))
    with pytest.raises(ValueError, match="already there"):
        BlackBox(tmp_path / "log.jsonl")


def test_a_disk_that_stands_still_does_not_hold_up_the_loop(tmp_path, monkeypatch):
    box = BlackBox(tmp_path / "log.jsonl")
    flush, waits = box._file.flush, threading.Event()

    class File:
        write = staticmethod(box._file.write)
        close = staticmethod(box._file.close)

        def flush(self):
            waits.wait(20)
            flush()

    monkeypatch.setattr(box, "_file", File())
    robot, report = drive(STEADY, log=box)
    assert report.ticks == 50 and (tmp_path / "log.jsonl").stat().st_size == 0
    waits.set()
    box.close()
    box.close()
    assert len(replay(tmp_path / "log.jsonl")) == 50, "and nothing is lost"


def test_limits_on_what_the_robot_lacks_are_refused():
    for limits, word in (
        (GuardConfig(velocity={"z": 1.0}), "'z'"),
        (GuardConfig(workspace={"z": (0, 1)}), "'z'"),
        (GuardConfig(stop_s=0), "stop_s"),
    ):
        with pytest.raises(ValueError, match=word):
            drive(STEADY, guards=limits)


def test_a_simulated_world_is_a_robot_and_its_run_can_be_repeated(tmp_path):
    from envs.suites import load_suite
    from envs.worlds import PROPRIO_NAMES, Worlds

    def world():
        return WorldRobot(Worlds(load_suite("tabletop-pick"), 1, image_size=16), seed=3, proprio_names=PROPRIO_NAMES)

    rng = np.random.default_rng(1)
    chunks = rng.uniform(-1, 1, (40, 8, 4))
    box = BlackBox(tmp_path / "log.jsonl")
    settings = ControlConfig(duration_s=1.5, asynchronous=False)
    report = control(world(), Says(lambda n: chunks[n % 40]), settings, log=box)
    box.close()
    assert report.ticks > 5
    _, lines = read(tmp_path / "log.jsonl")
    ticks = [line for line in lines if "inputs" in line]
    again = world()
    again.connect()
    for tick in ticks:
        assert again.observe()[0].proprio[0].tolist() == tick["inputs"]["proprio"]
        again.send(np.array(tick["decision"]["action"], np.float32))
    assert again.observe()[0].privileged is None
    again.disconnect()
