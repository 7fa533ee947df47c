"""LIBERO's things into their places: taken hold of from above and carried, or pushed along the table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from envs.adapters.libero_suites import GOAL_DIM, GOAL_KINDS, TO_OPEN_FIRST
from envs.experts.script import (
    CLOSED,
    OPEN,
    UP,
    Command,
    Lost,
    Script,
    Sight,
    Vector,
    about,
    at,
    go,
    rotation_vector,
    stay,
    tilted,
    turned,
    wrapped,
)

_DISH_M = 0.025
"""A thing that is lower than this and too wide for the fingers is pushed along the table, not lifted by its rim."""
_BESIDE_M, _AHEAD_M, _PRESSED_M = 0.045, 0.02, 0.004
"""A dish is pushed from within, so far off its middle; the fingers are sent so far ahead of that, and so little above
its bottom, which presses them on it."""

_LEAN_RAD, _UNDER_RAD, _ASIDE_M, _UNDER_M = 0.25, 0.6, 0.01, 0.08
"""The hand's lean away from a drawer, also from under it, and how far from its middle, away from the cabinet, it is
filled; an open drawer reaches so far over a thing that is to go into it."""

_CENTRED_M, _STEEP, _ASKEW_M = 0.004, 4.0, 0.1
"""The funnel down to a thing: how far beside it the hand may come down, how much higher it stays for each metre more,
and what a radian of its turn counts for in metres."""
_DROP_M = 0.025
"""A thing is let go so far before the middle of a container it falls into, on the way there."""
_CLOSE_M, _CLOSING_STEPS = 0.015, 15
"""The fingers begin to close so far before the grasp; they stop within so many steps."""

_INTO_SLOT_M = 0.05
"""A thing is let down so far below the rim of a narrow place before it is let go."""
_THROUGH_RAD, _DEEP_M, _LOW_M = 1.05, 0.03, 0.055
"""Through a door: the hand's tilt from the vertical, how far before the place's middle the thing stands, and how far
below it its bottom passes in."""


class GoalRow:
    """One goal of the privileged state, as it is now (`envs.adapters.libero_suites.GOAL_DIM`)."""

    def __init__(self, see: Sight, number: int) -> None:
        self._see, self._columns = see, slice(1 + number * GOAL_DIM, 1 + (number + 1) * GOAL_DIM)

    def __call__(self, first: int, end: int) -> Vector:
        """Some of its columns."""
        return self._see.state[self._columns][first:end]

    @property
    def kind(self) -> int:
        """See `envs.adapters.libero_suites.GOAL_KINDS`."""
        return int(self(0, 1)[0])

    @property
    def holds(self) -> bool:
        """True while LIBERO says so."""
        return bool(self(1, 2)[0])

    @property
    def of_a_thing(self) -> bool:
        """True of a thing that has to be in or on a place."""
        return self.kind in (GOAL_KINDS["on"], GOAL_KINDS["in"])

    @property
    def _of_a_joint(self) -> bool:
        return GOAL_KINDS["open"] <= self.kind <= GOAL_KINDS["close"]

    @property
    def height(self) -> float:
        """Height of the thing, m; 0 of a joint."""
        return float(self(16, 17)[0] - self(15, 16)[0]) if self.of_a_thing else 0.0

    @property
    def is_dish(self) -> bool:
        """True of a wide, flat thing whose place is on the table, too."""
        bottom, top = self(15, 17)
        level = 0.0 <= self(4, 5)[0] + bottom - self(7, 8)[0] < _DISH_M
        return bool(top - bottom < _DISH_M and np.linalg.norm(self(11, 13)) > 0.04 and level)

    @property
    def is_drawer(self) -> bool:
        """True of a slide."""
        return self._of_a_joint and not self(17, 18)[0]

    @property
    def is_door(self) -> bool:
        """True of a hinge whose handle is away from its axis."""
        return self._of_a_joint and bool(self(17, 18)[0]) and not self.is_knob

    @property
    def outward(self) -> Vector:
        """(3,) the way in which a drawer opens, or through a door from inside, were it shut."""
        now, target = self(15, 17)
        sense, axis = np.sign(max(now, target, key=abs)), self(5, 8)
        if self.is_drawer:
            return sense * axis
        out = sense * np.cross(axis, turned(self(11, 14), axis, -now))
        return out / np.linalg.norm(out)

    @property
    def is_knob(self) -> bool:
        """True of a hinge whose handle is at its axis."""
        arm, axis = self(11, 14), self(5, 8)
        return bool(self(17, 18)[0]) and bool(np.linalg.norm(arm - (arm @ axis) * axis) < 0.03)


def place(
    see: Sight, row: GoalRow, rest: Vector, *, drawer: GoalRow | None, slot: GoalRow | None, beside: Vector
) -> Script:
    """Take the thing of a goal and let it go in its place, or so far (3,) `beside` its middle. Into a `drawer` it is
    lowered, by a hand that leans away; for a `slot` it is turned, and let down between its walls."""
    yaw, (bottom, top, rim) = row(14, 15)[0], row(15, 18)
    above = top - row(13, 14)[0] + 0.06
    hand, let_down = about(rest, yaw * UP), row.kind == GOAL_KINDS["on"] or drawer or slot
    if drawer:
        across = np.array([-np.sin(yaw), np.cos(yaw), 0.0])  # the fingers close along it
        under = drawer.kind == TO_OPEN_FIRST
        lean = _UNDER_RAD if under else _LEAN_RAD
        hand = about(hand, lean * float(np.cross(UP, drawer.outward) @ across) * across)
        beside = _ASIDE_M * drawer.outward
        clear = _grip(row) + under * _UNDER_M * drawer.outward
        for height in (see.grip[2], clear[2] + 0.04)[: 1 + under]:  # round the drawer
            way = at(np.array([*clear[:2], height]))
            yield from go(see, way, hand, OPEN, within_m=0.03, within_rad=0.3, steps=100)
        above = 0.04 if under else above
    yield from _take(see, row, hand, above)

    def lost() -> bool:
        return bool(np.linalg.norm(_grip(row) - see.grip) > 0.06)

    # High enough for the thing's bottom to pass over the place's rim.
    lift = max(0.12, row(7, 8)[0] + rim - (row(4, 5)[0] + bottom) + 0.05)
    try:
        if drawer:  # not up against the drawer: first from under it
            out = at(see.grip + 0.02 * UP + _UNDER_M * drawer.outward)
            yield from go(see, out, hand, CLOSED, within_m=0.02, steps=40, lost=lost)
        yield from go(see, at(see.grip + lift * UP), hand, CLOSED, within_m=0.02, steps=60, lost=lost)
        if slot:
            hand = about(rest, (yaw + wrapped(slot(14, 15)[0] - yaw, np.pi)) * UP)
            yield from go(see, at(see.grip), hand, CLOSED, within_m=0.02, within_rad=0.05, steps=60, lost=lost)
        held, height = row(2, 5) - see.grip, see.grip[2]
        if slot:
            held[:2] = 0.0  # the thing's middle is between the fingers, and not where its position is

        def over(z: float) -> Vector:
            return np.array([*(row(5, 8) + beside - held)[:2], z])

        near = 0.012 if let_down else _DROP_M
        yield from go(see, lambda: over(height), hand, CLOSED, within_m=near, steps=100, lost=lost)
        if let_down:
            higher = rim - _INTO_SLOT_M if slot else 0.0 if drawer else 0.02
            ground = row(7, 8)[0] + higher - bottom - held[2]
            yield from go(see, lambda: over(ground), hand, CLOSED, within_m=0.01, steps=40, lost=lost)
    except Lost:
        return False
    here = see.grip.copy()
    yield from stay(at(here) if let_down else lambda: over(here[2]), hand, OPEN, 10)
    yield from go(see, at(see.grip + 0.1 * UP), hand, OPEN, within_m=0.02, steps=15)
    yield from stay(at(see.grip), hand, OPEN, 10)
    return True


def _grip(row: GoalRow) -> Vector:
    """(3,) where the grip site has to be to hold a thing."""
    return row(2, 5) + row(11, 14)


def _take(see: Sight, row: GoalRow, hand: Vector, above: float) -> Script:
    """Down over a thing, from so far `above` the grasp (m), and close the fingers.

    A policy that learns from it sees one picture at a time: the way is a funnel, so where to go follows from where the
    hand is, and the fingers close while it still moves, so that nobody has to come to a point exactly."""

    def way() -> Vector:
        beside = float(np.linalg.norm((_grip(row) - see.grip)[:2]))
        askew = float(np.linalg.norm(rotation_vector(hand @ see.rotation.T)))
        off = max(0.0, beside - _CENTRED_M) + _ASKEW_M * max(0.0, askew - 0.05)
        return _grip(row) + min(above, _STEEP * off) * UP

    yield from go(see, way, hand, OPEN, within_m=_CLOSE_M, within_rad=0.1, steps=160)
    yield from close_on(see, lambda: _grip(row), hand)
    return True


def close_on(see: Sight, where: Callable[[], Vector], hand: Vector) -> Script:
    """Close the fingers on the way to a place, until they have stopped: on a thing, or on each other."""
    opening = start = _opening(see)
    for _ in range(_CLOSING_STEPS):
        yield Command(where(), hand, CLOSED)
        before, opening = opening, _opening(see)
        if opening < start - 0.002 and before - opening < 0.001:
            return True
    return False


def _opening(see: Sight) -> float:
    """Between the fingers, m."""
    return float(see.proprio[6] - see.proprio[7])


def put_through(see: Sight, row: GoalRow, rest: Vector, door: GoalRow) -> Script:
    """Carry a mug by its handle through an open door, as into a microwave, and draw the hand back."""
    out, bottom = door.outward, row(15, 16)[0]
    hand = tilted(rest, -out, np.pi / 2, _THROUGH_RAD)

    def grip() -> Vector:
        return _grip(row)

    def lost() -> bool:
        return bool(np.linalg.norm(grip() - see.grip) > 0.06)

    away = 0.08 * (np.sin(_THROUGH_RAD) * out + np.cos(_THROUGH_RAD) * UP)
    yield from go(see, lambda: grip() + away + 0.1 * UP, hand, OPEN, within_m=0.03, within_rad=0.3, steps=100)
    yield from go(see, lambda: grip() + away, hand, OPEN, within_m=0.015, within_rad=0.1, steps=60)
    yield from go(see, grip, hand, OPEN, within_m=0.008, within_rad=0.1, steps=60)
    yield from stay(grip, hand, CLOSED, 10)
    try:
        held = row(2, 5) - see.grip
        inside = row(5, 8) + _DEEP_M * out - held
        inside[2] = row(7, 8)[0] - _LOW_M - bottom - held[2]
        start = at(np.array([*see.grip[:2], inside[2]]))
        yield from go(see, start, hand, CLOSED, within_m=0.012, steps=60, lost=lost)
        yield from go(see, at(inside + 0.18 * out), hand, CLOSED, within_m=0.015, steps=100, lost=lost)
        yield from go(see, at(inside), hand, CLOSED, within_m=0.01, steps=60, speed=0.5, lost=lost)
        yield from go(see, at(inside - 0.03 * UP), hand, CLOSED, within_m=0.005, steps=8, speed=0.4)
    except Lost:
        return False
    yield from stay(at(see.grip), hand, OPEN, 10)
    yield from go(see, at(see.grip + 0.16 * out), hand, OPEN, within_m=0.02, steps=40, speed=0.6)
    yield from go(see, at(see.grip + 0.15 * UP), rest, OPEN, within_m=0.03, within_rad=0.3, steps=40)
    return True


def push(see: Sight, row: GoalRow, rest: Vector) -> Script:
    """Push a dish along the table from within: the closed fingers stand in it and lean on its rim."""
    bottom, top = row(15, 17)

    def above(height: float) -> Vector:
        return row(2, 5) + (bottom + height) * UP

    def leaning() -> Vector:
        way = row(5, 8) - row(2, 5)
        way[2] = 0.0
        far = float(np.linalg.norm(way))
        return above(_PRESSED_M) + way / max(far, 1e-6) * (_BESIDE_M + min(far, _AHEAD_M))

    yield from go(see, lambda: above(0.1), rest, CLOSED, within_m=0.015, within_rad=0.15, steps=100)
    yield from go(see, lambda: above(_PRESSED_M), rest, CLOSED, within_m=0.006, steps=40)
    for _ in range(200):
        if row.holds:
            break
        yield Command(leaning(), rest, CLOSED, speed=0.4)
    yield from go(see, at(see.grip + 0.1 * UP), rest, CLOSED, within_m=0.02, steps=15)
    return True
