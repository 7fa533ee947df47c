"""LIBERO's drawers, doors and knobs: pulled open by the handle, pushed shut, turned.

A joint's row of the privileged state says where its handle is, how the joint runs, and how far it has to go.
"""

from __future__ import annotations

import numpy as np

from envs.experts.libero_things import GoalRow
from envs.experts.script import CLOSED, OPEN, UP, Script, Sight, Vector, about, at, go, stay, tilted, turned

_INTO_DRAWER_RAD = 1.3
"""A handle is hooked by a hand so far from the vertical: above one stand the handles of other drawers."""
_INTO_PUSH_RAD = 0.8
"""A drawer is pushed by a hand so far from the vertical: upright, it would meet the handles above."""
_AHEAD_M, _AHEAD_RAD = 0.05, 0.4
"""The hand is sent so far ahead of where a joint is."""


def _left(row: GoalRow) -> float:
    """How far a joint still has to go, m or rad."""
    now, target = row(15, 17)
    return float(target - now)


def _outward(row: GoalRow) -> Vector:
    """(3,) the way a drawer slides toward its goal."""
    return np.sign(_left(row)) * row(5, 8)


def pull(see: Sight, row: GoalRow, rest: Vector) -> Script:
    """Open a drawer: from the front take the handle's bar between the fingers, above and below it, and draw back."""
    out = _outward(row).copy()
    hand = tilted(rest, -out, 0.0, _INTO_DRAWER_RAD)
    yield from go(see, lambda: row(2, 5) + 0.16 * out + 0.04 * UP, hand, OPEN, within_m=0.02, within_rad=0.3, steps=100)
    yield from go(see, lambda: row(2, 5) + 0.09 * out, hand, OPEN, within_m=0.012, within_rad=0.15, steps=60)
    yield from go(see, lambda: row(2, 5), hand, OPEN, within_m=0.008, steps=40)
    yield from stay(lambda: row(2, 5), hand, CLOSED, 8)
    for _ in range(80):
        if row.holds or np.linalg.norm(row(8, 11)) > 0.04:  # open, or slipped off
            break
        yield from go(see, lambda: row(2, 5) + _AHEAD_M * out, hand, CLOSED, within_m=0.0, steps=1)
    yield from stay(at(see.grip), hand, OPEN, 8)
    yield from go(see, at(see.grip + 0.06 * out + 0.02 * UP), hand, OPEN, within_m=0.02, steps=20)
    yield from go(see, at(see.grip + 0.18 * UP), rest, OPEN, within_m=0.03, within_rad=0.3, steps=40)
    return True


def turn_knob(see: Sight, row: GoalRow, rest: Vector) -> Script:
    """Take a knob between the fingers from above, and turn the hand with it."""
    yaw, start = float(row(14, 15)[0]), float(row(15, 16)[0])
    grip = row(2, 5) + 0.01 * UP

    def hand(turn: float) -> Vector:
        return about(rest, (yaw + turn) * UP)

    yield from go(see, at(grip + 0.1 * UP), hand(0.0), OPEN, within_m=0.015, within_rad=0.1, steps=100)
    yield from go(see, at(grip), hand(0.0), OPEN, within_m=0.008, within_rad=0.1, steps=50)
    yield from stay(at(grip), hand(0.0), CLOSED, 8)
    for _ in range(60):
        if row.holds:
            break
        turn = float(row(15, 16)[0]) - start + np.sign(_left(row)) * _AHEAD_RAD
        yield from stay(at(grip), hand(turn), CLOSED, 1)
    yield from stay(at(grip), see.rotation.copy(), OPEN, 8)
    yield from go(see, at(grip + 0.12 * UP), rest, OPEN, within_m=0.02, steps=40)
    return True


def push_shut(see: Sight, row: GoalRow, rest: Vector) -> Script:
    """Push a drawer or a door shut with the closed fingers."""
    if row(17, 18)[0]:
        yield from _push_door(see, row, rest)
    else:
        yield from _push_drawer(see, row, rest)
    return True


def _push_drawer(see: Sight, row: GoalRow, rest: Vector) -> Script:
    inward = _outward(row).copy()
    hand = tilted(rest, inward, np.pi / 2, _INTO_PUSH_RAD)
    yield from go(
        see, lambda: row(2, 5) - 0.1 * inward + 0.12 * UP, hand, CLOSED, within_m=0.02, within_rad=0.3, steps=100
    )
    yield from go(see, lambda: row(2, 5) - 0.06 * inward, hand, CLOSED, within_m=0.015, within_rad=0.2, steps=60)
    for _ in range(100):
        if row.holds:
            break
        yield from stay(lambda: row(2, 5) + _AHEAD_M * inward, hand, CLOSED, 1)
    yield from go(see, at(see.grip - 0.08 * inward), hand, CLOSED, within_m=0.02, steps=20)


def _push_door(see: Sight, row: GoalRow, rest: Vector) -> Script:
    def contact(turn: float, out: float) -> Vector:
        """The place before the door, `turn` (rad) ahead of it and `out` (m) off it, a little nearer the hinge than the
        handle and above it."""
        arm, axis, sense = row(11, 14), row(5, 8), np.sign(_left(row))
        radius = arm - (arm @ axis) * axis
        back = -sense * np.cross(axis, radius / np.linalg.norm(radius))
        return row(2, 5) - 0.2 * radius + out * back + turned(radius, axis, sense * turn) - radius + 0.07 * UP

    hand = rest
    yield from go(see, lambda: contact(0.0, 0.08) + 0.1 * UP, hand, CLOSED, within_m=0.03, within_rad=0.3, steps=100)
    yield from go(see, lambda: contact(0.0, 0.06), hand, CLOSED, within_m=0.02, steps=60)
    for _ in range(150):
        if row.holds:
            break
        yield from stay(lambda: contact(_AHEAD_RAD, 0.0), hand, CLOSED, 1)
    yield from go(see, at(see.grip + 0.1 * UP), hand, CLOSED, within_m=0.02, steps=20)
