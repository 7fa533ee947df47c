"""What counts as success. Batched over worlds and free of any simulator: arrays in, verdicts out.

The functions use only operators that numpy arrays and torch tensors share, so the same rules judge the CPU and the GPU
backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.scene import PLATE_RADIUS_M, PLATE_THICKNESS_M

LIFT_HEIGHT_M = 0.08
"""An object whose centre is this much above its rest height counts as lifted."""
WRONG_LIFT_HEIGHT_M = 0.05
HOLD_STEPS = 4
"""Control steps in a row that the success condition must hold."""


@dataclass
class WorldState:
    """What the rules read, for n worlds with K object slots."""

    objects: np.ndarray  # (n, K, 3) object centres, world frame, m
    rest_height: np.ndarray  # (K,) height of a standing object's centre, m
    active: np.ndarray  # (n, K) bool: takes part in the episode
    target: np.ndarray  # (n,) slot the instruction names
    plate_xy: np.ndarray  # (n, 2) centre of the plate the instruction names; NaN without one
    is_place: np.ndarray  # (n,) bool
    grip: np.ndarray  # (n, 3) grip site, m
    finger_opening: np.ndarray  # (n,) 0 closed .. 1 open


def target_position(state: WorldState) -> np.ndarray:
    """(n, 3) centre of the named object."""
    return state.objects[np.arange(len(state.target)), state.target]


def condition(state: WorldState) -> np.ndarray:
    """(n,) bool: the task's goal holds at this instant. Pick: named object lifted and in the gripper. Place: it lies on
    the named plate and the gripper has let go."""
    at = target_position(state)
    rest = state.rest_height[state.target]
    to_grip = ((at - state.grip) ** 2).sum(-1) ** 0.5
    lifted = (at[:, 2] > rest + LIFT_HEIGHT_M) & (to_grip < 0.05)
    offset = ((at[:, :2] - state.plate_xy) ** 2).sum(-1) ** 0.5
    height = at[:, 2] - rest - PLATE_THICKNESS_M
    # A brick tipped on the plate's rim or a fallen can is not "on" it: height tells.
    on_plate = (offset < PLATE_RADIUS_M) & (abs(height) < 0.012) & (to_grip > 0.03) & (state.finger_opening > 0.6)
    return np.where(state.is_place, on_plate, lifted)


def wrong_object(state: WorldState) -> np.ndarray:
    """(n,) bool: an object that the instruction does not name has been lifted. Ends the episode as a failure."""
    slots = np.arange(state.objects.shape[1])
    others = state.active & (slots[None, :] != state.target[:, None])
    lifted = state.objects[:, :, 2] > state.rest_height[None, :] + WRONG_LIFT_HEIGHT_M
    return (others & lifted).any(-1)
