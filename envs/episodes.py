"""Episodes: what one seed means. A pure function of (suite, seed, task, phrasings); no simulator here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.goals import Goal, GoalKind
from envs.language import Phrasings, instruction
from envs.scene import COLORS, SceneConfig
from envs.shapes import PLATE_RADIUS_M
from envs.suites import Suite

WORKSPACE_X = (0.43, 0.63)
WORKSPACE_Y = (-0.17, 0.17)
_GAP_OBJECTS_M = 0.085
_GAP_PLATE_M = PLATE_RADIUS_M + 0.045
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
    """What counts, in this order."""
    swapped_goals: tuple[Goal, ...] = ()
    """What `swapped_instruction` asks for."""
    fixtures: tuple[tuple[float, float, float], ...] = ()
    """(x, y, yaw) of each fixture of the scene."""
    fixture_colors: tuple[str, ...] = ()
    openings: tuple[float, ...] = ()
    """Of each joint of the scene: 0 closed or released .. 1 open."""


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
    """The episode that `seed` means in `suite`. Scene and target do not depend on `phrasings`, only the words do."""
    if task is not None and task not in suite.tasks:
        raise ValueError(f"suite {suite.name!r} has no task {task!r}; it has: {', '.join(suite.tasks)}")
    rng = np.random.default_rng([seed, 17])
    task = task or suite.tasks[rng.integers(len(suite.tasks))]
    slots = rng.permutation(len(scene.objects))[: suite.objects_per_episode]
    colors = rng.permutation(list(COLORS))[: len(slots)]
    plate_colors = rng.permutation(list(COLORS))[: suite.plates_per_episode]
    plates, objects = _sample_layout(rng, len(plate_colors), len(slots))
    yaws = rng.uniform(-0.5, 0.5, len(slots))
    chosen, other = rng.permutation(len(slots))[:2]
    plate = int(rng.integers(len(plate_colors))) if task == "place" else -1
    other_plate = (plate + 1) % len(plate_colors) if plate >= 0 else -1

    words = np.random.default_rng([seed, 29])
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
