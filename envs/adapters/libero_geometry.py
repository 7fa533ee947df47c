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

UP = np.array([0.0, 0.0, 1.0])
_ROBOT = ("robot0_", "gripper0_", "mount0_")
_BETWEEN_FINGERS_M = 0.072
"""Widest thing that the opened fingers (8 cm) take between them."""
_FINGER_DEPTH_M = 0.03
"""The hand begins so far above the grip site."""
_RIM_M = (0.012, 0.006)
"""A rim is taken so far below its top, and so far inside the thing's outline."""
_STEPS = 8
"""Turns of the hand, in half a circle, by which a round thing is taken."""
_ROUND = 0.15
"""A thing whose length and width differ by less than this part is taken to be round."""
type _Shape = tuple[tuple[Vector, float, float, float], ...]
_BERTH: _Shape = (
    (np.array([-0.055, -0.04, -0.025, 0.025, 0.04, 0.055]), -0.01, _FINGER_DEPTH_M, 0.025),
    (np.linspace(-0.105, 0.105, 9), _FINGER_DEPTH_M, 0.15, 0.025),
)
"""The opened fingers, but for what is between them, and the hand: points to either side of the grip site along the axis
on which the fingers close, from and up to which height above it, and the radius around each point, m. With room to
spare: what is nearer is in the way."""
_BARE: _Shape = (
    (np.array([-0.044, 0.044]), -0.01, _FINGER_DEPTH_M, 0.011),
    (np.linspace(-0.07, 0.07, 7), _FINGER_DEPTH_M, 0.15, 0.032),
)
"""The same without any room to spare: for narrow places, as a drawer."""
_ACROSS = 0.1
"""Cosine of the angle between two lines that count as at right angles."""
_KNOB_RISE_M = 0.015
"""The knob on a lid stands this much higher than the rest of a thing, at least."""
_KNOB_M = 0.02
"""A part whose middle lies so near to its hinge's axis is a knob, any other a door."""
_ROOM_M = 0.05
"""More room than this is as good as any."""


@dataclass(frozen=True)
class Box:
    """The box around one colliding geom, turned as the geom is."""

    owner: int
    """Root body of the thing or fixture that it belongs to; 0 for the room."""
    low: Vector
    high: Vector
    """Corners of the geom's bounding box, world axes, m."""
    centre: Vector
    half: Vector
    axes: Vector
    """(3, 3) columns: the box's own axes, along which its sides are twice `half` long."""


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


@dataclass(frozen=True)
class Handle:
    """How to move a joint: by which part, and whereto."""

    joint: int
    geom: int
    """The colliding geom that is taken hold of, or pushed."""
    yaw: float
    """Turn of the hand for a knob, its fingers closing across it, rad; 0 for a drawer or a door."""
    target: float
    """The joint's position to reach, rad or m."""


def boxes(model: mujoco.MjModel, data: mujoco.MjData, roots: Collection[int]) -> list[Box]:
    """Boxes of everything that collides but the robot; `roots`: bodies of things and fixtures."""
    found = []
    for geom in np.flatnonzero(model.geom_contype | model.geom_conaffinity):
        body = int(model.geom_bodyid[geom])
        if model.body(body).name.startswith(_ROBOT):
            continue
        while body != 0 and body not in roots:
            body = int(model.body_parentid[body])
        axes, middle, half = data.geom_xmat[geom].reshape(3, 3), model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
            mesh = model.geom_dataid[geom]
            first = model.mesh_vertadr[mesh]
            outline = np.asarray(model.mesh_vert[first : first + model.mesh_vertnum[mesh]], np.float64)
        else:
            outline = middle + half * np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T
        points = outline @ axes.T + data.geom_xpos[geom]
        centre = axes @ middle + data.geom_xpos[geom]
        found.append(Box(body, points.min(0), points.max(0), centre, half.copy(), axes.copy()))
    return found


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
    mine = [box for box in scene if box.owner == owner]
    others = [box for box in scene if box.owner != owner and box.high[2] > low[2] + position[2] + 0.005]

    def best(shape: _Shape, steps: int) -> tuple[float, Vector, float]:
        special = _special_ways(mine, position) if (high - low)[:2].min() >= _BETWEEN_FINGERS_M else []
        found = [
            (yaw, offset, _room(others, position + offset, yaw, shape) - _cost(yaw, offset))
            for yaw, offset in special or _ways(low, high, steps) or [(0.0, (low + high) / 2)]
        ]
        return max(found, key=lambda way: way[2])

    yaw, offset, score = best(_BERTH, _STEPS)
    if score < 0:
        yaw, offset, _ = best(_BARE, 3 * _STEPS)
    return Grasp(offset, yaw, low, high)


