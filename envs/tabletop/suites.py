"""Suites: which tasks, how many objects, what horizon. Data in `sim_configs/suites/*.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from envs.seeds import SCENE_RANGES
from envs.tabletop.goals import MAX_GOALS, GoalKind
from envs.tabletop.language import GOAL_TEMPLATES, WHOLE_TASKS
from envs.tabletop.scene import COLORS, SCENES, SceneConfig, fixture_names, joint_names, place_names
from envs.tabletop.shapes import LOW_KINDS
from envs.tabletop.tasks import BUTTONS, OPPOSITE, RELATIONS, TASKS, Step, Task
from vla.core.config import decode, lookup
from vla.core.paths import SIM_CONFIGS
from vla.core.types import PlanarSymmetry

_PLAIN_TASKS = ("pick", "place")
"""The tasks of a scene without fixtures."""
_LEFT, _MIDDLE, _RIGHT = BUTTONS
_FLASHES = {"was-lit": "wanted", "not-lit": "others"}
"""The lamps that flash (`Task.flash`) where these sentences tell the task."""
_ORDERS = {
    "before-each": (
        (_MIDDLE, _LEFT, _MIDDLE, _RIGHT), (_LEFT, _MIDDLE, _LEFT, _RIGHT), (_RIGHT, _MIDDLE, _RIGHT, _LEFT),
    ),
    "twice": ((_LEFT, _MIDDLE, _LEFT, _MIDDLE, _RIGHT), (_RIGHT, _MIDDLE, _RIGHT, _MIDDLE, _LEFT)),
}  # fmt: skip
"""The presses that other sentences for a whole task tell."""


class AnySuite(Protocol):
    """The facts that every suite has, ours or an adapter's."""

    @property
    def name(self) -> str:
        """The name by which `envs.registry.load_suite` finds it."""
        ...

    @property
    def description(self) -> str:
        """One line for lists of suites."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks."""
        ...

    @property
    def horizon(self) -> int:
        """Control steps after which an episode is truncated."""
        ...

    @property
    def eval_seed0(self) -> int:
        """First seed of its evaluation."""
        ...

    @property
    def num_views(self) -> int:
        """Number of cameras."""
        ...

    @property
    def plane(self) -> PlanarSymmetry | None:
        """The planar symmetry of its state, or None."""
        ...

    def summary(self, per_task: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Rates that an evaluation report adds to the success rates per task, such as published rates per group."""
        ...


@dataclass(frozen=True)
class Suite:
    """One benchmark: a scene, the tasks drawn in it, and its evaluation seeds."""

    name: str
    description: str
    scene: str
    tasks: tuple[str, ...]
    objects_per_episode: int
    plates_per_episode: int
    horizon: int
    eval_seed0: int
    num_views: int = 2
    new_tasks: tuple[tuple[str, Task], ...] = ()
    """Tasks that the suite's own file describes, by name."""

    def task(self, name: str) -> Task:
        """The task called `name`, of this suite's own or of `envs.tabletop.tasks.TASKS`."""
        return dict(self.new_tasks).get(name) or TASKS[name]

    @property
    def plane(self) -> PlanarSymmetry:
        """The columns of `envs.tabletop.goals.privileged` and `envs.backends.cpu_worlds.PROPRIO_NAMES` in the
        plane of the table."""
        return PlanarSymmetry(
            hand=(0, 1), hand_offsets=((3, 4),), places=((0, 1), (13, 14)), offsets=((3, 4), (6, 7)),
            turns=not SCENES[self.scene].fixtures,
        )  # fmt: skip

    def summary(self, per_task: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """See `AnySuite.summary`."""
        return {}


def suite_names() -> tuple[str, ...]:
    """Names of every suite file, sorted."""
    return tuple(sorted(path.stem for path in (SIM_CONFIGS / "suites").glob("*.toml")))


def read_suite(path: Path) -> Suite:
    """The suite in a TOML file, called by the file's name without its ending. Its fields are those of `Suite`.

    `[new_tasks.NAME]` tables describe tasks with the fields of `envs.tabletop.tasks.Task`; a step's `kind` is the name
    of a `GoalKind`, in small letters, and its `words` are the kind's if left out. ValueError naming the file and what
    is wrong with it.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        if "name" in raw:
            raise ValueError("a suite is called as its file is: leave 'name' out")
        described = _table(raw.pop("new_tasks", {}), "new_tasks")
        new = {name: _with_goal_kinds(name, task) for name, task in described.items()}
        suite = decode(Suite, {**raw, "name": path.stem, "new_tasks": list(new.items())})
        _check_tasks(suite)
        _check_numbers(suite, SCENES[suite.scene])
    except FileNotFoundError:
        raise ValueError(f"there is no suite file {path}") from None
    except ValueError as problem:  # tomllib's errors are ValueErrors, too
        raise ValueError(f"suite file {path}: {problem}") from None
    return suite


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table, got {value!r}")
    return value


def _with_goal_kinds(name: str, task: Any) -> dict[str, Any]:
    kinds = {kind.name.lower(): kind for kind in GoalKind}
    steps, given = [], _table(task, f"new_tasks.{name}").get("steps", ())
    if not isinstance(given, list | tuple):
        raise ValueError(f"new_tasks.{name}.steps must be a list, got {given!r}")
    for step in given:
        _table(step, f"a step of new_tasks.{name}")
        words = str(step.get("kind", ""))
        steps.append({"words": words, **step, "kind": lookup(words, kinds, f"kind of goal in task {name}")})
    return {**task, "steps": steps}


def _check_tasks(suite: Suite) -> None:
    """ValueError for a scene that there is not, a task that nothing describes, or one that its scene cannot hold."""
    scene = lookup(suite.scene, SCENES, "scene")
    if not scene.fixtures:
        for name in suite.tasks:
            lookup(name, dict.fromkeys(_PLAIN_TASKS), f"task of scene {suite.scene!r}")
    for name, _ in suite.new_tasks:
        if not scene.fixtures:
            raise ValueError(
                f"scene {suite.scene!r} has tasks of its own only, {' and '.join(_PLAIN_TASKS)}: leave out "
                f"new_tasks.{name}, or choose a scene with fixtures"
            )
        if suite.tasks and name not in suite.tasks:
            raise ValueError(f"new_tasks.{name} is drawn in no episode: name it in tasks, or leave it out")
    if not scene.fixtures:
        return
    fixtures = {kind: kind for _, kind in fixture_names(scene)}
    for name in suite.tasks:
        task = lookup(name, {**TASKS, **dict(suite.new_tasks)}, "task")
        if task.kind:
            lookup(task.kind, dict.fromkeys(scene.objects), f"kind of object in scene {suite.scene!r} for task {name}")
        if task.relation:
            lookup(task.relation, dict.fromkeys(RELATIONS), f"relation of task {name}")
        if task.inside:
            holding = {kind: kind for _, kind in place_names(scene)}
            lookup(task.inside, holding, f"place in scene {suite.scene!r} for task {name}")
        if task.drawer is not None and not 0 <= task.drawer <= 1:
            raise ValueError(f"drawer of task {name} must be from 0 to 1, got {task.drawer:g}")
        if not 1 <= len(task.steps) <= MAX_GOALS:
            raise ValueError(f"task {name} must have 1 to {MAX_GOALS} steps, it has {len(task.steps)}")
        if task.told:
            lookup(task.told, WHOLE_TASKS, f"sentences of task {name}")
            sides = BUTTONS if task.told in OPPOSITE else (BUTTONS[0], BUTTONS[-1])
            if not any(step.fixture in sides for step in task.steps):
                raise ValueError(f"task {name}: sentences '{task.told}' are about the buttons of scene 'panel'")
        buttons = [step.fixture in BUTTONS for step in task.steps]
        if task.strict and not any(buttons):
            raise ValueError(f"task {name}: strict is about the buttons of scene 'panel'")
        if task.flash and not (task.strict and all(buttons) and len(buttons) > 1):
            raise ValueError(f"task {name}: lamps flash in a strict task of two or more presses of a panel's buttons")
        for step in task.steps:
            lookup(step.words, GOAL_TEMPLATES, f"words of task {name}")
            _check_roles(name, step)
            if step.fixture:
                lookup(step.fixture, fixtures, f"fixture in scene {suite.scene!r} for task {name}")
            if step.fixture and step.fixture not in (fit := _fit_for(step.kind, scene)):
                raise ValueError(
                    f"task {name}: '{step.fixture}' does not go with a step of kind {step.kind.name.lower()}, which "
                    f"takes {', '.join(fit) or 'nothing of this scene'}"
                )
        if problem := _contradiction(task, scene):
            raise ValueError(f"task {name}: {problem}")


def _check_numbers(suite: Suite, scene: SceneConfig) -> None:
    """ValueError naming the field whose list or number makes no episodes, or evaluates on training scenes."""
    if not suite.tasks:
        raise ValueError("tasks is empty: name at least one")
    if len(set(suite.tasks)) < len(suite.tasks):
        raise ValueError(f"tasks names '{next(n for n in suite.tasks if suite.tasks.count(n) > 1)}' twice")
    # Two objects where one is named: the swapped instruction names the other.
    named = not scene.fixtures or any(step.object for name in suite.tasks for step in suite.task(name).steps)
    least, most, plates = 1 + named, min(len(scene.objects), len(COLORS)), scene.num_plates
    fewest = plates if scene.fixtures else int("place" in suite.tasks)
    evaluation = SCENE_RANGES["evaluation"]
    for name, value, low, high, why in (
        ("objects_per_episode", suite.objects_per_episode, least, most, f"as scene {suite.scene!r} can show"),
        ("plates_per_episode", suite.plates_per_episode, fewest, plates, f"for its tasks in scene {suite.scene!r}"),
        ("horizon", suite.horizon, 1, 1_000_000, "control steps"),
        ("eval_seed0", suite.eval_seed0, evaluation.start, evaluation.stop - 1_000_000,
         "since seeds below are those of training and of the choice of checkpoints"),
        ("num_views", suite.num_views, 2, 2, "the cameras of every scene"),
    ):  # fmt: skip
        if low > high:
            raise ValueError(
                f"scene {suite.scene!r} cannot hold these tasks: {name} is at most {high}, and they take {low}"
            )
        if not low <= value <= high:
            bounds = f"{low:,}" if low == high else f"from {low:,} to {high:,}"
            raise ValueError(f"{name} must be {bounds}, {why}, got {value:,}")


def _check_roles(name: str, step: Step) -> None:
    """ValueError for a step that lacks what its kind is about, or has what changes nothing."""
    needs = [] if step.kind >= GoalKind.OPEN else ["object"]
    needs += [] if step.kind in (GoalKind.LIFT, GoalKind.STACK) else ["fixture"]
    needs += ["base"] if step.kind == GoalKind.STACK else []
    kind = step.kind.name.lower()
    for role in ("object", "base", "fixture"):
        if role in needs and not getattr(step, role):
            raise ValueError(f"task {name}: a step of kind {kind} needs '{role}'")
        if role not in needs and getattr(step, role):
            raise ValueError(f"task {name}: a step of kind {kind} takes no '{role}': leave it out")
    for role in (step.object, step.base):
        if role not in ("", "a", "b"):
            raise ValueError(f"task {name}: an object's role is a or b, got '{role}'")
    if step.base and step.base == step.object:
        raise ValueError(f"task {name}: '{step.base}' cannot be stacked on itself: the other one is the base")
    if not 1 <= step.shortest_hold <= step.longest_hold:
        raise ValueError(
            f"task {name}: a step is held from shortest_hold to longest_hold control steps, 1 or more, got "
            f"{step.shortest_hold} to {step.longest_hold}"
        )
    told = {slot for text in GOAL_TEMPLATES[step.words]["train"] for slot in "obf" if f"{{{slot}}}" in text}
    if told != {role[0] for role in needs} or (step.kind >= GoalKind.OPEN and step.words != kind):
        raise ValueError(f"task {name}: words '{step.words}' do not tell a step of kind {kind}: leave them out")


def _fit_for(kind: GoalKind, scene: SceneConfig) -> list[str]:
    """The scene's fixtures that a goal of this kind can be about. A panel's button is closed while it is let alone."""
    if kind < GoalKind.OPEN:
        return [fixture for _, fixture in place_names(scene)]
    jointed = [fixture for _, fixture in joint_names(scene)]
    buttons = [fixture for fixture in jointed if fixture != "cabinet"]
    closing = [fixture for fixture in jointed if fixture in ("cabinet", *BUTTONS)]
    return {GoalKind.OPEN: ["cabinet"], GoalKind.CLOSE: closing, GoalKind.PRESS: buttons}[kind]


def _contradiction(task: Task, scene: SceneConfig) -> str | None:
    """Name what in a task changes nothing, is done before it begins, or is told as something else; None for nothing."""
    objects = {step.object for step in task.steps} | {step.base for step in task.steps}
    for field in ("kind", "relation"):
        if getattr(task, field) and "a" not in objects:
            return f"{field} is about the object 'a', and no step is: leave it out"
    if task.relation and ("b" in objects or not {"plate", "bowl"} <= {kind for _, kind in fixture_names(scene)}):
        return "a relation tells 'a' alone from its likes, in a scene with a plate and a bowl"
    stowed = any(step.fixture == "cabinet" and step.object for step in task.steps)
    if task.kind and stowed and task.kind not in LOW_KINDS:
        return f"a {task.kind} does not fit into the drawer: {' or '.join(sorted(LOW_KINDS))} does"
    if task.drawer is not None and "cabinet" not in scene.fixtures:
        return "drawer is about scenes with a cabinet: leave it out"
    moved = next((step for step in task.steps if step.fixture == "cabinet" and not step.object), None)
    if moved is not None:
        closes = moved.kind == GoalKind.CLOSE
        if task.drawer is None or (task.drawer > 0.5) != closes:
            begun, right = ("closed", 1.0) if closes else ("open", 0.0)
            return f"the drawer may be {begun} already when it begins: set drawer = {right}"
    first = task.steps[0]
    if task.inside and first.object == "a" and first.fixture == task.inside:
        return f"'a' lies in the {task.inside} already when it begins: leave inside out, or move it elsewhere"
    for one, other in pairwise(task.steps):
        goals = [(step.kind, step.object, step.base, step.fixture) for step in (one, other)]
        if goals[0] == goals[1] and one.kind != GoalKind.PRESS:
            return f"two steps in a row ask to {one.words} the same, and the second is done with the first"
    if task.flash != _FLASHES.get(task.told, ""):
        return "flash = 'wanted' goes with told = 'was-lit', 'others' with 'not-lit'"
    order = tuple(step.fixture for step in task.steps)
    if task.told in _ORDERS and not (
        order in _ORDERS[task.told] and all(step.kind == GoalKind.PRESS for step in task.steps)
    ):
        ways = " or ".join(", ".join(way) for way in _ORDERS[task.told])
        return f"sentences '{task.told}' are about the buttons pressed in the order {ways}"
    return None
