"""A world and a policy in processes of their own, and the control loop that neither can hold up."""

import os
import pty
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from policies.control.controller import ControlConfig, control
from policies.control.guards import GuardConfig
from policies.control.policy_process import PolicyProcess
from policies.control.realtime_sim import LiveWorld
from policies.teleop.keys import key_pressed
from vla.core.types import Observation, Prefix

# A spawned process finds a module by its name, and `tests` may be somebody else's package there.
sys.path.insert(0, str(Path(__file__).parent))
from toy_processes import Plain, Steady, Ticking, World, broken  # noqa: E402


def observation(text="go"):
    return Observation({"front": np.zeros((1, 8, 8, 3), np.uint8)}, np.zeros((1, 3), np.float32), [text])


@pytest.fixture(scope="module")
def beside():
    policy = PolicyProcess(partial(Steady, 0.15))
    yield policy
    policy.close()


def live(**more):
    return LiveWorld(World, control_hz=50.0, seed=5, proprio_names=("x", "gripper", "seed"), **more)


def test_a_policy_beside_answers_as_itself(beside):
    assert beside.pid != os.getpid() and beside.spec == Steady.spec
    np.testing.assert_array_equal(beside.act(observation()), np.full((1, 8, 2), 0.25, np.float32))
    prefix = Prefix(np.zeros((1, 3, 2), np.float32), np.array([3]), np.array([2]))
    assert beside.act(observation(), prefix=prefix)[0, 0, 0] == 2.25
    with pytest.raises(KeyError, match="camera"):
        beside.act(observation("fail"))
    assert beside.act(observation()).shape == (1, 8, 2), "an error does not end it"


