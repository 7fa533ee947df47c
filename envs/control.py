"""Delta-end-effector control: a commanded pose, followed by damped-least-squares IK and position actuators.

Batched over worlds. One action = (dx, dy, dz, gripper) in [-1, 1]: a displacement of the *commanded* grip position of
up to `max_delta_m` per control step and a gripper command (> 0 open, <= 0 closed).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla.types import ActionSpec


@dataclass(frozen=True)
class ControlConfig:
    """Limits of the delta-end-effector controller."""

    max_delta_m: float = 0.03
    max_lead_m: float = 0.06
    """The command may run ahead of the hand by this much, so that pushing against something does not wind it up."""
    damping: float = 1e-3
    low_m: tuple[float, float, float] = (0.33, -0.26, 0.008)
    high_m: tuple[float, float, float] = (0.72, 0.26, 0.40)
    finger_open_m: float = 0.04


def action_spec(control_hz: float) -> ActionSpec:
    """The action vector of the tabletop worlds."""
    return ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, control_hz)


def advance_command(
    command_n3: np.ndarray, grip_n3: np.ndarray, action_nA: np.ndarray, config: ControlConfig
) -> np.ndarray:
    """New commanded grip positions (n, 3), m: moved by the action, kept near the hand and inside the workspace."""
    moved = command_n3 + config.max_delta_m * np.clip(action_nA[:, :3], -1.0, 1.0)
    moved = grip_n3 + np.clip(moved - grip_n3, -config.max_lead_m, config.max_lead_m)
    return np.clip(moved, config.low_m, config.high_m)


def joint_targets(
    qpos_n7: np.ndarray,
    jacobian_n67: np.ndarray,
    grip_n3: np.ndarray,
    rotation_n33: np.ndarray,
    command_n3: np.ndarray,
    hold_rotation_33: np.ndarray,
    damping: float,
) -> np.ndarray:
    """Joint targets (n, 7), rad, one damped-least-squares step toward the commanded pose (Wampler 1986; Nakamura and
    Hanafusa 1986): dq = J^T (J J^T + damping I)^-1 e."""
    turn = 0.5 * np.cross(rotation_n33, hold_rotation_33[None], axis=1).sum(-1)
    error = np.concatenate([command_n3 - grip_n3, turn], axis=-1).clip(-0.1, 0.1)
    gram = jacobian_n67 @ jacobian_n67.transpose(0, 2, 1) + damping * np.eye(6)
    return qpos_n7 + (jacobian_n67.transpose(0, 2, 1) @ np.linalg.solve(gram, error[..., None]))[..., 0]
