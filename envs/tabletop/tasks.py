"""The tasks of the tabletop suites: which goals in which order, before an episode fills in objects and colours.

`a` and `b` are objects of the episode; the other names are fixtures. Left, right, in front and behind are those of the
front camera's picture: left is smaller y, in front is nearer to the camera, which is larger x.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from envs.tabletop.goals import HOLD_STEPS, GoalKind
from envs.tabletop.scene import COLORS

Point = tuple[float, float]


@dataclass(frozen=True)
class Step:
    """One goal of a task, and under which name its phrasings are found."""

    kind: GoalKind
    words: str
    object: str = ""
    """Role of the object that moves: a, b."""
    base: str = ""
    """Role of the object underneath."""
    fixture: str = ""
    """The place, or the thing that opens or is pressed."""
    longest_hold: int = HOLD_STEPS
    """The control steps in a row that it must hold are drawn from `shortest_hold` to this."""
    shortest_hold: int = HOLD_STEPS


@dataclass(frozen=True)
class Task:
    """A sequence of goals in a scene."""

    steps: tuple[Step, ...]
    kind: str = ""
    """Kind of object that `a` is; empty: any."""
    relation: str = ""
    """The relation by which the instruction names `a`; empty: by colour and kind."""
    drawer: float | None = None
    """Opening of the drawer at the start, 0..1; None: open or closed by chance."""
    inside: str = ""
    """The fixture in which `a` lies at the start; empty: it stands on the table."""
    strict: bool = False
    """Buttons light up while a press counts; one that is pressed out of turn, or once too often, ends the episode as a
    failure."""
    flash: Literal["", "wanted", "others"] = ""
    """Instead of that, lamps light up for a moment soon after the start, one after the other: that of the last step's
    button, or those of all but it. When the first step is done all are lit, until the end."""
    told: str = ""
    """The sentences that tell the whole task (`envs.tabletop.language.WHOLE_TASKS`); empty: step by step."""


def _lift(role: str = "a") -> Step:
    return Step(GoalKind.LIFT, "lift", role)


def _on(role: str, fixture: str) -> Step:
    return Step(GoalKind.ON, "on", role, fixture=fixture)


def _in(role: str, fixture: str) -> Step:
    return Step(GoalKind.IN, "in", role, fixture=fixture)


_PUSH = Step(GoalKind.PUSH, "push", "a", fixture="zone")
_STACK = Step(GoalKind.STACK, "stack", "a", base="b")
_OPEN = Step(GoalKind.OPEN, "open", fixture="cabinet")
_CLOSE = Step(GoalKind.CLOSE, "close", fixture="cabinet")
_PRESS = Step(GoalKind.PRESS, "press", fixture="button")
_LEFT, _RIGHT = (Step(GoalKind.PRESS, "press", fixture=f"{side}-button") for side in ("left", "right"))
_LONG_MIDDLE = Step(GoalKind.PRESS, "press", fixture="middle-button", longest_hold=64)
_WAIT = Step(GoalKind.CLOSE, "close", fixture="middle-button", longest_hold=80, shortest_hold=56)
"""Leave the button alone for so long."""

BUTTONS = ("left-button", "middle-button", "right-button")
"""Those of scene "panel", in its order."""
RELATIONS = ("left", "right", "front", "behind", "nearest", "farthest", "between", "leftmost", "rightmost")
_SHAPES = ("cube", "ball", "bottle", "mug", "arch", "pyramid", "brick", "domino")

TASKS: dict[str, Task] = {
    **{f"lift-{relation}": Task((_lift(),), relation=relation) for relation in RELATIONS},
    **{f"bowl-{relation}": Task((_in("a", "bowl"),), relation=relation) for relation in RELATIONS[:6]},
    **{f"lift-{kind}": Task((_lift(),), kind=kind) for kind in _SHAPES},
    **{f"box-{kind}": Task((_in("a", "box"),), kind=kind) for kind in _SHAPES},
    "lift": Task((_lift(),)),
    "plate": Task((_on("a", "plate"),)),
    "bowl": Task((_in("a", "bowl"),)),
    "zone": Task((_on("a", "zone"),)),
    # Each undoes the other: what a robot can practise without anybody to put things back.
    "into-tray": Task((_in("a", "tray"),)),
    "out-of-tray": Task((_on("a", "zone"),), inside="tray"),
    "push": Task((_PUSH,)),
    "stack": Task((_STACK,)),
    "drawer": Task((_in("a", "cabinet"),), drawer=1.0),
    "open": Task((_OPEN,), drawer=0.0),
    "close": Task((_CLOSE,), drawer=1.0),
    "press": Task((_PRESS,)),
    "open-drawer": Task((_OPEN, _in("a", "cabinet")), drawer=0.0),
    "drawer-close": Task((_in("a", "cabinet"), _CLOSE), drawer=1.0),
    "open-drawer-close": Task((_OPEN, _in("a", "cabinet"), _CLOSE), drawer=0.0),
    "press-stack": Task((_PRESS, _STACK)),
    "stack-press": Task((_STACK, _PRESS)),
    "plate-bowl": Task((_on("a", "plate"), _in("b", "bowl"))),
    "push-press": Task((_PUSH, _PRESS)),
    "close-lift": Task((_CLOSE, _lift()), drawer=1.0),
    "press-plate-press": Task((_PRESS, _on("a", "plate"), _PRESS)),
    # What was done before decides what comes next, and no picture shows it.
    "other-button": Task((_LONG_MIDDLE, _LEFT, _LONG_MIDDLE, _RIGHT), strict=True, told="before-each"),
    "press-twice": Task((_LEFT, _LONG_MIDDLE, _LEFT, _LONG_MIDDLE, _RIGHT), strict=True, told="twice"),
    # What was seen for a moment decides what comes long after.
    **{
        f"{name}-{side}": Task(
            (_WAIT, Step(GoalKind.PRESS, "press", fixture=f"{side}-button")),
            strict=True,
            told=name,
            flash=flash,
        )
        for name, flash in (("was-lit", "wanted"), ("not-lit", "others"))
        for side in ("left", "middle", "right")
    },
}


OPPOSITE = {"was-lit": "not-lit", "not-lit": "was-lit"}
"""Sentences (`Task.told`) of which each means what the other one excludes."""


def swapped(task: Task) -> tuple[Step, ...]:
    """The steps with `a` and `b` exchanged; where a task names no object, it asks for the other fixture instead, on a
    panel with left and right exchanged, or, where lamps flash, for the next button (and `OPPOSITE` sentences)."""
    if task.flash:
        *before, last = task.steps
        return (*before, replace(last, fixture=BUTTONS[(BUTTONS.index(last.fixture) + 1) % len(BUTTONS)]))
    other = {"a": "b", "b": "a", "": ""}
    if any(step.object for step in task.steps):
        return tuple(
            Step(step.kind, step.words, other[step.object], other[step.base], step.fixture) for step in task.steps
        )
    pressed = [(step.kind, step.fixture) for step in task.steps]
    outer = {BUTTONS[0]: BUTTONS[-1], BUTTONS[-1]: BUTTONS[0]}
    exchanged = outer if any(fixture in outer for _, fixture in pressed) else {BUTTONS[1]: BUTTONS[0]}
    if any(fixture in exchanged for _, fixture in pressed):
        return tuple(replace(step, fixture=exchanged.get(step.fixture, step.fixture)) for step in task.steps)
    return (_OPEN,) if pressed == [(_PRESS.kind, _PRESS.fixture)] else (_PRESS,)


def novel_color(kind: str, words: str) -> str:
    """The colour in which a thing of `kind` is never the subject of goal `words` in training: one for every pair."""
    return tuple(COLORS)[zlib.crc32(f"{kind} {words}".encode()) % len(COLORS)]


_MARGIN_M = 0.035


def related(relation: str, objects: Sequence[Point], plate: Point, bowl: Point) -> int:
    """Index of the object, among several alike, that a relation to the plate (and the bowl) means; -1 if unclear."""
    if relation in ("nearest", "farthest", "leftmost", "rightmost"):
        if relation in ("nearest", "farthest"):
            values = [math.dist(p, plate) for p in objects]
        else:
            values = [p[1] for p in objects]
        if relation in ("farthest", "rightmost"):
            values = [-v for v in values]
        first, second = sorted(values)[:2]
        return values.index(first) if second - first > _MARGIN_M else -1
    if relation == "between":
        clear = [math.dist(p, nearest_on_segment(p, plate, bowl)) for p in objects]
        inside = [k for k, d in enumerate(clear) if d < 0.03 and _is_inner(objects[k], plate, bowl)]
        return inside[0] if len(inside) == 1 and sorted(clear)[1] > 0.075 else -1
    axis, sign = {"left": (1, -1), "right": (1, 1), "front": (0, 1), "behind": (0, -1)}[relation]
    along = [sign * (p[axis] - plate[axis]) for p in objects]
    across = [abs(p[1 - axis] - plate[1 - axis]) for p in objects]
    clear_ones = [k for k in range(len(objects)) if along[k] > 0.05 and across[k] < 0.8 * along[k]]
    arguable = [k for k in range(len(objects)) if along[k] > 0.02 and across[k] < 1.4 * along[k]]
    return clear_ones[0] if len(arguable) == 1 and clear_ones == arguable else -1


def nearest_on_segment(p: Point, a: Point, b: Point) -> Point:
    """The point of the segment from `a` to `b` that is nearest to `p`."""
    t = ((p[0] - a[0]) * (b[0] - a[0]) + (p[1] - a[1]) * (b[1] - a[1])) / math.dist(a, b) ** 2
    t = min(1.0, max(0.0, t))
    return a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])


def _is_inner(p: Point, a: Point, b: Point) -> bool:
    return max(math.dist(p, a), math.dist(p, b)) < 0.75 * math.dist(a, b)
