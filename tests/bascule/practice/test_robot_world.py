"""One robot as an environment: its chunks, its tasks in turn, and what ends it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from bascule.practice.attendants import DONE, NOTHING, OUT_OF_REACH, Itself, Person
from bascule.practice.robot_world import RobotStopped, RobotWorld
from bascule.practice.simulated import SimulatedRobot
from policies.control.config import ControlConfig
from policies.teleop.keys import key_pressed
from vla.core.types import ActionSpec, Observation, PolicySpec

SPEC = ActionSpec(("dx", "gripper"), (-1.0, -1.0), (1.0, 1.0), 100.0)


class ToyRobot:
    """Moves along a line; the task is done beyond 5, its undo below 5. It puts itself back to 0."""

    action_spec, kinds, proprio_names, done = SPEC, ("displacement", "switch"), ("x", "grip"), False

    def __init__(self) -> None:
        self.x, self.sent, self.put_backs, self.forward = 0.0, [], 0, True
        self.lost = self.stranded = False

    def connect(self) -> None:
        pass

    def observe(self) -> tuple[Observation, float]:
        words = "go up" if self.forward else "go down"
        picture = np.zeros((1, 4, 4, 3), np.uint8)
        return Observation({"front": picture}, np.array([[self.x, 1.0]], np.float32), [words]), time.monotonic()

    def rest(self) -> tuple[float, ...]:
        return (0.0, 1.0)

    def send(self, action: np.ndarray) -> None:
        if self.lost:
            raise ConnectionError("its cable is out")
        self.x += float(action[0])
        self.sent.append(float(action[0]))

    def disconnect(self) -> None:
        pass

    def put_back(self) -> None:
        self.x, self.put_backs, self.forward, self.stranded = 0.0, self.put_backs + 1, True, False

    def next_task(self, forward: bool) -> None:
        self.forward = forward

    def word(self) -> int:
        if self.stranded:
            return OUT_OF_REACH
        return DONE if (self.x >= 5.0) == self.forward else NOTHING


class ToyPolicy:
    spec = PolicySpec(SPEC, 3, 3, cameras=("front",))

    def reset(self, env_ids: object = None) -> None:
        pass

    def act(self, obs: Observation) -> np.ndarray:
        return np.zeros((1, 3, 2), np.float32)


def chunk(*moves: float) -> np.ndarray:
    return np.array([[[move, 1.0] for move in moves]], np.float32)


@pytest.fixture
def robot() -> ToyRobot:
    return ToyRobot()


@pytest.fixture
def world(robot: ToyRobot) -> Iterator[RobotWorld]:
    config = ControlConfig(policy_hz=100.0, n_action_steps=3)
    world = RobotWorld(robot, ToyPolicy(), Itself(robot), config, reset_every=2, horizon=9)
    yield world
    world.close()


def test_a_chunk_is_played_once_and_then_the_robot_is_held(world: RobotWorld, robot: ToyRobot) -> None:
    obs = world.start()
    assert obs.instruction == ["go up"] and robot.put_backs == 1 and world.counts.scheduled == 1
    result = world.step_chunk(chunk(0.5, 0.25, 0.125))
    time.sleep(0.1)  # nobody answers: it stays
    assert [move for move in robot.sent if move] == [0.5, 0.25, 0.125]
    assert result.obs.proprio[0, 0] == robot.x == pytest.approx(0.875)
    assert result.n_steps.tolist() == [3] and not result.info["success"].any() and not result.truncated.any()
    for _ in range(2):
        result = world.step_chunk(chunk(0, 0, 0))
    assert result.truncated.all()  # nine steps


def test_the_task_and_its_undo_take_turns_where_things_are(world: RobotWorld, robot: ToyRobot) -> None:
    world.start()
    for _ in range(2):
        result = world.step_chunk(chunk(1, 1, 1))
    assert result.info["success"].all() and not world.reset_is_due
    obs = world.begin([0])
    assert obs.instruction == ["go down"] and obs.proprio[0, 0] == 6.0 and not world.forward[0]
    assert not world.step_chunk(chunk(0, 0, 0)).info["success"].any()
    robot.stranded = True
    result = world.step_chunk(chunk(0, 0, 0))
    assert result.info["out_of_reach"].all() and result.truncated.all()
    assert world.begin([0]).proprio[0, 0] == 0.0 and world.forward[0] and world.reset_is_due
    assert vars(world.counts) == {"scheduled": 1, "out_of_reach": 1, "broken": 0, "continued": 1}
    world.start()
    assert not world.reset_is_due and world.counts.scheduled == 2


def test_a_robot_that_is_lost_ends_the_practice_with_its_words(world: RobotWorld, robot: ToyRobot) -> None:
    world.start()
    robot.lost = True
    with pytest.raises(RobotStopped, match="its cable is out"):
        world.step_chunk(chunk(1, 1, 1))


def test_a_policy_for_another_robot_is_an_error_and_no_hang(robot: ToyRobot) -> None:
    class Wider(ToyPolicy):
        def act(self, obs: Observation) -> np.ndarray:
            return np.zeros((1, 3, 5), np.float32)

    world = RobotWorld(robot, Wider(), Itself(robot), ControlConfig(n_action_steps=3), reset_every=2, horizon=9)
    with pytest.raises(ValueError, match="5 components"):
        world.start()
    world.close()


def test_practice_with_a_robot_needs_somebody_at_a_terminal() -> None:
    with pytest.raises(ValueError, match="a person at a terminal"):
        Person(("put it in", "take it out"))


def test_a_person_says_done_and_put_back_by_keys_and_stops_the_robot_by_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = os.openpty()
    monkeypatch.setattr("sys.stdin", os.fdopen(theirs))
    person = Person(("put it in", "take it out"))

    def until(holds: Callable[[], bool]) -> bool:
        end = time.monotonic() + 5
        while not holds() and time.monotonic() < end:
            time.sleep(0.01)
        return holds()

    os.write(ours, b"\n")
    person.put_back()
    with key_pressed(others=person.key) as pressed:
        os.write(ours, b" ")
        assert until(lambda: person.word() == DONE)
        person.next_task(forward=False)
        assert person.word() == NOTHING
        os.write(ours, b"r")
        assert until(lambda: person.word() == OUT_OF_REACH) and not pressed()
        os.write(ours, b"x")
        assert until(pressed)


def test_what_does_not_put_itself_back_is_named(robot: ToyRobot) -> None:
    with pytest.raises(ValueError, match=r"has no method put_back\(\)"):
        Itself(object())


def test_the_simulated_robot_goes_on_from_one_task_to_the_other() -> None:
    robot = SimulatedRobot(
        "tabletop-tray", ("into-tray", "out-of-tray"), control_hz=20.0, seed=3, image_size=16, proprio_names=()
    )
    try:
        robot.connect()
        robot.begin()
        robot.put_back()
        before = robot.observe()[0]
        robot.next_task(False)
        time.sleep(0.2)
        after = robot.observe()[0]
        assert "zone" in after.instruction[0] and "tray" in before.instruction[0]
        np.testing.assert_allclose(after.proprio, before.proprio, atol=0.02)
        assert robot.word() == NOTHING
    finally:
        robot.disconnect()
