"""Layouts of the tabletop suites' first states: sampled by rejection, so that everything can be reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from envs.tabletop.shapes import PANEL_Y_M
from envs.tabletop.tasks import RELATIONS, Point, Task, nearest_on_segment, related

_KEEP_M = {
    "object": 0.0435,
    "plate": 0.0575,
    "bowl": 0.080,
    "box": 0.088,
    "tray": 0.105,
    "zone": 0.050,
    "button": 0.057,
    **dict.fromkeys(PANEL_Y_M, 0.057),
}
"""Two things are at least the sum of theirs apart: open fingers reach 66 mm to each side, along x."""
_PALM_X_M, _PALM_Y_M = 0.122, 0.052
"""The palm, 20 cm wide along x, comes down on any of them and must miss the tallest object."""
_ROW_X, _ROW_Y = (0.42, 0.65), (-0.20, 0.20)
_COUNTER_X, _COUNTER_Y = (0.38, 0.68), (-0.22, 0.22)
_CABINET_X, _CABINET_Y = (0.36, 0.39), 0.235
_PANEL_X, _PANEL_M = (0.50, 0.55), 0.008
_DRAWER_X_M, _DRAWER_Y_M = 0.165, 0.025
"""Half width of what the open drawer and a palm beside it take up, and how near to the middle that comes."""
_SLIDING_M = 0.035


@dataclass(frozen=True)
class Layout:
    """Positions (x, y) of the objects; poses (x, y, yaw) of plates and fixtures, in the scene's order."""

    objects: tuple[Point, ...]
    fixtures: tuple[tuple[float, float, float], ...]


def sample_layout(rng: np.random.Generator, task: Task, fixtures: Sequence[str], num_objects: int) -> Layout:
    """A layout of `fixtures` (kinds) and `num_objects` objects, of which the first is the task's `a`, the next `b`."""
    while True:
        layout = _try_layout(rng, task, fixtures, num_objects)
        if layout is not None:
            return layout


def _try_layout(rng: np.random.Generator, task: Task, fixtures: Sequence[str], num_objects: int) -> Layout | None:
    cabinet = _place_cabinet(rng) if "cabinet" in fixtures else None
    x_range, y_range = (_COUNTER_X, _COUNTER_Y) if cabinet else (_ROW_X, _ROW_Y)
    kinds = [kind for kind in fixtures if kind != "cabinet"] + ["object"] * num_objects
    kinds.sort(key=lambda kind: -_KEEP_M[kind])
    placed: list[tuple[str, Point]] = []
    for kind in kinds:
        between = task.relation == "between" and kind == "object" and not any(k == "object" for k, _ in placed)
        for _ in range(40):
            if between:
                (_, p), (_, q) = placed[:2]
                point = tuple(float(0.5 * (p[i] + q[i]) + rng.uniform(-0.015, 0.015)) for i in (0, 1))
            elif kind in PANEL_Y_M:
                point = (float(rng.uniform(*_PANEL_X)), PANEL_Y_M[kind] + float(rng.uniform(-_PANEL_M, _PANEL_M)))
            else:
                point = (float(rng.uniform(*x_range)), float(rng.uniform(*y_range)))
            if cabinet and _in_drawer_sweep(point, cabinet):
                continue
            if all(_apart(kind, point, other, q) for other, q in placed):
                placed.append((kind, point))
                break
        else:
            return None
    at = {kind: [point for k, point in placed if k == kind] for kind in {*kinds}}
    objects = at.get("object", [])
    if task.relation:
        chosen = related(task.relation, objects, at["plate"][0], at["bowl"][0])
        if chosen < 0:
            return None
        objects.insert(0, objects.pop(chosen))
        others = {related(relation, objects, at["plate"][0], at["bowl"][0]) for relation in RELATIONS} - {-1, 0}
        if not others:
            return None
        objects.insert(1, objects.pop(min(others)))
    if "zone" in at and not _can_be_pushed(objects[0], at["zone"][0], placed):
        return None
    where = {kind: iter([(*point, 0.0) for point in points]) for kind, points in at.items()}
    poses = tuple(cabinet if kind == "cabinet" else next(where[kind]) for kind in fixtures)
    return Layout(tuple(objects), poses)  # type: ignore[arg-type]


def _place_cabinet(rng: np.random.Generator) -> tuple[float, float, float]:
    """At one side of the table; its drawer opens toward the middle."""
    side = 1.0 if rng.random() < 0.5 else -1.0
    return float(rng.uniform(*_CABINET_X)), side * _CABINET_Y, 0.0 if side > 0 else math.pi


def _in_drawer_sweep(point: Point, cabinet: tuple[float, float, float]) -> bool:
    side = math.copysign(1.0, cabinet[1])
    return abs(point[0] - cabinet[0]) < _DRAWER_X_M and side * point[1] > _DRAWER_Y_M


def _apart(kind: str, p: Point, other: str, q: Point) -> bool:
    if "object" in (kind, other) and abs(p[0] - q[0]) < _PALM_X_M and abs(p[1] - q[1]) < _PALM_Y_M:
        return False
    return math.dist(p, q) > _KEEP_M[kind] + _KEEP_M[other]


def _can_be_pushed(start: Point, zone: Point, placed: Sequence[tuple[str, Point]]) -> bool:
    """Nothing stands in the way of the straight line from an object to the zone, nor of the palm above it."""
    for kind, point in placed:
        if kind == "zone" or point == start:
            continue
        near = nearest_on_segment(point, start, zone)
        if math.dist(point, near) < _KEEP_M[kind] + _SLIDING_M:
            return False
        if kind == "object" and abs(point[0] - near[0]) < _PALM_X_M and abs(point[1] - near[1]) < _PALM_Y_M:
            return False
    return True
