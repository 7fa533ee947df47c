"""Goals as data, and the rules of success: batched over environments and free of any simulator.

An episode carries a short sequence of goals, each a kind and the things it names. Every rule is evaluated for every
goal of every world at once and the kind picks the verdict, so no world is looked at alone. The functions use only
operators that numpy arrays and torch tensors share: the same rules judge the CPU and the GPU backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np

LIFT_HEIGHT_M = 0.08
"""An object whose centre is this much above its rest height counts as lifted."""
WRONG_LIFT_HEIGHT_M = 0.05
HOLD_STEPS = 4
"""Control steps in a row that a goal's condition must hold, unless the goal says otherwise."""
_HELD_M = 0.05
_LET_GO_M = 0.03
_LET_GO_OPENING = 0.6
_RESTING_M = 0.012
"""A brick tipped on a plate's rim or a fallen can is not "on" it: height tells."""
_STACK_OFFSET_M = 0.022
_STACK_HEIGHT_M = 0.008
_OPEN, _CLOSED, _PRESSED = 0.8, 0.12, 0.7

Array = Any
"""A numpy array or a torch tensor; every array of one WorldState is of the same sort and on the same device."""


class GoalKind(IntEnum):
    """One goal: its kind, and the objects, places and joints it is about."""

    LIFT = 0  # object: up, and in the gripper
    ON = 1  # object, place: stands on a flat place, let go
    IN = 2  # object, place: lies within a container, let go
    PUSH = 3  # object, place: on the table inside a marked zone; lifting it is a failure
    STACK = 4  # object, base: stands on another object, let go
    OPEN = 5  # joint
    CLOSE = 6  # joint
    PRESS = 7  # joint


LASTING = frozenset({GoalKind.ON, GoalKind.IN, GoalKind.STACK})
"""Kinds that must still hold when the last goal of a sequence is reached."""
_LIFTING = frozenset({GoalKind.LIFT, GoalKind.ON, GoalKind.IN, GoalKind.STACK})


@dataclass(frozen=True)
class Goal:
    """One step of a task. Indices that its kind does not read stay 0."""

    kind: GoalKind
    object: int = 0
    """Scene slot of the object that moves."""
    place: int = 0
    """Number in `SceneIndex.place_body`."""
    base: int = 0
    """Scene slot of the object underneath."""
    joint: int = 0
    """Number in `SceneIndex.joint_qpos`."""
    hold: int = HOLD_STEPS
    """Control steps in a row that it must hold."""


MAX_GOALS = 5
"""Goals in the longest sequence: the width G of the goal arrays."""


@dataclass
class WorldState:
    """The state that the rules read: n environments, K object slots, P places, J joints (both >= 1), G = MAX_GOALS."""

    row: Array  # (n, 1) int: arange, to gather with
    # of the scene
    rest_height: Array  # (K,) height of a standing object's centre, m
    place_radius: Array  # (P,) m
    # of the episode
    active: Array  # (n, K) bool: takes part
    may_lift: Array  # (n, K) bool: lifting it is no mistake
    goal_kind: Array  # (n, G) int, GoalKind
    goal_object: Array  # (n, G) int
    goal_place: Array  # (n, G) int
    goal_base: Array  # (n, G) int
    goal_joint: Array  # (n, G) int
    goal_hold: Array  # (n, G) int: control steps in a row that it must hold
    goal_lasts: Array  # (n, G) bool: must still hold at the end
    num_goals: Array  # (n,) int
    strict: Array  # (n,) bool: pressing a button out of turn is a failure
    # of the instant
    stage: Array  # (n,) int: goal that counts now
    held: Array  # (n,) int: control steps in a row that it has held
    spent: Array  # (n, J) bool: still pressed for a goal already reached; its lamp is lit
    objects: Array  # (n, K, 3) object centres, world frame, m
    places: Array  # (n, P, 3) centre of each place's floor, world frame, m
    joints: Array  # (n, J) 0 closed or released .. 1 open or pressed down
    handles: Array  # (n, J, 3) where a hand takes hold of each joint, world frame, m
    grip: Array  # (n, 3) grip site, m
    finger_opening: Array  # (n,) 0 closed .. 1 open