def plan_grasp_aside(scene: Sequence[Box], owner: int, position: Vector, drawer: Vector, way: Vector) -> Grasp:
    """The grasp of a thing over which a drawer will reach that opens `way` (3,) and then stands at `drawer` (3,).

    By the side farther from it, the fingers closing across the way, so that the hand can lean out from under it."""
    corners = extent(scene, owner)
    assert corners is not None
    low, high = (corner - position for corner in corners)
    side = np.cross(UP, way)
    ways = [found for found in _ways(low, high, 3 * _STEPS) if abs(_closing(found[0]) @ way) < _ACROSS]
    if not ways:
        return plan_grasp(scene, owner, position)
    yaw, offset = max(
        ways, key=lambda found: abs(side @ (position + found[1] - drawer)) - abs(_closing(found[0]) @ way)
    )
    return Grasp(offset, yaw, low, high)


def plan_handle_grasp(scene: Sequence[Box], owner: int, position: Vector, way: Vector) -> Grasp | None:
    """The grasp of a mug's handle that reaches out `way` (3,), level: between the fingers, near its top. None where
    nothing that narrow does."""
    mine = [box for box in scene if box.owner == owner]
    corners = extent(scene, owner)
    if corners is None:
        return None
    middles = np.array([(box.low + box.high) / 2 for box in mine])
    part = mine[int(np.argmax(middles @ way))]
    side = np.cross(UP, way)
    if np.abs(side) @ (part.high - part.low) > _BETWEEN_FINGERS_M / 2:
        return None
    middle = (part.low + part.high) / 2
    point = np.array([*middle[:2], max(middle[2], part.high[2] - _RIM_M[0])])
    return Grasp(point - position, yaw_along(side), corners[0] - position, corners[1] - position)


def _closing(yaw: float) -> Vector:
    """(3,) the axis along which the fingers close."""
    return np.array([-np.sin(yaw), np.cos(yaw), 0.0])


def _special_ways(mine: Sequence[Box], position: Vector) -> list[tuple[float, Vector]]:
    """Grasps (see `_ways`) of a wide thing by the knob on its lid, or of one turned box across its thin side."""
    if not mine:
        return []
    *rest, top = sorted(mine, key=lambda box: box.high[2])
    if (
        rest
        and top.high[2] - rest[-1].high[2] > _KNOB_RISE_M
        and (top.high - top.low)[:2].max() < _BETWEEN_FINGERS_M / 2
    ):
        point = np.array([*((top.low + top.high) / 2)[:2], top.high[2] - _KNOB_RISE_M / 2]) - position
        return [(float(yaw), point) for yaw in np.pi / 8 * np.arange(-3, 5)]
    if rest:
        return []
    thin = [k for k in range(3) if abs(top.axes[2, k]) < 0.1 and 2 * top.half[k] < _BETWEEN_FINGERS_M]
    point = np.array([*top.centre[:2], max(top.centre[2], top.high[2] - _FINGER_DEPTH_M)]) - position
    return [(yaw_along(top.axes[:, k]), point) for k in thin]


def yaw_along(axis: Vector) -> float:
    """Turn of the hand, in [-pi / 2, pi / 2), whose fingers close along an axis (3,)."""
    return float((np.arctan2(-axis[0], axis[1]) + np.pi / 2) % np.pi - np.pi / 2)


