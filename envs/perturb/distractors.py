"""Distractors: objects that no instruction names, placed where they obstruct no task."""

from __future__ import annotations

from dataclasses import replace

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.tabletop.episodes import Episode
from envs.tabletop.goals import GoalKind
from envs.tabletop.initial_state import Start
from envs.tabletop.scene import COLORS, SceneIndex
from envs.tabletop.shapes import Kind, Part, add_parts

_SHAPES: tuple[Kind, ...] = (
    Kind((Part("ellipsoid", (0.026, 0.017, 0.015)),), 0.015, rolls=True),
    Kind((Part("box", (0.042, 0.008, 0.008)),), 0.008),
    Kind(
        (
            Part("cylinder", (0.011, 0.015, 0.0)),
            Part("cylinder", (0.022, 0.004, 0.0), (0.0, 0.0, -0.019)),
            Part("cylinder", (0.022, 0.004, 0.0), (0.0, 0.0, 0.019)),
        ),
        0.023,
    ),
    Kind((Part("box", (0.03, 0.03, 0.005)),), 0.005),
    Kind((Part("box", (0.025, 0.012, 0.009)), Part("box", (0.01, 0.012, 0.009), (-0.015, 0.0, 0.018))), 0.009),
)
"""An egg, a stick, a spool, a tile and a step: shapes that no suite has."""
MAX_DISTRACTORS = len(_SHAPES)
_COLORS = (
    *COLORS.values(),
    (0.95, 0.50, 0.10), (0.15, 0.75, 0.75), (0.95, 0.55, 0.70), (0.40, 0.25, 0.15), (0.92, 0.92, 0.92),
    (0.10, 0.10, 0.12),
)  # fmt: skip
_AREA_X, _AREA_Y = (0.38, 0.70), (-0.27, 0.27)
_GAP_M = 0.060
"""From the bounding circle of anything to a distractor's centre: half a distractor and a finger."""
_HANDLE_GAP_M, _PATH_GAP_M = 0.09, 0.09
_TRIES = 300
_AWAY_M = (0.35, -0.2, -0.2)
"""Those that take no part hang in the air under the table, touching nothing."""
_GRAVITY = 9.81


def add_distractors(spec: mujoco.MjSpec) -> None:
    """Add the free bodies `distractor0`, ... to a scene."""
    for k, kind in enumerate(_SHAPES):
        body = spec.worldbody.add_body(name=f"distractor{k}", pos=[_AWAY_M[0], _AWAY_M[1] + 0.1 * k, _AWAY_M[2]])
        body.add_freejoint(name=f"distractor{k}")
        add_parts(body, f"distractor{k}", kind.parts, mass=0.1, rolls=kind.rolls)


def things(model: mujoco.MjModel) -> NDArray[np.int64]:
    """Geoms of what an episode puts somewhere: free bodies and mocap bodies, with all that hangs on them."""
    free = model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
    roots = np.union1d(free, np.flatnonzero(model.body_mocapid >= 0))
    return np.flatnonzero(np.isin(model.body_rootid[model.geom_bodyid], roots))


def painted(model: mujoco.MjModel, geom_rgba: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """`geom_rgba` (ngeom, 4) with a colour for every distractor: the suites' own or another."""
    rgba = geom_rgba.copy()
    for k in range(MAX_DISTRACTORS):
        rgba[model.geom_bodyid == model.body(f"distractor{k}").id, :3] = _COLORS[rng.integers(len(_COLORS))]
    return rgba


def scatter(
    start: Start,
    episode: Episode,
    model: mujoco.MjModel,
    index: SceneIndex,
    count: int,
    rng: np.random.Generator,
) -> Start:
    """`start` with `count` distractors standing on the table, fewer where there is no room; the rest out of sight."""
    taken = _taken(start, episode, model, index)
    qpos, lift_force = start.qpos.copy(), start.lift_force.copy()
    for number, k in enumerate(rng.permutation(MAX_DISTRACTORS)):
        body = model.body(f"distractor{k}").id
        a = model.jnt_qposadr[model.body_jntadr[body]]
        spot = _free_spot(taken, rng) if number < count else None
        if spot is None:
            lift_force[body] = _GRAVITY * model.body_mass[body]
            continue
        yaw = rng.uniform(-np.pi, np.pi)
        qpos[a : a + 7] = [*spot, _SHAPES[k].rest_m, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        taken = np.concatenate([taken, [[*spot, 0.04]]])
    return replace(start, qpos=qpos, lift_force=lift_force)


def _free_spot(taken: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64] | None:
    for spot in rng.uniform([_AREA_X[0], _AREA_Y[0]], [_AREA_X[1], _AREA_Y[1]], (_TRIES, 2)):
        if (np.linalg.norm(taken[:, :2] - spot, axis=1) > taken[:, 2] + _GAP_M).all():
            return spot
    return None


def _taken(start: Start, episode: Episode, model: mujoco.MjModel, index: SceneIndex) -> NDArray[np.float64]:
    """(m, 3) circles (x, y, radius) of the table that must stay free: things, drawers open and closed, handles and the
    hand that pulls them, the way of what is pushed."""
    data = mujoco.MjData(model)
    standing = things(model)
    distractors = [model.body(f"distractor{k}").id for k in range(MAX_DISTRACTORS)]
    standing = standing[~np.isin(model.geom_bodyid[standing], distractors)]
    circles = []
    for opened in (0.0, 1.0):
        data.qpos[:], data.mocap_pos[:], data.mocap_quat[:] = start.qpos, start.mocap_pos, start.mocap_quat
        data.qpos[index.joint_qpos] = opened * index.joint_travel
        mujoco.mj_kinematics(model, data)
        on_table = standing[data.geom_xpos[standing, 2] > -0.03]
        circles.append(np.column_stack([data.geom_xpos[on_table, :2], model.geom_rbound[on_table]]))
        handles = data.site_xpos[index.handle_site, :2].reshape(-1, 2)
        circles.append(np.column_stack([handles, np.full(len(handles), _HANDLE_GAP_M)]))
    for goal in episode.goals:
        if goal.kind == GoalKind.PUSH:
            here = data.xpos[index.object_body[goal.object], :2]
            there = data.xpos[index.place_body[goal.place], :2]
            # The hand pushes from behind: the way begins before the object.
            way = [here + t * (there - here) for t in np.linspace(-0.6, 1.2, 10)]
            circles.append(np.array([[*point, _PATH_GAP_M] for point in way]))
    return np.concatenate(circles)