def test_a_policy_that_cannot_be_built_or_dies_says_so():
    with pytest.raises(ValueError, match="no such checkpoint"):
        PolicyProcess(broken)
    plain = PolicyProcess(Plain)
    assert not plain.spec.takes_prefix
    os.kill(plain.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            plain.act(observation())
    plain.close()


def test_the_loop_keeps_its_rate_while_the_policy_thinks(beside):
    """Half of a second's work in every second, in another process: no tick waits for it."""
    robot = live(endless=True)
    config = ControlConfig(duration_s=2.0, policy_hz=20.0, n_action_steps=4)
    report = control(robot, beside, config)
    assert report.ended == "time" and report.answers >= 2  # how many depends on what else the machine does
    # A ratio within one run, whatever the machine has to do besides: a tick that waited would take a decision's time.
    assert report.latency_ms["p50"] >= 150 and report.work_ms["p50"] < report.latency_ms["p50"] / 10
    assert max(report.delays) >= 2, "and actions were played while it thought"


def test_the_task_that_was_asked_for_is_that_of_every_scene():
    robot = live(endless=True, task="push")
    robot.connect()
    try:
        assert robot.observe()[0].instruction == ["push in scene 5"]
        for _ in range(5):
            robot.send(np.array([0.4, -1.0], np.float32))
        obs, _ = eventually(robot, lambda obs: robot.scenes == 1)
        assert obs.instruction == ["push in scene 6"]
    finally:
        robot.disconnect()


def test_displacements_add_up_to_the_worlds_own_steps():
    robot = live()
    robot.connect()
    try:
        first, _ = robot.observe()
        assert first.instruction == ["scene 5"] and first.proprio[0].tolist() == [0, 1, 5]
        assert robot.action_spec.high == (pytest.approx(0.4), 1.0) and robot.action_spec.control_hz == 50
        for _ in range(4):  # four at once, 1.6 in all: more than one step of the world takes
            robot.send(np.array([0.4, -1.0], np.float32))
        obs, seen_s = eventually(robot, lambda obs: obs.proprio[0, 0] >= 1.59)
        assert obs.proprio[0].tolist() == pytest.approx([1.6, -1, 5]) and not robot.done
        assert obs.images["front"][0, 0, 0, 0] == int(abs(float(obs.proprio[0, 0])) * 100)
        assert 0 <= time.monotonic() - seen_s < 1
        robot.send(np.array([0.4, -1.0], np.float32))
        until = time.monotonic() + 5
        while not robot.done and time.monotonic() < until:
            robot.observe()
        assert robot.done and robot.success and (robot.scenes, robot.successes) == (1, 1)
    finally:
        robot.disconnect()
        robot.disconnect()


def test_an_episode_begins_with_the_clock_of_its_run_not_when_it_is_connected():
    """A policy takes seconds to warm up; the shortest episode is over in 2.8."""
    for begin in (lambda robot: robot.begin(), lambda robot: robot.send(np.array([0.0, -1.0], np.float32))):
        robot = LiveWorld(Ticking, control_hz=50.0, seed=0)
        robot.connect()
        try:
            _, before = robot.observe()
            until = time.monotonic() + 5
            while (seen := robot.observe())[1] < before + 0.3 and time.monotonic() < until:
                time.sleep(0.005)
            assert seen[1] >= before + 0.3, "it is shown anew, so that nothing is stale"
            assert seen[0].proprio[0, 2] == 0, "and no step was played"
            begin(robot)
            eventually(robot, lambda obs: obs.proprio[0, 2] >= 3)
        finally:
            robot.disconnect()


def test_a_run_begins_the_episode_when_the_policy_is_warm():
    class Slow(Steady):
        def act(self, obs):
            time.sleep(0.0 if seen else 0.5)
            seen.append(int(obs.proprio[0, 2]))
            return np.zeros((1, 8, 2), np.float32)

    seen: list[int] = []
    control(LiveWorld(Ticking, control_hz=50.0, seed=0), Slow(), ControlConfig(duration_s=0.5, dry_run=True))
    assert seen[:1] == [0] and seen[1] <= 2 and seen[-1] >= 1, "without actions too, as in a dry run"


def eventually(robot, condition):
    until = time.monotonic() + 5
    while time.monotonic() < until:
        obs, seen_s = robot.observe()
        if condition(obs):
            return obs, seen_s
        time.sleep(0.005)
    raise AssertionError("it never came")


def test_a_world_that_stands_still_is_a_stale_observation_and_one_that_is_gone_a_lost_robot():
    limits = GuardConfig(max_observation_age_s=0.3, give_up_s=0.2, stop_s=0.1)

    class Quick(Steady):
        def act(self, obs):
            return np.zeros((1, 8, 2), np.float32)

    stalls = LiveWorld(partial(World, 3.0), control_hz=50.0, seed=0)
    report = control(stalls, Quick(), ControlConfig(duration_s=5, policy_hz=20, guards=limits))
    assert report.ended == "stopped" and report.guards["stale_observation"] >= 5

    robot = live()

    class Kills(Quick):
        asked = 0

        def act(self, obs):
            self.asked += 1
            if self.asked == 3:
                os.kill(robot.pid, signal.SIGKILL)
            return super().act(obs)

    report = control(robot, Kills(), ControlConfig(duration_s=5, policy_hz=20, n_action_steps=2))
    assert report.ended == "disconnect" and report.guards["robot_lost"] == 1


def test_slow_rates_are_refused():
    with pytest.raises(ValueError, match="20 Hz"):
        LiveWorld(World, control_hz=10.0, seed=0)


def test_any_key_is_an_estop():
    ours, theirs = pty.openpty()
    try:
        with key_pressed(theirs) as pressed:
            time.sleep(0.1)
            assert not pressed()
            os.write(ours, b" ")  # no Enter
            until = time.monotonic() + 5
            while not pressed() and time.monotonic() < until:
                time.sleep(0.01)
            assert pressed()
            robot = live()
            report = control(robot, PlainOne(), ControlConfig(duration_s=1, policy_hz=20), pressed=pressed)
        assert report.ended == "disconnect" and report.guards == {"estop": 1}
    finally:
        os.close(ours)
        os.close(theirs)
    with key_pressed(None) as never:
        assert not never(), "no terminal, no key"


class PlainOne(Plain):
    def reset(self, env_ids=None): ...
