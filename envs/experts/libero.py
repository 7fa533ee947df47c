"""Scripted expert of LIBERO's tasks of things and places: takes hold from above, carries over, lets go.

It plays what the privileged state names (`envs.adapters.libero_suites.GOAL_DIM`), goal by goal. LIBERO's other goals
(drawers, knobs, doors) it leaves alone.
"""

from __future__ import annotations

import numpy as np

from envs.adapters.libero_suites import GOAL_DIM, GOALS
from envs.experts.script import CLOSED, OPEN, UP, Lost, Script, ScriptedExpert, Sight, Vector, at, go, stay, turned

_ON = 1
"""The kind of a goal whose thing stands on its place."""


class LiberoExpert(ScriptedExpert):
    """Policy of one-step chunks from `envs.adapters.libero_env`'s proprio and privileged state."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(_tidy, lambda proprio: about(np.eye(3), proprio[3:6]), num_envs)


def about(matrix: Vector, vector: Vector) -> Vector:
    """A rotation matrix turned by a rotation vector, both in the world frame."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-9:
        return matrix
    return np.stack([turned(column, vector / angle, angle) for column in matrix.T], axis=1)


def _tidy(see: Sight) -> Script:
    """One thing after another into its place, and again what did not stay there."""
    rest = see.rotation.copy()
    while True:
        goals = see.state[1:].reshape(GOALS, GOAL_DIM)
        open_ones = [k for k in range(GOALS) if goals[k, 0] in (1, 2) and not goals[k, 1]]
        if not open_ones:
            return True
        yield from _place(see, open_ones[0], rest)


def _place(see: Sight, number: int, rest: Vector) -> Script:
    """Take the thing of a goal and let it go in its place."""
    columns = slice(1 + number * GOAL_DIM, 1 + (number + 1) * GOAL_DIM)

    def now(first: int, end: int) -> Vector:
        return see.state[columns][first:end]

    kind, grasp, yaw = now(0, 1)[0], now(11, 14).copy(), now(14, 15)[0]
    bottom, top, rim = now(15, 18)
    hand = about(rest, yaw * UP)

    def grip() -> Vector:
        return now(2, 5) + grasp

    def lost() -> bool:
        return bool(np.linalg.norm(grip() - see.grip) > 0.06)

    clear = (top - grasp[2] + 0.06) * UP
    yield from go(see, lambda: grip() + clear, hand, OPEN, within_m=0.015, within_rad=0.1, steps=100)
    yield from go(see, grip, hand, OPEN, within_m=0.008, within_rad=0.1, steps=60)
    yield from stay(grip, hand, CLOSED, 10)
    # High enough for the thing's bottom to pass over the place's rim.
    lift = max(0.12, now(7, 8)[0] + rim - (now(4, 5)[0] + bottom) + 0.05)
    try:
        above = at(see.grip + lift * UP)
        yield from go(see, above, hand, CLOSED, within_m=0.02, steps=60, lost=lost)
        held, height = now(2, 5) - see.grip, see.grip[2]

        def over(z: float) -> Vector:
            return np.array([*(now(5, 8) - held)[:2], z])

        yield from go(see, lambda: over(height), hand, CLOSED, within_m=0.012, steps=100, lost=lost)
        if kind == _ON:
            ground = now(7, 8)[0] + 0.02 - bottom - held[2]
            yield from go(see, lambda: over(ground), hand, CLOSED, within_m=0.01, steps=40, lost=lost)
    except Lost:
        return False
    yield from stay(at(see.grip), hand, OPEN, 10)
    yield from go(see, at(see.grip + 0.1 * UP), hand, OPEN, within_m=0.02, steps=15)
    yield from stay(at(see.grip), hand, OPEN, 10)
    return True
