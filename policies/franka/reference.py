"""From a policy's actions to the pose that the hand is sent to: pure arithmetic, without an arm.

An action moves the *commanded* position, as in the tabletop suites that a policy was trained in; the hand follows it.
The path between two commands is ruckig's, on the arm's side of the network (`policies.franka.franka`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ReferenceConfig:
    """How far one action moves the command, and where it may be. The defaults are those of the tabletop suites."""

    metres_per_action: float = 0.03
    """Way of the command for an action of 1."""
    max_lead_m: float = 0.06
    """The command may run ahead of the hand by this much along each axis, so that pushing does not wind it up."""
    low_m: tuple[float, float, float] = (0.33, -0.26, 0.008)
    high_m: tuple[float, float, float] = (0.72, 0.26, 0.40)

    def __post_init__(self) -> None:
        if not (self.metres_per_action > 0 and self.max_lead_m > 0):
            raise ValueError("metres_per_action and max_lead_m must be above 0")
        if len(self.low_m) != 3 or len(self.high_m) != 3:
            raise ValueError("low_m and high_m are the corners of the workspace: x, y and z in metres")
        if not all(low < high for low, high in zip(self.low_m, self.high_m, strict=True)):
            raise ValueError(f"each of low_m {self.low_m} must be below that of high_m {self.high_m}")


class Reference:
    """The commanded position of the hand, m in the arm's base frame."""

    def __init__(self, config: ReferenceConfig, hand_3: NDArray[np.float64]) -> None:
        """Begin where the hand is."""
        self._config = config
        self._low, self._high = np.array(config.low_m), np.array(config.high_m)
        self.command_3 = np.array(hand_3, np.float64)

    def move(self, action_3: NDArray[np.float64], hand_3: NDArray[np.float64]) -> NDArray[np.float64]:
        """The new command: moved by the action, kept near the hand and inside the workspace. A hand that is outside is
        not pulled in by an action of 0. ValueError for what is not finite."""
        action_3, hand_3 = np.asarray(action_3, np.float64), np.asarray(hand_3, np.float64)
        if not (np.isfinite(action_3).all() and np.isfinite(hand_3).all()):
            raise ValueError(f"the action and the hand's position must be finite, got {action_3} at {hand_3}")
        lead = self._config.max_lead_m
        moved = self.command_3 + self._config.metres_per_action * action_3
        moved = hand_3 + np.clip(moved - hand_3, -lead, lead)
        low, high = np.minimum(self._low, self.command_3), np.maximum(self._high, self.command_3)
        self.command_3 = np.clip(moved, low, high)
        return self.command_3


def straight_down(yaw_rad: float) -> NDArray[np.float64]:
    """(3, 3) orientation of a hand that points down, turned about the vertical by `yaw_rad`: 0 when x of the hand and
    of the base agree. The tabletop suites hold -pi/2, so that the fingers open along x."""
    c, s = math.cos(yaw_rad), math.sin(yaw_rad)
    return np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])


def yaw_of(rotation_33: NDArray[np.float64]) -> float:
    """The yaw of a hand in rad, -pi..pi: the inverse of `straight_down`, of the x axis where it does not point down."""
    return math.atan2(rotation_33[1, 0], rotation_33[0, 0])


def opening_of(width_m: float, widest_m: float) -> float:
    """0 closed .. 1 open."""
    return float(np.clip(width_m / widest_m, 0.0, 1.0)) if widest_m > 0 else 0.0
