"""Episodes: what one seed means. A pure function of (suite, seed, task, phrasings); no simulator here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from envs.seeds import Stream
from envs.tabletop.goals import Goal, GoalKind
from envs.tabletop.language import (
    Phrasings,
    Wording,
    fixture_phrase,
    goal_instruction,
    holds_nothing_back,
    instruction,
    object_phrase,
    related_phrase,
    whole_instruction,
)
from envs.tabletop.layout import Layout, sample_layout
from envs.tabletop.scene import COLORS, SceneConfig, fixture_names, joint_names, place_names
from envs.tabletop.shapes import FIXTURES, FLASH_COLOR, LOW_KINDS, PANEL_COLORS, PLATE_RADIUS_M
from envs.tabletop.suites import Suite
from envs.tabletop.tasks import BUTTONS, OPPOSITE, RELATIONS, Step, Task, novel_color, related, swapped

WORKSPACE_X = (0.43, 0.63)
WORKSPACE_Y = (-0.17, 0.17)
_GAP_OBJECTS_M = 0.085
_GAP_PLATE_M = PLATE_RADIUS_M + 0.045
_SPREAD_M = 0.02
"""How far from the middle of a fixture a thing may lie in it at the start, along each axis."""
_FLASH_STEPS = 16
"""How long a lamp flashes: four decisions of a policy that looks again after four control steps, so that four evenly
spaced ones of a whole wait show about half of the flashes."""
_FIRST_FLASH, _DARK_STEPS = (4, 13), (4, 9)
"""The step at which the first lamp flashes, and the steps until the next one does: from .. below."""
_GAP_PLATES_M = 2 * PLATE_RADIUS_M + 0.02


@dataclass(frozen=True)
class Episode:
    """Everything random about one episode."""

    seed: int
    task: str
    slots: tuple[int, ...]
    """Scene slots that take part."""
    colors: tuple[str, ...]
    """Colour of each, in the order of `slots`."""
    poses: tuple[tuple[float, float, float], ...]
    """(x, y, yaw) of each, metres and radians, world frame."""
    plate_colors: tuple[str, ...]
    plate_xy: tuple[tuple[float, float], ...]
    target: int
    """Scene slot of the object the instruction names."""
    plate: int
    """Plate the instruction names, -1 for none."""
    instruction: str
    template: str
    """The phrasing used, for per-phrasing success."""
    swapped_instruction: str
    """Names another object (and the other plate, if any) than the one counted."""
    goals: tuple[Goal, ...] = ()
    """The goals that count, in this order."""
    swapped_goals: tuple[Goal, ...] = ()
    """The goals that `swapped_instruction` names."""
    fixtures: tuple[tuple[float, float, float], ...] = ()
    """(x, y, yaw) of each of the scene's fixtures, plates apart."""
    fixture_colors: tuple[str, ...] = ()
    openings: tuple[float, ...] = ()
    """Opening of each joint of the scene: 0 closed or released .. 1 open."""
    first_floor: float = 0.0
    """Height of what the first of the slots stands on, m above the table."""
    strict: bool = False
    """A button pressed out of turn ends the episode as a failure (`envs.tabletop.tasks.Task`)."""
    flashes: tuple[tuple[int, int, int], ...] = ()
    """Lamps that are lit for a moment: joint, and the control steps from which and before which (`Task.flash`)."""


