"""Questions about an episode under way, and the answers that the simulator's state gives: what a policy that talks is
asked (`vla.model.talking.talker`).

Only what is true beyond argument is asked: a thing that stands between "left" and "middle" is not asked about. Left is
left in the front camera's picture, as in the instructions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from envs.backends.cpu_worlds import TabletopWorlds
from envs.tabletop import goals as rules
from envs.tabletop.episodes import Episode
from envs.tabletop.goals import Goal, GoalKind
from envs.tabletop.language import KIND_WORDS
from envs.tabletop.scene import REST_HEIGHT_M, SCENES, joint_names, place_names
from envs.tabletop.suites import Suite

TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "object": {
        "train": (
            "which object", "which thing", "what are you asked to handle", "what is your target", "what is it about",
            "which object is meant", "which thing were you told to handle", "what should you handle",
            "name the object", "which item is it", "what is the task about", "tell me which object",
        ),
        "heldout": ("which one",),
    },
    "doing": {
        "train": (
            "what are you doing", "what are you up to", "tell me what you do", "what do you do", "what is going on",
            "what is happening", "what is happening right now", "describe what you do", "say what you are doing",
            "what is the robot doing", "what are you busy with", "what are you working on", "what is your hand doing",
            "what are you doing at the moment",
        ),
        "heldout": ("what are you doing now",),
    },
    "done": {
        "train": (
            "is it done", "are you done", "is the task done", "have you finished", "is it finished",
            "are you finished", "is the work done", "is your work finished", "is the task complete", "did you finish",
            "is everything done", "is that all done",
        ),
        "heldout": ("is the job done",),
    },
    "held": {
        "train": (
            "what is in the gripper", "what are you holding", "what is in your hand", "what does the gripper hold",
            "what is the gripper holding", "what do you have in the gripper", "what have you got in your hand",
            "what is between your fingers", "which object is in the gripper", "what have you grasped",
            "which thing are you holding", "what does your hand hold",
        ),
        "heldout": ("what do you hold",),
    },
    "where": {
        "train": (
            "where is {x}", "tell me where {x} is", "where can i find {x}", "where does {x} lie", "where is {x} now",
            "say where {x} is", "where on the table is {x}", "in which place is {x}", "what is the place of {x}",
            "where do i find {x}", "show me where {x} is", "can you tell where {x} is",
        ),
        "heldout": ("where do you see {x}",),
    },
    "beside": {
        "train": (
            "what is {side} of {x}", "what is to the {side} of {x}", "what lies {side} of {x}",
            "what lies to the {side} of {x}", "which things are {side} of {x}",
            "which objects are to the {side} of {x}",
            "tell me what is {side} of {x}", "what is there {side} of {x}", "name what is {side} of {x}",
            "what can be found {side} of {x}", "what is on the {side} side of {x}",
            "to the {side} of {x} what is there",
        ),
        "heldout": ("what stands {side} of {x}",),
    },
}  # fmt: skip
"""Wordings of each kind of question: those of training, and those that only a test has."""
KINDS = tuple(TEMPLATES)
NOTHING = "nothing"
_SIDE_M, _CLEAR_M = 0.055, 0.015
"""Where the middle of the table ends, and how far from there a thing stands clearly, m."""
_APART_M = 0.025
"""Sideways distance from which on one thing is clearly left of another, m."""
_GRASPED_M, _EMPTY = 0.03, 0.2
"""Distance of a held thing from the grip, m, and the opening of fingers that have closed on nothing (0 .. 1 open)."""
_GRASP_CLEAR_M, _EMPTY_CLEAR = 0.006, 0.08
"""How far from these bounds it is clear whether a thing is held."""
_LIFT_CLEAR_M, _PLACE_CLEAR_M, _JOINT_CLEAR = 0.008, 0.005, 0.05
"""How far things may be from where they are, upwards, sideways and in a joint's opening (0 .. 1), with a task done or
not done all the same: within a few millimetres no picture tells."""
_ON = {"plate": "on", "zone": "on", "bowl": "in", "box": "in", "cabinet": "in"}
_WORDS = {"cabinet": "drawer"}


@dataclass(frozen=True)
class Asked:
    """A question of one of `KINDS`, and its true answer."""

    kind: str
    question: str
    answer: str


def askable(suite: object) -> str | None:
    """Why this suite's episodes cannot be asked about, in a sentence; None for one that can."""
    name = getattr(suite, "name", suite)
    if not isinstance(suite, Suite):
        return f"suite {name!r} is another simulator's: questions about episodes are for the tabletop suites"
    if SCENES[suite.scene].fixtures and any(suite.task(task).relation for task in suite.tasks):
        return f"suite {name!r} has things that look alike: no answer could name one of them"
    return None