def _ways(low: Vector, high: Vector, steps: int = _STEPS) -> list[tuple[float, Vector]]:
    """(turn of the hand, offset) of the grasps to choose among; a round thing's by `steps` turns. More than
    `_STEPS`, a multiple of it: every grasp that may do where there is little room."""
    size, middle, ways = high - low, (low + high) / 2, []
    rim = np.array([*middle[:2], high[2] - _RIM_M[0]])
    for yaw, along in ((0.0, 1), (np.pi / 2, 0)):
        across = np.eye(3)[1 - along]
        if size[along] < _BETWEEN_FINGERS_M:
            point = np.array([*middle[:2], max(middle[2], high[2] - _FINGER_DEPTH_M)])
            for shift in (0.0, -0.3, 0.3) if size[1 - along] > 0.07 else (0.0,):  # a long thing off its middle, too
                ways.append((yaw, point + shift * size[1 - along] * across))
                if steps > _STEPS and size @ np.abs(_closing(np.pi / 8 + yaw)) < _BETWEEN_FINGERS_M:
                    # Taken askew it turns between the fingers.
                    ways += [(yaw + turn, ways[-1][1]) for turn in (-np.pi / 8, np.pi / 8)]
        elif size[:2].min() >= _BETWEEN_FINGERS_M:
            radius = size[along] / 2 - _RIM_M[1]
            ways += [(yaw, rim + side * radius * _closing(yaw)) for side in (-1.0, 1.0)]
    if size[:2].min() >= max(_BETWEEN_FINGERS_M, (1 - _ROUND) * size[:2].max()):
        radius = size[:2].mean() / 2 - _RIM_M[1]
        for yaw in np.pi / steps * np.array([k for k in range(1 - steps // 2, steps // 2) if k]):
            ways += [(float(yaw), rim + side * radius * _closing(yaw)) for side in (-1.0, 1.0)]
    return ways


def _cost(yaw: float, offset: Vector) -> float:
    """Metres of room that a grasp must have more than one without a turn and in the middle."""
    beside = abs(offset @ _closing(yaw + np.pi / 2))
    return 0.01 * (yaw != 0) + 0.003 * abs(yaw) + 0.2 * float(beside)


def _room(others: Sequence[Box], point: Vector, yaw: float, shape: _Shape = _BERTH) -> float:
    """Metres between the opened hand at a point and its nearest neighbour, at most `_ROOM_M`."""
    free = _ROOM_M
    for sides, bottom, top, radius in shape:
        for box in others:
            lowest, highest = max(box.low[2], point[2] + bottom), min(box.high[2], point[2] + top)
            if lowest > highest:
                continue
            hand = np.array([*point[:2], (lowest + highest) / 2]) + sides[:, None] * _closing(yaw)
            gap = np.linalg.norm(np.maximum(np.abs((hand - box.centre) @ box.axes) - box.half, 0.0), axis=1)
            free = min(free, float(gap.min()) - radius)
    return free


def plan_handle(model: mujoco.MjModel, data: mujoco.MjData, joint: int, accepted: Sequence[float]) -> Handle:
    """The part of a joint's body that reaches farthest the way it opens; of a knob, the part that stands highest.

    `accepted`: the positions of the joint that will do, of which one a little inside is to be reached."""
    start = float(data.qpos[model.jnt_qposadr[joint]])
    low, high = min(accepted), max(accepted)
    target = low + 0.25 * (high - low) if abs(low - start) < abs(high - start) else high - 0.25 * (high - low)
    body, axis = model.jnt_bodyid[joint], data.xaxis[joint]
    parts = np.flatnonzero((model.geom_bodyid == body) & ((model.geom_contype | model.geom_conaffinity) != 0))
    centres = np.array([_centre(model, data, geom) for geom in parts])
    opening = np.sign(model.jnt_range[joint].sum())
    knob = False
    if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE:
        outward = opening * axis
    else:
        arm = centres.mean(0) - data.xanchor[joint]
        arm -= (arm @ axis) * axis
        knob = bool(np.linalg.norm(arm) < _KNOB_M)
        outward = axis if knob else opening * np.cross(axis, arm / np.linalg.norm(arm))
    reach = np.abs(data.geom_xmat[parts].reshape(-1, 3, 3).transpose(0, 2, 1) @ outward) * model.geom_aabb[parts, 3:]
    geom = int(parts[np.argmax(centres @ outward + reach.sum(1))])
    return Handle(joint, geom, _yaw_across(model, data, geom) if knob else 0.0, target)


def joint_columns(model: mujoco.MjModel, data: mujoco.MjData, handle: Handle, grip: Vector) -> list[float]:
    """The columns of a joint's goal from the third on, see `envs.adapters.libero_suites.GOAL_DIM`."""
    joint, place = handle.joint, _centre(model, data, handle.geom)
    hinge = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE
    return [
        *place, *data.xaxis[joint], *(place - grip), *(place - data.xanchor[joint]), handle.yaw,
        data.qpos[model.jnt_qposadr[joint]], handle.target, float(hinge),
    ]  # fmt: skip


def way_out(model: mujoco.MjModel, data: mujoco.MjData, handle: Handle) -> Vector:
    """(3,) the way from inside to outside through a door, were it shut."""
    axis, angle = data.xaxis[handle.joint], float(data.qpos[model.jnt_qposadr[handle.joint]])
    arm = _centre(model, data, handle.geom) - data.xanchor[handle.joint]
    arm -= (arm @ axis) * axis
    shut = np.cos(angle) * arm - np.sin(angle) * np.cross(axis, arm)
    out = np.sign(model.jnt_range[handle.joint].sum()) * np.cross(axis, shut)
    return out / np.linalg.norm(out)


def _centre(model: mujoco.MjModel, data: mujoco.MjData, geom: int) -> Vector:
    """(3,) middle of a geom's bounding box."""
    return data.geom_xmat[geom].reshape(3, 3) @ model.geom_aabb[geom, :3] + data.geom_xpos[geom]


def _yaw_across(model: mujoco.MjModel, data: mujoco.MjData, geom: int) -> float:
    """Turn of the hand, in [-pi / 2, pi / 2), whose fingers close along the thinnest of a geom's level sides."""
    axes, half = data.geom_xmat[geom].reshape(3, 3), model.geom_aabb[geom, 3:]
    thin = axes[:, min((k for k in range(3) if abs(axes[2, k]) < 0.5), key=lambda k: half[k])]
    return yaw_along(thin)
