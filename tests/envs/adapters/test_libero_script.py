"""The script that puts LIBERO's things into their places, played by a hand without dynamics: a policy that sees one
moment has to be able to learn from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from envs.adapters.libero_suites import GOAL_DIM, GOAL_KINDS
from envs.experts.libero_things import GoalRow, close_on, place
from envs.experts.script import CLOSED, OPEN, Command, Script, Sight, servo

THING, BASKET, WIDTH = np.array([0.1, -0.05, 0.04]), np.array([-0.1, 0.25, 0.02]), 0.05


@dataclass
class Moment:
    """The hand before a command, and the command."""

    grip: NDArray[np.float64]
    opening: float
    command: Command


class Hand:
    """A hand that covers a part of its way at each step; its fingers close by 1 cm a step, up to what they hold."""

    def __init__(self, grip: tuple[float, float, float]) -> None:
        self.grip, self.thing, self.opening = np.array(grip), THING.copy(), 0.078
        self.see = Sight()
        self.look()

    def look(self) -> None:
        """Refresh what the script sees: a can of 8 cm, held at its middle, and a basket 5 cm high."""
        row = np.zeros(GOAL_DIM)
        row[0], row[2:5], row[5:8], row[8:11] = GOAL_KINDS["in"], self.thing, BASKET, self.thing - self.grip
        row[15:18] = -0.04, 0.04, 0.05
        self.see.grip, self.see.state = self.grip, np.array([0, *row])
        self.see.proprio = np.array([*self.grip, 0, 0, 0, self.opening / 2, -self.opening / 2])

    def step(self, command: Command) -> None:
        """Carry out a command, and the thing along with it where it is held."""
        held = self.opening <= WIDTH + 1e-9 and np.linalg.norm(self.thing - self.grip) < 0.05
        move = 0.02 * servo(self.see, command)[:3].astype(np.float64)
        self.grip = self.grip + move
        self.thing = self.thing + move * held
        way = 0.01 if command.gripper == OPEN else -0.01
        self.opening = float(np.clip(self.opening + way, WIDTH, 0.078))
        self.look()

    def play(self, script: Script, steps: int = 400) -> list[Moment]:
        """All that the script commands."""
        moments = []
        for command in script:
            moments.append(Moment(self.grip, self.opening, command))
            self.step(command)
            assert len(moments) < steps, "the script does not end"
        return moments


def place_it(grip: tuple[float, float, float]) -> list[Moment]:
    hand = Hand(grip)
    script = place(hand.see, GoalRow(hand.see, 0), np.eye(3), drawer=None, slot=None, beside=np.zeros(3))
    moments = hand.play(script)
    assert np.linalg.norm((hand.thing - BASKET)[:2]) < 0.04
    return moments


@pytest.mark.parametrize("start", [(0.0, 0.1, 0.25), (0.13, -0.05, 0.05), (0.3, -0.2, 0.2)])
def test_the_next_step_follows_from_the_moment(start):
    """Only how far the hand is from the thing decides how high it goes, and whether its fingers close."""
    moments = place_it(start)
    first = next(k for k, moment in enumerate(moments) if moment.command.gripper == CLOSED)
    for moment in moments[:first]:
        beside, above = np.linalg.norm((moment.grip - THING)[:2]), moment.command.position[2] - THING[2]
        assert above == pytest.approx(min(0.1, 4 * max(0.0, beside - 0.004)), abs=1e-6)
        assert np.linalg.norm(moment.grip - THING) >= 0.015
    assert np.linalg.norm(moments[first].grip - THING) < 0.015


def test_the_fingers_close_on_the_way_and_the_lift_waits_for_them():
    moments = place_it((0.0, 0.1, 0.25))
    closed = [k for k, moment in enumerate(moments) if moment.command.gripper == CLOSED]
    begins, lifts = closed[0], next(k for k in closed if moments[k].command.position[2] > THING[2] + 0.05)
    speed = np.linalg.norm(moments[begins].grip - moments[begins - 1].grip)
    assert speed > 0.003, "the hand stood before it closed"
    assert moments[lifts].opening == moments[lifts - 1].opening == WIDTH
    assert moments[begins].opening > WIDTH and lifts - begins <= 6


def test_a_thing_is_let_go_on_the_way_into_a_basket():
    moments = place_it((0.0, 0.1, 0.25))
    last = max(k for k, moment in enumerate(moments) if moment.command.gripper == CLOSED)
    goes = moments[last + 1]
    assert 0.01 < np.linalg.norm((goes.grip - BASKET)[:2]) < 0.03 and goes.command.gripper == OPEN
    assert goes.command.position[:2] == pytest.approx(BASKET[:2], abs=0.01)


def test_fingers_that_close_on_nothing_do_not_wait_for_long():
    hand = Hand((0.0, 0.0, 0.3))
    moments = hand.play(close_on(hand.see, lambda: np.array([0.0, 0.0, 0.3]), np.eye(3)))
    assert 3 <= len(moments) <= 6
