"""Scripted experts of the robosuite suites.

The fingers close along the grip site's x axis (since robosuite 1.5) and reach along its z axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from envs.adapters.robosuite_suites import GRASP_BAR_M
from envs.experts.script import (
    CLOSED,
    OPEN,
    UP,
    Command,
    Lost,
    Script,
    ScriptedExpert,
    Sight,
    Vector,
    at,
    downward,
    go,
    rotation_of,
    stay,
    turned,
    wrapped,
)  # fmt: skip


def _level(where: Callable[[], Vector], height: float) -> Vector:
    return np.array([*where()[:2], height])


class RobosuiteExpert(ScriptedExpert):
    """Policy of one-step chunks from `envs.adapters.robosuite_env`'s proprio and privileged state."""

    def __init__(self, suite: str, num_envs: int) -> None:
        super().__init__(_SCRIPTS.get(suite, _grasp), lambda proprio: rotation_of(proprio[3:7]), num_envs)


def _grasp(see: Sight) -> Script:
    """Lift, Stack, Can: grasp from above, and let go over the goal if there is one; again, if that was no success."""
    has_goal = see.state[7] > 0.5

    def grasp() -> Vector:
        return see.state[0:3] + see.state[11] * UP

    def over_goal() -> Vector:
        return see.state[4:7] + see.grip - see.state[0:3]

    def lost() -> bool:
        return bool(np.linalg.norm(see.grip - see.state[0:3]) > 0.06)

    while True:
        mine = float(np.arctan2(see.rotation[1, 0], see.rotation[0, 0]))
        hand = downward(mine + _face(see.state, mine))
        yield from go(see, lambda: grasp() + 0.10 * UP, hand, OPEN, within_m=0.015, within_rad=0.05)
        yield from go(see, grasp, hand, OPEN, within_m=0.006, within_rad=0.05, steps=40)
        yield from stay(grasp, hand, CLOSED, 6)
        high = see.grip[2] + (max(0.10, see.state[6] - see.state[2] + 0.13) if has_goal else 0.10)
        try:
            up = at(np.array([*see.grip[:2], high]))
            yield from go(see, up, hand, CLOSED, within_m=0.02 if has_goal else 0.0, lost=lost)
            across = partial(_level, over_goal, high)
            yield from go(see, across, hand, CLOSED, within_m=0.015, steps=80, lost=lost)
            yield from go(see, over_goal, hand, CLOSED, within_m=0.005, steps=40, speed=0.5, lost=lost)
        except Lost:
            continue
        yield from stay(lambda: see.grip, hand, OPEN, 6)
        yield from go(see, lambda: see.grip + 0.1 * UP, hand, OPEN, within_m=0.0, steps=15)


def _face(state: Vector, rest_yaw: float) -> float:
    """Turn of the hand (rad from `rest_yaw`) that has the fingers close on two faces of a box.

    The nearest such turn; but beside what it is to be stacked on, if that is close, the one with more room for fingers.
    """
    turn = wrapped(state[3] - rest_yaw, np.pi / 2)
    beside = state[4:6] - state[0:2]
    if state[7] < 0.5 or np.linalg.norm(beside) > 0.12:
        return turn
    other = turn - np.copysign(np.pi / 2, turn)
    return min((turn, other), key=lambda yaw: abs(beside @ [np.cos(rest_yaw + yaw), np.sin(rest_yaw + yaw)]))


def _square(see: Sight) -> Script:
    """NutAssemblySquare: take the nut by its handle, turn it square with the peg, thread it on with a light hand."""

    def centre() -> Vector:
        return see.state[0:3]

    def grasp() -> Vector:
        return see.state[4:7] + 0.010 * _unit(see.state[4:7] - centre())

    def over_peg(height: float) -> Vector:
        return see.grip + np.array([*(see.state[7:9] - centre()[:2]), height - centre()[2]])

    def lost() -> bool:
        return bool(np.linalg.norm(see.grip - see.state[4:7]) > 0.06)

    start, mine = see.grip.copy(), float(np.arctan2(see.rotation[1, 0], see.rotation[0, 0]))
    yield from stay(lambda: start, downward(mine), OPEN, 12)  # the nut falls onto the table first
    while True:
        outward = see.state[4:6] - centre()[:2]
        # The fingers close across the handle, which is a bar that points away from the nut.
        yaw = mine + wrapped(float(np.arctan2(outward[1], outward[0])) + np.pi / 2 - mine, np.pi)
        hand = downward(yaw)
        yield from go(see, lambda: grasp() + 0.10 * UP, hand, OPEN, within_m=0.010, within_rad=0.05)
        yield from go(see, grasp, hand, OPEN, within_m=0.006, within_rad=0.05, steps=50)
        yield from stay(grasp, hand, CLOSED, 8)
        try:
            up = at(see.grip + 0.20 * UP)
            yield from go(see, up, hand, CLOSED, within_m=0.02, steps=50, speed=0.5, lost=lost)
            for angle in _steps_to_square(float(see.state[3]), yaw, mine):
                hand = downward(yaw + angle)
                here = at(see.grip)
                yield from go(see, here, hand, CLOSED, within_m=0.05, within_rad=0.05, steps=25, lost=lost)
            for height, near, turn in ((0.985, 0.02, 0.03), (0.985, 0.006, 0.03), (0.975, 0.003, 0.02)):
                above = partial(over_peg, height)
                yield from go(see, above, hand, CLOSED, within_m=near, within_rad=turn, steps=60, speed=0.5, lost=lost)
            for _ in range(60):
                if lost():
                    raise Lost
                if centre()[2] < 0.86:
                    break
                # Above the peg's top the nut is centred; around it the peg does that.
                aside = np.clip(see.state[7:9] - centre()[:2], -0.01, 0.01) if centre()[2] > 0.958 else np.zeros(2)
                yield Command(see.grip + np.array([*aside, -0.012]), hand, CLOSED)
        except Lost:
            continue
        yield from stay(lambda: see.grip, hand, OPEN, 5)
        yield from go(see, lambda: see.grip + 0.1 * UP, hand, OPEN, within_m=0.0, steps=8)


