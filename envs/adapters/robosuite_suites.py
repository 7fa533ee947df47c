"""The robosuite suites: which task, in which words, and what its scripted expert may see. Imports no robosuite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.seeds import FIRST_EVALUATION_SEED
from vla.core.types import PlanarSymmetry

Vector = NDArray[np.float64]

GRASP_DIM, NUT_DIM, DOOR_DIM = 12, 13, 17
"""Widths of the privileged states, see `_grasp_state`, `_nut_state`, `_door_state`."""


@dataclass(frozen=True)
class RobosuiteSuite:
    """One robosuite task as a suite of one task."""

    name: str
    description: str
    environment: str
    horizon: int
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    swapped: str
    """Names an object that is not the one counted; the control of a policy that does not listen."""
    state: Callable[[Any, Vector], Vector]
    """(robosuite environment, grip site) -> what the scripted expert sees, (privileged_dim,)."""
    privileged_dim: int
    named: Callable[[Vector], tuple[Vector, Vector | None]]
    """That state -> (where the hand goes first, where it takes the thing): what the words name."""
    things: tuple[str, ...]
    """In words; the first is what the task is about."""
    plane: PlanarSymmetry
    """Which columns of that state and of the proprio lie in the plane of the table."""
    eval_seed0: int = FIRST_EVALUATION_SEED

    num_views: int = 2

    @property
    def tasks(self) -> tuple[str, ...]:
        """The suite's only task."""
        return (self.name.removeprefix("robosuite-"),)

    def summary(self, per_task: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """See `envs.tabletop.suites.AnySuite.summary`."""
        return {}


def _body(env: Any, name: str) -> tuple[Vector, float]:
    """(position, yaw) of a body."""
    body = env.sim.model.body_name2id(name)
    w, x, y, z = env.sim.data.body_xquat[body]
    return np.array(env.sim.data.body_xpos[body]), float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def _grasp_state(
    env: Any, grip: Vector, *, body: str, goal: Vector | None = None, grasp_height_m: float = 0.0
) -> Vector:
    """Object (3), its yaw, goal (3), has_goal, object - grip site (3), height above its centre to grasp at.

    The goal is where the object's centre is let go; without one it only has to be lifted.
    """
    position, yaw = _body(env, body)
    there = np.zeros(3) if goal is None else goal
    return np.concatenate([position, [yaw], there, [goal is not None], position - grip, [grasp_height_m]])


def _lift(env: Any, grip: Vector) -> Vector:
    return _grasp_state(env, grip, body="cube_main")


def _stack(env: Any, grip: Vector) -> Vector:
    return _grasp_state(env, grip, body="cubeA_main", goal=_body(env, "cubeB_main")[0] + [0.0, 0.0, 0.047])


def _can(env: Any, grip: Vector) -> Vector:
    goal = np.array(env.target_bin_placements[env.object_id]) + [0.0, 0.0, 0.09]
    return _grasp_state(env, grip, body=f"{env.obj_to_use}_main", goal=goal, grasp_height_m=0.01)


def _nut_state(env: Any, grip: Vector) -> Vector:
    """Nut's centre (3), its yaw, its handle (3), peg (3), handle - grip site (3)."""
    centre, yaw = _body(env, "SquareNut_main")
    handle = np.array(env.sim.data.site_xpos[env.sim.model.site_name2id("SquareNut_handle_site")])
    return np.concatenate([centre, [yaw], handle, _body(env, "peg1")[0], handle - grip])


def _door_state(env: Any, grip: Vector) -> Vector:
    """Where the handle turns on the door (3), the bar's direction (3) and the door's outward normal (3), both now;
    hinge (3); latch angle, hinge angle (rad); bar - grip site (3)."""
    model, data = env.sim.model, env.sim.data
    latch = model.body_name2id(env.door.latch_body)
    axes = np.array(data.body_xmat[latch]).reshape(3, 3)
    bar, outward = axes[:, 0], -axes[:, 1]
    centre = np.array(data.body_xpos[latch]) + BAR_OUT_M * outward
    hinge = np.array(data._data.joint(env.door.joints[0]).xanchor)
    angles = [data.qpos[env.handle_qpos_addr], data.qpos[env.hinge_qpos_addr]]
    return np.concatenate([centre, bar, outward, hinge, angles, centre + GRASP_BAR_M * bar - grip])


_LIFT_PLANE = PlanarSymmetry(hand=(0, 1), places=((0, 1),), offsets=((8, 9),))  # without a goal its columns are 0
_GRASP_PLANE = PlanarSymmetry(hand=(0, 1), places=((0, 1), (4, 5)), offsets=((8, 9),))
_NUT_PLANE = PlanarSymmetry(hand=(0, 1), places=((0, 1), (4, 5), (7, 8)), offsets=((10, 11),))
_DOOR_PLANE = PlanarSymmetry(hand=(0, 1), places=((0, 1), (9, 10)), offsets=((3, 4), (6, 7), (14, 15)))


def _grasped(state: Vector) -> tuple[Vector, Vector | None]:
    return state[:3].copy(), state[4:7].copy() if state[7] > 0 else None


def _nut(state: Vector) -> tuple[Vector, Vector | None]:
    return state[4:7].copy(), state[7:10].copy()


def _bar(state: Vector) -> tuple[Vector, Vector | None]:
    return state[:3] + GRASP_BAR_M * state[3:6], None


BAR_OUT_M = 0.10
"""How far the door handle's bar stands out from the middle of the door."""
GRASP_BAR_M = 0.105
"""Where along the bar, from the axis it turns about, the expert takes it."""


SUITES: dict[str, RobosuiteSuite] = {
    suite.name: suite
    for suite in (
        RobosuiteSuite(
            "robosuite-lift", "robosuite Lift: raise the cube 4 cm", "Lift", 100,
            (
                "lift the cube", "pick up the red cube", "raise the cube from the table",
                "grab the cube", "take the block",
            ),
            ("pick the cube up", "take the red block and lift it"),
            "lift the can", _lift, GRASP_DIM, _grasped, ("the red cube",), _LIFT_PLANE,
        ),
        RobosuiteSuite(
            "robosuite-stack", "robosuite Stack: the red cube on the green one", "Stack", 200,
            (
                "stack the red cube on the green cube", "put the red cube on the green cube",
                "place the red block on the green block", "move the red cube to the green cube",
                "pick up the red cube and put it on the green cube",
            ),
            ("on the green cube put the red cube", "lift the red block and place it on the green block"),
            "put the green cube on the red cube", _stack, GRASP_DIM, _grasped,
            ("the red cube", "the green cube"), _GRASP_PLANE,
        ),
        RobosuiteSuite(
            "robosuite-can", "robosuite PickPlaceCan: the can into its bin", "PickPlaceCan", 400,
            (
                "put the can in the bin", "place the can in the bin", "move the can to the bin",
                "pick up the can and put it in the bin", "take the can and place it in the bin",
            ),
            ("lift the can and move it to the bin", "in the bin put the can"),
            "put the cube in the bin", _can, GRASP_DIM, _grasped, ("the can",), _GRASP_PLANE,
        ),
        RobosuiteSuite(
            "robosuite-square", "robosuite NutAssemblySquare: the square nut over its peg", "NutAssemblySquare", 500,
            (
                "put the square nut on the square peg", "place the square nut over the square peg",
                "pick up the square nut and put it on the peg", "fit the square nut on the peg",
                "move the square nut to the square peg",
            ),
            ("on the square peg put the square nut", "pick up the square nut and fit it over the peg"),
            "put the round nut on the round peg", _nut_state, NUT_DIM, _nut, ("the square nut",), _NUT_PLANE,
        ),
        RobosuiteSuite(
            "robosuite-door", "robosuite Door: turn the handle, pull the door open", "Door", 300,
            (
                "open the door", "pull the door open", "turn the handle and open the door",
                "press the handle down and pull the door", "open the door by its handle",
            ),
            ("pull the handle and open the door", "turn the handle down and pull the door open"),
            "close the drawer", _door_state, DOOR_DIM, _bar, ("the handle",), _DOOR_PLANE,
        ),
    )
}  # fmt: skip