def empty_state(num_worlds: int, rest_height: np.ndarray, place_radius: np.ndarray, num_joints: int) -> WorldState:
    """A numpy WorldState without episodes: nothing is active and there are no goals."""
    n, slots, goals = num_worlds, len(rest_height), (num_worlds, MAX_GOALS)
    radius = place_radius if len(place_radius) else np.zeros(1)
    joints = max(1, num_joints)

    def index() -> np.ndarray:
        return np.zeros(goals, np.int64)

    return WorldState(
        row=np.arange(n)[:, None], rest_height=rest_height, place_radius=radius,
        active=np.zeros((n, slots), bool), may_lift=np.zeros((n, slots), bool),
        goal_kind=index(), goal_object=index(), goal_place=index(), goal_base=index(), goal_joint=index(),
        goal_hold=index(), goal_lasts=np.zeros(goals, bool), num_goals=np.ones(n, np.int64), strict=np.zeros(n, bool),
        stage=np.zeros(n, np.int64), held=np.zeros(n, np.int64), spent=np.zeros((n, joints), bool),
        objects=np.zeros((n, slots, 3)), places=np.full((n, len(radius), 3), np.nan),
        joints=np.zeros((n, joints)), handles=np.zeros((n, joints, 3)),
        grip=np.zeros((n, 3)), finger_opening=np.ones(n),
    )  # fmt: skip


def write_goals(
    state: WorldState, i: int, goals: tuple[Goal, ...], slots: tuple[int, ...], *, strict: bool = False
) -> None:
    """Give world `i` of a numpy state the goals of a new episode in which the object `slots` take part. `strict`: a
    button that is pressed out of turn, or once too often, ends it as a failure."""
    if not 1 <= len(goals) <= MAX_GOALS:
        raise ValueError(f"an episode has 1 to {MAX_GOALS} goals, got {len(goals)}")
    padded = [*goals, *[goals[-1]] * (MAX_GOALS - len(goals))]
    for name in ("kind", "object", "place", "base", "joint", "hold"):
        getattr(state, f"goal_{name}")[i] = [int(getattr(goal, name)) for goal in padded]
    state.goal_lasts[i] = [g < len(goals) and goal.kind in LASTING for g, goal in enumerate(padded)]
    state.num_goals[i], state.stage[i], state.held[i] = len(goals), 0, 0
    state.strict[i], state.spent[i] = strict, False
    state.active[i] = state.may_lift[i] = False
    state.active[i, list(slots)] = True
    state.may_lift[i, [goal.object for goal in goals if goal.kind in _LIFTING]] = True


def _length(vector: Array) -> Array:
    return (vector**2).sum(-1) ** 0.5


def achieved(state: WorldState) -> Array:
    """(n, G) bool: things are where each goal wants them, whether the gripper is open or not."""
    kind = state.goal_kind
    at = state.objects[state.row, state.goal_object]
    rest = state.rest_height[state.goal_object]
    to_grip = _length(at - state.grip[:, None])
    apart = to_grip > _LET_GO_M

    lifted = (at[..., 2] > rest + LIFT_HEIGHT_M) & (to_grip < _HELD_M)

    place = state.places[state.row, state.goal_place]
    inside = _length(at[..., :2] - place[..., :2]) < state.place_radius[state.goal_place]
    height = at[..., 2] - rest - place[..., 2]
    flat = inside & (abs(height) < _RESTING_M)
    # In a container a thing may also have tipped over, and then its centre is lower than when it stands.
    deep = inside & (height < _RESTING_M) & (height > -rest)

    base = state.objects[state.row, state.goal_base]
    above = at[..., 2] - rest - base[..., 2] - state.rest_height[state.goal_base]
    atop = (_length(at[..., :2] - base[..., :2]) < _STACK_OFFSET_M) & (abs(above) < _STACK_HEIGHT_M)

    joint = state.joints[state.row, state.goal_joint]
    return (
        ((kind == GoalKind.LIFT) & lifted)
        | ((kind == GoalKind.ON) & flat & apart)
        | ((kind == GoalKind.IN) & deep & apart)
        | ((kind == GoalKind.PUSH) & flat)
        | ((kind == GoalKind.STACK) & atop & apart)
        | ((kind == GoalKind.OPEN) & (joint > _OPEN))
        | ((kind == GoalKind.CLOSE) & (joint < _CLOSED))
        | ((kind == GoalKind.PRESS) & (joint > _PRESSED))
    )


def holds(state: WorldState) -> Array:
    """(n, G) bool: each goal's condition is true at this instant. What was put somewhere must have been let go."""
    kind = state.goal_kind
    released = (kind == GoalKind.ON) | (kind == GoalKind.IN) | (kind == GoalKind.STACK)
    return achieved(state) & (~released | (state.finger_opening[:, None] > _LET_GO_OPENING))


def advance(state: WorldState) -> Array:
    """(n,) bool: the whole task is done. Call once per control step: it counts how long the present goal has held and
    moves on to the next (`state.held`, `state.stage` and `state.spent` become new arrays). A button that was pressed
    for one goal must be let go before it counts for the next."""
    last = state.stage >= state.num_goals - 1
    unbroken = (achieved(state) | ~state.goal_lasts).all(-1)
    mine = _buttons(state)
    spent = state.spent & (state.joints > _PRESSED)
    good = current(state, holds(state)) & (unbroken | ~last) & ~(mine & spent).any(-1)
    held = (state.held + 1) * good
    reached = held >= current(state, state.goal_hold)
    step = reached & ~last
    state.spent = spent | (mine & step[:, None])
    state.stage = state.stage + step
    state.held = held * ~step
    return reached & last


