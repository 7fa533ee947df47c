"""Sizes of the things in a LIBERO scene and the room between them: by what its scripted expert takes hold of one.

Runs in LIBERO's environment, on MuJoCo's model alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_ROBOT = ("robot0_", "gripper0_", "mount0_")
_BETWEEN_FINGERS_M = 0.072
"""Widest thing that the opened fingers (8 cm) take between them."""
_FINGER_DEPTH_M = 0.03
"""The hand begins so far above the grip site."""
_RIM_M = (0.012, 0.006)
"""A rim is taken so far below its top, and so far inside the thing's outline."""
_SIDE_M = {"finger": 0.055, "hand": 0.105}
"""Reach of the opened fingers and of the hand to either side of the grip site."""
_HALF_DEPTH_M = 0.025
_ROOM_M = 0.05
"""More room than this is as good as any."""


@dataclass(frozen=True)
class Box:
    """World bounding box of one colliding geom."""

    owner: int
    """Root body of the thing or fixture that it belongs to; 0 for the room."""
    low: Vector
    high: Vector


@dataclass(frozen=True)
class Grasp:
    """How to take hold of a thing."""

    offset: Vector
    """The grip site relative to the thing's position, m."""
    yaw: float
    """Turn of the hand from where it is at rest (fingers closing along y), rad."""
    low: Vector
    high: Vector
    """Corners of the thing's bounding box relative to its position, world axes, m."""


def boxes(model: mujoco.MjModel, data: mujoco.MjData, roots: Collection[int]) -> list[Box]:
    """Boxes of everything that collides but the robot; `roots`: bodies of things and fixtures."""
    found = []
    for geom in np.flatnonzero(model.geom_contype | model.geom_conaffinity):
        body = int(model.geom_bodyid[geom])
        if model.body(body).name.startswith(_ROBOT):
            continue
        while body != 0 and body not in roots:
            body = int(model.body_parentid[body])
        points = _outline(model, int(geom)) @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        found.append(Box(body, points.min(0), points.max(0)))
    return found


def _outline(model: mujoco.MjModel, geom: int) -> Vector:
    """Points (n, 3) in the geom's frame that its bounding box is the box of."""
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        return np.asarray(model.mesh_vert[first : first + model.mesh_vertnum[mesh]], np.float64)
    middle, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
    return middle + half * np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T


def extent(scene: Sequence[Box], owner: int) -> tuple[Vector, Vector] | None:
    """Corners of everything that belongs to a body; None where that is nothing."""
    mine = [box for box in scene if box.owner == owner]
    if not mine:
        return None
    return np.min([box.low for box in mine], axis=0), np.max([box.high for box in mine], axis=0)


def plan_grasp(scene: Sequence[Box], owner: int, position: Vector) -> Grasp:
    """The grasp from above with the most room for the hand: between the fingers, or by the rim of a wide thing."""
    corners = extent(scene, owner)
    low, high = (np.zeros(3), np.zeros(3)) if corners is None else (corner - position for corner in corners)
    others = [box for box in scene if box.owner != owner and box.high[2] > low[2] + position[2] + 0.005]
    ways = _ways(low, high) or [(0.0, 1, (low + high) / 2)]
    yaw, _, offset = max(ways, key=lambda way: _room(others, position, *way))
    return Grasp(offset, yaw, low, high)


def _ways(low: Vector, high: Vector) -> list[tuple[float, int, Vector]]:
    """(turn of the hand, axis along which its fingers close, offset) of the grasps to choose among."""
    size, middle, ways = high - low, (low + high) / 2, []
    for yaw, along in ((0.0, 1), (np.pi / 2, 0)):
        across = np.eye(3)[1 - along]
        if size[along] < _BETWEEN_FINGERS_M:
            point = np.array([*middle[:2], max(middle[2], high[2] - _FINGER_DEPTH_M)])
            for shift in (0.0, -0.3, 0.3) if size[1 - along] > 0.07 else (0.0,):  # a long thing off its middle, too
                ways.append((yaw, along, point + shift * size[1 - along] * across))
        elif size[:2].min() >= _BETWEEN_FINGERS_M:
            for side, edge in ((-1.0, low), (1.0, high)):
                rim = np.array([*middle[:2], high[2] - _RIM_M[0]])
                rim[along] = edge[along] - side * _RIM_M[1]
                ways.append((yaw, along, rim))
    return ways


def _room(others: Sequence[Box], position: Vector, yaw: float, along: int, offset: Vector) -> float:
    """Metres between the opened hand and its nearest neighbour, less a cost of turning and of grasps off the middle."""
    point = position + offset
    free = _ROOM_M
    for box in others:
        if box.high[2] < point[2] - 0.01:
            continue
        part = "hand" if box.high[2] > point[2] + _FINGER_DEPTH_M else "finger"
        sides = np.linspace(-_SIDE_M[part], _SIDE_M[part], 9)
        for side in sides if part == "hand" else sides[np.abs(sides) >= 0.02]:  # what is between the fingers is taken
            at = point[:2] + side * np.eye(2)[along]
            gap = np.linalg.norm(np.maximum(np.maximum(box.low[:2] - at, at - box.high[:2]), 0.0))
            free = min(free, float(gap) - _HALF_DEPTH_M)
    return free - 0.01 * (yaw != 0) - 0.2 * abs(offset[1 - along])