def _unit(vector: Vector) -> Vector:
    return vector / np.linalg.norm(vector)


def _steps_to_square(nut_yaw: float, hand_yaw: float, rest_yaw: float) -> list[float]:
    """Turns of the hand (rad from now, at most 0.4 apart) after which the nut's sides are parallel to the peg's.

    Of the four such turns the one is chosen that is short, keeps the wrist near its rest, and does not have the handle
    point away from the robot, where the arm would have to stretch.
    """

    def cost(quarter: float) -> float:
        turn = wrapped(quarter - nut_yaw, 2 * np.pi)
        from_rest = abs(wrapped(hand_yaw + turn - rest_yaw, 2 * np.pi))
        return abs(turn) + (1.5 if abs(quarter) < 0.1 else 0.0) + (3.0 if from_rest > 2.0 else 0.0)

    turn = wrapped(min((-np.pi / 2, 0.0, np.pi / 2, np.pi), key=cost) - nut_yaw, 2 * np.pi)
    count = max(1, int(np.ceil(abs(turn) / 0.4)))
    return [turn * k / count for k in range(1, count + 1)]


def _door(see: Sight) -> Script:
    """Door: grip the handle's bar from the front, turn the hand with it as one turns a handle, and pull.

    From above there is no room: the hand is wider than the gap between bar and door. Reaching toward the door, with one
    finger over and one under the bar, it has all the room there is, and its grip holds while the door swings.
    """

    def pose(more_latch: float = 0.0, more_hinge: float = 0.0, out: float = 0.0) -> tuple[Vector, Vector]:
        """(grip position, hand rotation) on the bar once latch and hinge have moved on by so much (rad)."""
        centre, bar, outward, hinge = see.state[0:3], see.state[3:6], see.state[6:9], see.state[9:12]
        bar = turned(bar, -outward, more_latch)
        point = centre + GRASP_BAR_M * bar + out * outward
        point = hinge * [1, 1, 0] + point[2] * UP + turned((point - hinge) * [1, 1, 0], UP, more_hinge)
        bar, outward = turned(bar, UP, more_hinge), turned(outward, UP, more_hinge)
        closing = np.cross(-outward, bar)
        hand = np.stack([closing, np.cross(-outward, closing), -outward], axis=1)
        flipped = hand * [-1.0, -1.0, 1.0]
        # The fingers are alike: the wrist takes the shorter way from where it is. (From where it began, a latch turned
        # by 1.2 rad is as far one way as the other, and the hand went to and fro.)
        return point, max(hand, flipped, key=lambda rotation: np.trace(see.rotation.T @ rotation))

    while True:
        yield from go(see, lambda: pose(out=0.10)[0], pose()[1], OPEN, within_m=0.015, within_rad=0.08, steps=80)
        yield from go(see, lambda: pose(out=0.005)[0], pose()[1], OPEN, within_m=0.008, within_rad=0.05, steps=40)
        yield from stay(lambda: pose()[0], pose()[1], CLOSED, 6)
        for _ in range(200):
            if np.linalg.norm(pose()[0] - see.grip) > 0.08:
                break
            if see.state[12] < 1.3 and see.state[13] < 0.02:
                yield Command(*pose(more_latch=0.25), CLOSED)
            else:  # the latch's tip must be all the way out of the frame, and stay so until it is past it
                yield Command(*pose(more_latch=0.1 if see.state[13] < 0.1 else 0.0, more_hinge=0.10), CLOSED)


_SCRIPTS: dict[str, Callable[[Sight], Script]] = {"robosuite-square": _square, "robosuite-door": _door}
