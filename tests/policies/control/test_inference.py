"""Inference beside the control loop: late answers, several questions on their way, and what is left to play."""

import threading
import time

import numpy as np
import pytest

from policies.control.controller import ControlConfig, control
from policies.control.guards import GuardConfig
from policies.control.loop import ControlLoop
from policies.control.playback import Answer, Inference
from tests.policies.control.toy_robot import HZ, STEADY, Clock, Says, Slide
from vla.core.types import Observation


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

        def ask(self, obs, *, step, seen_s, prefix=None, scene=0):
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
        loop.policy.chunk_size = 8
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
