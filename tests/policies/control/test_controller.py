"""The control loop on small robots: each guard is tripped on purpose, and what reaches the robot is what is checked."""

import contextlib
import threading

import numpy as np
import pytest

from envs.sim.render_options import RenderOptions
from policies.chunking.merge import Blend
from policies.control.controller import ControlConfig, control
from policies.control.flight_log import BlackBox, read, replay
from policies.control.guards import GuardConfig
from policies.control.playback import Plan
from policies.serving.client import PolicyClient
from policies.serving.server import PolicyServer, serve_in_thread
from tests.policies.control.toy_robot import HZ, KINDS, SPEC, STEADY, Says, Slide, WorldRobot, drive
from vla.core.types import PolicySpec


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
    assert report.reasons["workspace"] == report.error and "y is at 0.2" in report.error
    assert report.error.endswith("its workspace is -0.2 to 0.2")
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
    # Every answer is about a world of half a minute ago.
    def late(robot):
        robot.seen_s = robot.clock() - 30

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
    policy = Says(STEADY, PolicySpec(SPEC, cameras=("front",), proprio_dim=2))

    def serve(port=0):
        server = PolicyServer(policy, port=port)
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
        (GuardConfig(workspace={"y": (1, 0)}), "workspace limit of y must be lowest and highest"),
        (GuardConfig(stop_s=0), "stop_s"),
    ):
        robot = Slide()
        robot.connect = lambda: pytest.fail("it was connected before its limits were looked at")
        with pytest.raises(ValueError, match=word):
            drive(STEADY, robot, guards=limits)


def test_a_simulated_world_is_a_robot_and_its_run_can_be_repeated(tmp_path):
    from envs.backends.cpu_worlds import PROPRIO_NAMES, TabletopWorlds
    from envs.registry import load_suite

    def world():
        return WorldRobot(
            TabletopWorlds(load_suite("tabletop-pick"), 1, render=RenderOptions(image_size=16)),
            seed=3,
            proprio_names=PROPRIO_NAMES,
        )

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