def wrong_object(state: WorldState) -> Array:
    """(n,) bool: an object that no goal lifts has been lifted, or in a strict task a button pressed out of turn. Ends
    the episode as a failure."""
    lifted = state.objects[:, :, 2] > state.rest_height[None, :] + WRONG_LIFT_HEIGHT_M
    out_of_turn = (state.joints > _PRESSED) & ~state.spent & ~_buttons(state)
    return (state.active & ~state.may_lift & lifted).any(-1) | (state.strict & out_of_turn.any(-1))


def lit(state: WorldState, i: int, flashes: Sequence[tuple[int, int, int]], elapsed: int) -> list[int]:
    """Joints of world `i` of a numpy state whose lamps are lit after `elapsed` control steps: those whose press has
    counted, until they are let go; or, with the `flashes` of an `Episode`, those, and all once the first goal is
    reached. No lamps are in a task that is not strict."""
    if not state.strict[i]:
        return []
    if not flashes:
        return [int(joint) for joint in np.flatnonzero(state.spent[i])]
    if state.stage[i] > 0:
        return list(range(state.joints.shape[1]))
    return [joint for joint, start, stop in flashes if start <= elapsed < stop]


def _buttons(state: WorldState) -> Array:
    """(n, J) bool: the joint that the present goal wants pressed."""
    number = (state.spent | True).cumsum(-1) - 1  # 0, 1, .. J - 1 in every row
    pressing, joint = current(state, state.goal_kind) == GoalKind.PRESS, current(state, state.goal_joint)
    return pressing[:, None] & (joint[:, None] == number)


def current(state: WorldState, field: Array) -> Array:
    """(n,) the present goal's entry of a (n, G) goal array."""
    return field[state.row[:, 0], state.stage]


PRIVILEGED_DIM = 16
PRIVILEGED_FULL_DIM = 30


def privileged(state: WorldState, gripper: Array, command: Array, xp: ModuleType, *, full: bool) -> Array:
    """(n, 16) or, `full`, (n, 30): the present goal as critics and scripted experts see it, in m and world axes.

    Subject - the goal's object or its joint's handle - (3), subject - grip (3), destination - subject in the plane (2;
    0 without one), rest height, is_place, highest lift of an object not to be lifted, `gripper` command (n,), hold
    counter, `command`ed position (n, 3). Full: one-hot kind (8), height of the destination's floor, its radius, joint
    opening, stage, goals left, 1 if the subject is a handle. `xp` is the arrays' module, numpy or torch.
    """
    kind, joint = current(state, state.goal_kind), current(state, state.goal_joint)
    row, slot, place = state.row[:, 0], current(state, state.goal_object), current(state, state.goal_place)
    articulated = kind >= GoalKind.OPEN
    at = xp.where(articulated[:, None], state.handles[row, joint], state.objects[row, slot])
    rest = xp.where(articulated, xp.zeros_like(state.grip[:, 2]), state.rest_height[slot])
    base = state.objects[row, current(state, state.goal_base)]
    top = base[:, 2] + state.rest_height[current(state, state.goal_base)]
    floor = state.places[row, place]
    placing = (kind == GoalKind.ON) | (kind == GoalKind.IN) | (kind == GoalKind.PUSH)
    stacking = kind == GoalKind.STACK
    goal_xy = xp.where(stacking[:, None], base[:, :2], xp.nan_to_num(floor[:, :2])) - at[:, :2]
    travel = xp.where((placing | stacking)[:, None], goal_xy, xp.zeros_like(goal_xy))
    lift = state.objects[:, :, 2] - state.rest_height
    others = state.active & ~state.may_lift
    columns = [
        at, at - state.grip, travel, rest[:, None], (kind == GoalKind.ON)[:, None],
        xp.amax(xp.where(others, lift, xp.zeros_like(lift)), 1)[:, None], gripper[:, None],
        state.held[:, None] / HOLD_STEPS, command,
    ]  # fmt: skip
    if full:
        height = xp.where(stacking, top, xp.nan_to_num(floor[:, 2]))
        columns += [
            *[(kind == k)[:, None] for k in GoalKind],
            xp.where(placing | stacking, height, xp.zeros_like(height))[:, None], state.place_radius[place][:, None],
            state.joints[row, joint][:, None], state.stage[:, None], (state.num_goals - state.stage)[:, None],
            articulated[:, None],
        ]  # fmt: skip
    return xp.concatenate([column.astype("float32") if xp is np else column.float() for column in columns], 1)