def _sample_layout(rng: np.random.Generator, num_plates: int, num_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Plate and object positions by rejection, (M, 2) and (K, 2): nothing touches anything."""
    while True:
        plates: list[np.ndarray] = []
        objects: list[np.ndarray] = []
        for _ in range(200):
            p = np.array([rng.uniform(*WORKSPACE_X), rng.uniform(*WORKSPACE_Y)])
            if len(plates) < num_plates:
                if all(np.linalg.norm(p - q) > _GAP_PLATES_M for q in plates):
                    plates.append(p)
            elif all(np.linalg.norm(p - q) > _GAP_PLATE_M for q in plates) and all(
                np.linalg.norm(p - q) > _GAP_OBJECTS_M for q in objects
            ):
                objects.append(p)
            if len(objects) == num_objects:
                return np.array(plates).reshape(-1, 2), np.array(objects)


def sample_episode(
    suite: Suite, scene: SceneConfig, seed: int, *, task: str | None = None, phrasings: Phrasings = "train"
) -> Episode:
    """The episode that `seed` means in `suite`. Scene and target do not depend on `phrasings`, only the words do; but
    "novel" also changes the colours, to those that are kept out of every other episode
    (`envs.tabletop.tasks.novel_color`)."""
    if task is not None and task not in suite.tasks:
        raise ValueError(f"suite {suite.name!r} has no task {task!r}; it has: {', '.join(suite.tasks)}")
    if phrasings == "novel" and (not scene.fixtures or PANEL_COLORS.keys() & {*scene.fixtures}):
        raise holds_nothing_back(suite.name)
    return (_sample_goals if scene.fixtures else _sample_pick_place)(suite, scene, seed, task, phrasings)


def _sample_pick_place(suite: Suite, scene: SceneConfig, seed: int, task: str | None, phrasings: Phrasings) -> Episode:
    """An episode of the pick and place suites. Its order of draws is frozen, and another one than `_sample_goals`'."""
    rng = np.random.default_rng([seed, Stream.PICK_PLACE_SCENE])
    task = task or suite.tasks[rng.integers(len(suite.tasks))]
    slots = rng.permutation(len(scene.objects))[: suite.objects_per_episode]
    colors = rng.permutation(list(COLORS))[: len(slots)]
    plate_colors = rng.permutation(list(COLORS))[: suite.plates_per_episode]
    plates, objects = _sample_layout(rng, len(plate_colors), len(slots))
    yaws = rng.uniform(-0.5, 0.5, len(slots))
    chosen, other = rng.permutation(len(slots))[:2]
    plate = int(rng.integers(len(plate_colors))) if task == "place" else -1
    other_plate = (plate + 1) % len(plate_colors) if plate >= 0 else -1

    words = np.random.default_rng([seed, Stream.WORDS])
    kinds = [scene.objects[s] for s in slots]
    plate_color = str(plate_colors[plate]) if plate >= 0 else None
    other_color = str(plate_colors[other_plate]) if plate >= 0 else None
    text, template = instruction(task, (str(colors[chosen]), kinds[chosen]), plate_color, words, phrasings)
    swapped, _ = instruction(task, (str(colors[other]), kinds[other]), other_color, words, phrasings)
    return Episode(
        seed=seed,
        task=task,
        slots=tuple(int(s) for s in slots),
        colors=tuple(str(c) for c in colors),
        poses=tuple((float(x), float(y), float(w)) for (x, y), w in zip(objects, yaws, strict=True)),
        plate_colors=tuple(str(c) for c in plate_colors),
        plate_xy=tuple((float(x), float(y)) for x, y in plates),
        target=int(slots[chosen]),
        plate=plate,
        instruction=text,
        template=template,
        swapped_instruction=swapped,
        goals=(_pick_or_place(int(slots[chosen]), plate),),
        swapped_goals=(_pick_or_place(int(slots[other]), other_plate),),
    )


def _pick_or_place(slot: int, plate: int) -> Goal:
    return Goal(GoalKind.LIFT, slot) if plate < 0 else Goal(GoalKind.ON, slot, place=plate)


def _sample_goals(suite: Suite, scene: SceneConfig, seed: int, task: str | None, phrasings: Phrasings) -> Episode:
    """An episode of the suites whose scenes have fixtures: tasks are sequences of goals (`envs.tabletop.tasks`)."""
    rng = np.random.default_rng([seed, Stream.GOAL_SCENE])
    drawn = suite.tasks[rng.integers(len(suite.tasks))]
    name = task or drawn
    plan = suite.task(name)
    fixtures = [kind for _, kind in fixture_names(scene)]
    slots = _choose_slots(rng, plan, scene.objects, suite.objects_per_episode)
    layout = sample_layout(rng, plan, fixtures, len(slots))
    yaws = rng.uniform(-0.5, 0.5, len(slots))
    openings = [float(rng.random() < 0.5) if kind == "cabinet" else 0.0 for _, kind in joint_names(scene)]
    if plan.drawer is not None:
        openings = [plan.drawer if kind == "cabinet" else 0.0 for _, kind in joint_names(scene)]
    roles = dict(zip("ab", slots, strict=False))
    colors = _choose_colors(rng, plan, [scene.objects[s] for s in slots], fixtures, novel=phrasings == "novel")
    object_colors, fixture_colors = colors[: len(slots)], dict(zip(fixtures, colors[len(slots) :], strict=True))

    words = np.random.default_rng([seed, Stream.WORDS])
    relations = relations_of(plan, layout, fixtures) if plan.relation else ("", "")

    named = {role: (object_colors[slots.index(slot)], scene.objects[slot]) for role, slot in roles.items()}
    said = partial(tell, named=named, fixture_colors=fixture_colors, words=words, phrasings=phrasings)
    text, template = said(plan.steps, relation=relations[0], told=plan.told)
    other_text, _ = said(swapped(plan), relation=relations[1], told=OPPOSITE.get(plan.told, plan.told))
    goals = _held(goals_of(plan.steps, roles, scene), plan.steps, np.random.default_rng([seed, Stream.HOLD_TIMES]))
    poses = [(x, y, float(w)) for (x, y), w in zip(layout.objects, yaws, strict=True)]
    floor = 0.0
    if plan.inside:
        (x, y, _), floor = layout.fixtures[fixtures.index(plan.inside)], FIXTURES[plan.inside].place[0]
        dx, dy = np.random.default_rng([seed, Stream.INSIDE]).uniform(-_SPREAD_M, _SPREAD_M, 2)
        poses[0] = (x + float(dx), y + float(dy), poses[0][2])
    placed = [goal.place for goal in goals if goal.kind in (GoalKind.ON, GoalKind.IN, GoalKind.PUSH)]
    plates = scene.num_plates
    return Episode(
        seed=seed,
        task=name,
        slots=slots,
        colors=tuple(object_colors),
        poses=tuple(poses),
        plate_colors=tuple(fixture_colors[kind] for kind in fixtures[:plates]),
        plate_xy=tuple((x, y) for x, y, _ in layout.fixtures[:plates]),
        target=goals[0].object,
        plate=placed[0] if placed else -1,
        instruction=text,
        template=template,
        swapped_instruction=other_text,
        goals=goals,
        swapped_goals=goals_of(swapped(plan), roles, scene),
        fixtures=layout.fixtures[plates:],
        fixture_colors=tuple(fixture_colors[kind] for kind in fixtures[plates:]),
        openings=tuple(openings),
        first_floor=floor,
        strict=plan.strict,
        flashes=_flashes(plan, goals[-1].joint, np.random.default_rng([seed, Stream.FLASHES])),
    )


def continued(
    episode: Episode, suite: Suite, scene: SceneConfig, task: str, *, seed: int, phrasings: Phrasings = "train"
) -> Episode:
    """The same things with the goals of another task of the suite, which is to begin where they are now; `seed` draws
    the words. ValueError for a task that asks for other things, or a scene without fixtures."""
    if not scene.fixtures or task not in suite.tasks:
        raise ValueError(f"suite {suite.name!r} has no task {task!r} that could go on in the same scene")
    plan = suite.task(task)
    if plan.kind or plan.relation or plan.strict:
        raise ValueError(f"task {task!r} asks for things that an episode has not set out: it cannot go on in its scene")
    fixtures = [kind for _, kind in fixture_names(scene)]
    roles = dict(zip("ab", episode.slots, strict=False))
    named = {role: (episode.colors[k], scene.objects[slot]) for k, (role, slot) in enumerate(roles.items())}
    colors = dict(zip(fixtures, (*episode.plate_colors, *episode.fixture_colors), strict=True))
    words = np.random.default_rng([seed, Stream.WORDS])
    text, template = tell(plan.steps, named, colors, words, phrasings)
    other_text, _ = tell(swapped(plan), named, colors, words, phrasings)
    goals = goals_of(plan.steps, roles, scene)
    return replace(
        episode, task=task, instruction=text, template=template, swapped_instruction=other_text, goals=goals,
        swapped_goals=goals_of(swapped(plan), roles, scene), target=goals[0].object,
    )  # fmt: skip


def tell(
    steps: tuple[Step, ...],
    named: dict[str, tuple[str, str]],
    fixture_colors: dict[str, str],
    words: np.random.Generator,
    phrasings: Wording = "train",
    *,
    relation: str = "",
    told: str = "",
) -> tuple[str, str]:
    """(instruction, template) for goals about the objects that `named` gives, (colour, kind) by role, and fixtures of
    these colours; with a `relation`, it and not the colour tells the object. `told`: as in `Task`."""
    if told:
        fixtures = [step.fixture for step in steps]
        return whole_instruction(told, fixtures, fixture_colors[fixtures[0]], words, phrasings)

    def name_of(role: str) -> str:
        if not relation:
            return object_phrase(*named[role], words, phrasings)
        return related_phrase(relation, *named[role], fixture_colors["plate"], fixture_colors["bowl"], words, phrasings)

    filled = [
        (
            step.words,
            {
                "o": name_of(step.object) if step.object else "",
                "b": name_of(step.base) if step.base else "",
                "f": fixture_phrase(fixture_colors[step.fixture], step.fixture, words, phrasings)
                if step.fixture
                else "",
            },
        )
        for step in steps
    ]
    return goal_instruction(filled, words, phrasings)


def _choose_slots(rng: np.random.Generator, plan: Task, kinds: tuple[str, ...], count: int) -> tuple[int, ...]:
    """Slots of `count` objects: first the task's `a`, then `b`, then the other objects of the scene."""
    low = any(step.fixture == "cabinet" and step.object for step in plan.steps)
    order = [int(slot) for slot in rng.permutation(len(kinds)) if not low or kinds[slot] in LOW_KINDS]
    if plan.kind:
        order.sort(key=lambda slot: kinds[slot] != plan.kind)
    return tuple(order[:count])


def _choose_colors(
    rng: np.random.Generator, plan: Task, objects: list[str], fixtures: list[str], *, novel: bool
) -> list[str]:
    """Colours of the objects (all different, but all alike where a relation tells them apart), then of the fixtures.
    Nothing is the subject of a goal in the colour held back for that, except the first subject of a "novel" episode.
    The buttons of a panel have colours of their own, and nothing else has those."""
    if PANEL_COLORS.keys() & {*fixtures}:
        others = [color for color in COLORS if color not in PANEL_COLORS.values()]
        others = [color for color in others if not plan.flash or color != FLASH_COLOR]
        return [str(rng.choice(others)) for _ in objects] + [PANEL_COLORS[kind] for kind in fixtures]
    things = [*objects, *fixtures]
    held_back: dict[int, list[str]] = {}
    for step in plan.steps:
        thing = "ab".index(step.object) if step.object else len(objects) + fixtures.index(step.fixture)
        held_back.setdefault(thing, []).append(held_back_color(things[thing], step, plan.relation))
    first, *_ = held_back
    while True:
        if plan.relation:
            colors = [str(rng.choice(list(COLORS)))] * len(objects)
        else:
            colors = [str(c) for c in rng.permutation(list(COLORS))[: len(objects)]]
        colors += [str(c) for c in rng.choice(list(COLORS), len(fixtures))]
        if novel and colors[first] == held_back[first][0]:
            return colors
        if not novel and all(colors[thing] not in ones for thing, ones in held_back.items()):
            return colors


def held_back_color(kind: str, step: Step, relation: str = "") -> str:
    """The colour in which a thing of `kind` is the subject of no such step outside "novel" episodes."""
    return novel_color(kind, f"{step.words} {relation}" if relation else f"{step.words} {step.fixture}")


def relations_of(plan: Task, layout: Layout, fixtures: list[str]) -> tuple[str, str]:
    """(the task's relation, one that means `b`), both clear in this layout."""
    plate, bowl = (layout.fixtures[fixtures.index(kind)][:2] for kind in ("plate", "bowl"))
    for relation in RELATIONS:
        if related(relation, layout.objects, plate, bowl) == 1:
            return plan.relation, relation
    raise AssertionError("sample_layout returns no layout without a name for b")


def _held(goals: tuple[Goal, ...], steps: tuple[Step, ...], rng: np.random.Generator) -> tuple[Goal, ...]:
    """The goals, each to be held for as long as its step says."""
    times = [int(rng.integers(step.shortest_hold, step.longest_hold + 1)) for step in steps]
    return tuple(replace(goal, hold=time) for goal, time in zip(goals, times, strict=True))


def _flashes(plan: Task, wanted: int, rng: np.random.Generator) -> tuple[tuple[int, int, int], ...]:
    """`Episode.flashes` of a task on a panel whose last step presses the joint `wanted`."""
    joints = {"": [], "wanted": [wanted], "others": [k for k in range(len(BUTTONS)) if k != wanted]}[plan.flash]
    start, flashes = int(rng.integers(*_FIRST_FLASH)), []
    for joint in rng.permutation(joints):
        flashes.append((int(joint), start, start + _FLASH_STEPS))
        start += _FLASH_STEPS + int(rng.integers(*_DARK_STEPS))
    return tuple(flashes)


def goals_of(steps: tuple[Step, ...], roles: dict[str, int], scene: SceneConfig) -> tuple[Goal, ...]:
    """The goals of these steps in `scene`; `roles` gives the slot of each object."""
    places = [kind for _, kind in place_names(scene)]
    joints = [kind for _, kind in joint_names(scene)]
    return tuple(
        Goal(
            step.kind,
            object=roles.get(step.object, 0),
            base=roles.get(step.base, 0),
            place=places.index(step.fixture) if step.object and step.fixture else 0,
            joint=0 if step.object else joints.index(step.fixture),
        )
        for step in steps
    )
