"""Scripted expert of LIBERO's tasks: goal by goal, things into their places, drawers, doors and knobs.

It plays what the privileged state names (`envs.adapters.libero_suites.GOAL_DIM`).
"""

from __future__ import annotations

import numpy as np

from envs.adapters.libero_suites import GOAL_KINDS, GOALS, SLOT, TO_OPEN_FIRST
from envs.experts.libero_joints import pull, push_shut, turn_knob
from envs.experts.libero_things import GoalRow, place, push, put_through
from envs.experts.script import Script, ScriptedExpert, Sight, Vector, about

_TO_CLOSE = GOAL_KINDS["close"]
_APART_M = 0.084
"""Between the middles of two things on one place: moka pots on a stove are 8 cm wide."""


class LiberoExpert(ScriptedExpert):
    """Policy of one-step chunks from `envs.adapters.libero_env`'s proprio and privileged state."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(_tidy, lambda proprio: about(np.eye(3), proprio[3:6]), num_envs)


def _turn(row: GoalRow) -> tuple[bool, bool, bool, float]:
    """Where a goal stands in the order of work: what has to be open before anything else, then joints, then things, the
    low before the tall, which are in the hand's way; last what has to be closed."""
    return row.kind != TO_OPEN_FIRST, row.kind == _TO_CLOSE, row.of_a_thing, row.height


def _tidy(see: Sight) -> Script:
    """One goal after another, and again what did not stay so."""
    rest = see.rotation.copy()
    rows = [GoalRow(see, number) for number in range(GOALS)]
    while True:
        unmet = [row for row in rows if row.kind and not row.holds]
        if all(row.kind == TO_OPEN_FIRST for row in unmet):
            return True
        row = min(unmet, key=_turn)
        if row.of_a_thing:
            drawer = next((other for other in rows if other.is_drawer), None)
            slot = next((other for other in rows if other.kind == SLOT), None)
            door = next((other for other in rows if other.is_door), None)
            if row.is_dish:
                yield from push(see, row, rest)
            elif door and row.kind == GOAL_KINDS["in"]:
                yield from put_through(see, row, rest, door)
            else:
                yield from place(see, row, rest, drawer=drawer, slot=slot, beside=_beside(row, rows))
        elif row.is_knob:
            yield from turn_knob(see, row, rest)
        elif row.kind == _TO_CLOSE:
            yield from push_shut(see, row, rest)
        else:
            yield from pull(see, row, rest)


def _beside(row: GoalRow, rows: list[GoalRow]) -> Vector:
    """(3,) how far off a place's middle a thing stands that has to share it: side by side along x."""
    sharing = [r for r in rows if r.kind == GOAL_KINDS["on"] and np.allclose(r(5, 8), row(5, 8))]
    if row not in sharing:
        return np.zeros(3)
    return (sharing.index(row) - (len(sharing) - 1) / 2) * np.array([_APART_M, 0.0, 0.0])