class Moment:
    """The simulator's knowledge of one environment at this instant."""

    def __init__(self, worlds: TabletopWorlds, world: int, episode: Episode) -> None:
        """`episode`: whose goals count, where the environment itself plays others."""
        self.worlds, self.i, self.episode = worlds, world, episode
        scene, state = worlds.scene, worlds.state
        self.kinds = scene.objects
        self.names = {
            slot: f"the {color} {KIND_WORDS[self.kinds[slot]][0]}"
            for slot, color in zip(episode.slots, episode.colors, strict=True)
        }
        plates = len(episode.plate_colors)
        kinds = [kind for _, kind in place_names(scene)]
        named = [k for k, kind in enumerate(kinds) if kind != "plate" or k < plates]
        self.place_kinds = {k: kinds[k] for k in named}
        self.places = {
            k: f"the {episode.plate_colors[k]} plate" if kinds[k] == "plate" and plates > 1 else _thing(kinds[k])
            for k in named
        }
        self.joints = [_thing(kind) for _, kind in joint_names(scene)]
        self.at: dict[str, np.ndarray] = {name: state.objects[world, slot] for slot, name in self.names.items()}
        self.at |= {name: state.places[world, k] for k, name in self.places.items() if kinds[k] != "cabinet"}
        self.at |= {name: state.handles[world, k] for k, name in enumerate(self.joints)}
        self.held, self.held_clear = self._held()

    @property
    def goal(self) -> Goal:
        """The goal that counts now."""
        return self.episode.goals[min(int(self.worlds.state.stage[self.i]), len(self.episode.goals) - 1)]

    def object_named(self) -> str:
        """The thing that the present goal handles."""
        goal = self.goal
        return self.joints[goal.joint] if goal.kind >= GoalKind.OPEN else self.names[goal.object]

    def done(self) -> bool:
        """Things are where the last goal, and those that must last, want them."""
        return self._done(self.worlds.state)

    def done_clear(self) -> bool:
        """It would be said to be done, or not, all the same if things stood some millimetres elsewhere."""
        state = self.worlds.state
        up, aside = _LIFT_CLEAR_M, _PLACE_CLEAR_M
        if self.goal.kind == GoalKind.LIFT:
            shifts = [(0.0, 0.0, up), (0.0, 0.0, -up)]
        else:
            shifts = [(aside, 0.0, 0.0), (-aside, 0.0, 0.0), (0.0, aside, 0.0), (0.0, -aside, 0.0)]
        moved = [replace(state, objects=state.objects + np.array(shift)) for shift in shifts]
        moved += [replace(state, joints=state.joints + turn) for turn in (_JOINT_CLEAR, -_JOINT_CLEAR)]
        done = self.done()
        return all(self._done(one) == done for one in moved)

    def _done(self, state: rules.WorldState) -> bool:
        goals = self.episode.goals
        if state.stage[self.i] < len(goals) - 1:
            return False
        achieved = rules.achieved(state)[self.i]
        lasting = [achieved[g] for g, goal in enumerate(goals[:-1]) if goal.kind in rules.LASTING]
        return bool(achieved[len(goals) - 1] and all(lasting))

    def doing(self) -> str | None:
        """An account of what the robot does; None while it handles nothing and nobody can say what it is after."""
        goal, held = self.goal, self.held
        if self.done():
            return "it is done"
        if held >= 0 and (goal.kind >= GoalKind.OPEN or held != goal.object):
            return f"holding {self.names[held]}"
        if goal.kind >= GoalKind.OPEN:
            return {GoalKind.OPEN: "opening", GoalKind.CLOSE: "closing", GoalKind.PRESS: "pressing"}[
                goal.kind
            ] + f" {self.joints[goal.joint]}"
        if goal.kind == GoalKind.PUSH:
            return f"pushing {self.names[goal.object]} to {self.places[goal.place]}"
        if held < 0:
            return f"reaching for {self.names[goal.object]}"
        if goal.kind == GoalKind.LIFT:
            return f"lifting {self.names[held]}"
        to = self.names[goal.base] if goal.kind == GoalKind.STACK else self.places[goal.place]
        return f"carrying {self.names[held]} to {to}"

    def where(self, name: str) -> str | None:
        """Where a thing is; None where that is open to argument."""
        slot = next((slot for slot, own in self.names.items() if own == name), None)
        if slot is not None and slot == self.held:
            return "in the gripper" if self.held_clear else None
        if slot is not None:
            place, clear = self._lies(slot)
            if not clear:
                return None
            if place is not None:
                return f"{_ON[self.place_kinds[place]]} {self.places[place]}"
        y = float(self.at[name][1])
        if abs(abs(y) - _SIDE_M) < _CLEAR_M:
            return None
        return "in the middle" if abs(y) < _SIDE_M else "on the left" if y < 0 else "on the right"

    def beside(self, name: str, side: str) -> str | None:
        """The objects on one side of a thing, from left to right; None where that is open to argument."""
        far = {other: float(self.at[other][1] - self.at[name][1]) for other in self.names.values() if other != name}
        if any(abs(offset) < _APART_M for offset in far.values()):
            return None
        wanted = sorted((offset, other) for other, offset in far.items() if (offset < 0) == (side == "left"))
        if any(b - a < _APART_M for (a, _), (b, _) in itertools.pairwise(wanted)):
            return None  # nobody would say which of them comes first
        return " and ".join(other for _, other in wanted) or NOTHING

    def ask(
        self, rng: np.random.Generator, wording: str = "train", *, strays: bool = False, of: int = 2
    ) -> list[Asked]:
        """One question of each kind that has a clear answer, `of` of "where" and "beside". `strays`: the robot is after
        something else than it is told, so that what it does is clear only from what it holds."""

        def say(kind: str, answer: str | None, **names: str) -> list[Asked]:
            among = TEMPLATES[kind][wording]
            text = among[rng.integers(len(among))].format(**names)
            return [] if answer is None else [Asked(kind, text, answer)]

        done_clear = self.done_clear()
        unclear = not done_clear or not self.held_clear or (strays and self.held < 0)
        asked = [
            *say("object", self.object_named()),
            *say("doing", None if unclear else self.doing()),
            *say("done", ("yes" if self.done() else "no") if done_clear else None),
            *say("held", self.names.get(self.held, NOTHING) if self.held_clear else None),
        ]
        for name in list(rng.permutation(list(self.at)))[:of]:
            asked += say("where", self.where(str(name)), x=str(name))
        sides = [(name, side) for name in self.at for side in ("left", "right")]
        for k in rng.permutation(len(sides))[:of]:
            name, side = sides[k]
            asked += say("beside", self.beside(name, side), x=name, side=side)
        return asked

    def _held(self) -> tuple[int, bool]:
        """(slot of what is between fingers that were told to close, or -1; whether that is clear). Around a brick they
        stand nearly open."""
        state = self.worlds.state
        slots, opening = list(self.episode.slots), float(state.finger_opening[self.i])
        far = np.linalg.norm(state.objects[self.i, slots] - state.grip[self.i], axis=1)
        nearest = int(np.argmin(far))
        near = float(far[nearest])
        if self.worlds._gripper[self.i] > 0 or opening < _EMPTY - _EMPTY_CLEAR or near > _GRASPED_M + _GRASP_CLEAR_M:
            return -1, True
        clear = abs(opening - _EMPTY) > _EMPTY_CLEAR and abs(near - _GRASPED_M) > _GRASP_CLEAR_M
        return (slots[nearest] if opening >= _EMPTY and near < _GRASPED_M else -1), clear

    def _lies(self, slot: int) -> tuple[int | None, bool]:
        """(the place that an object lies on or in, whether that is clear)."""
        state = self.worlds.state
        at = state.objects[self.i, slot]
        for k in self.places:
            to_place = at - state.places[self.i, k]
            if np.hypot(*to_place[:2]) < state.place_radius[k] + 0.01:
                inside = np.hypot(*to_place[:2]) < state.place_radius[k]
                return k, bool(inside and to_place[2] < REST_HEIGHT_M[self.kinds[slot]] + 0.012)
        return None, bool(at[2] < REST_HEIGHT_M[self.kinds[slot]] + 0.012)


def _thing(kind: str) -> str:
    return f"the {_WORDS.get(kind, kind)}"
