"""Delta-end-effector control: a commanded pose, followed by damped-least-squares IK and position actuators.

Batched over environments, for numpy arrays (CPU backend) and torch tensors (GPU backend) alike. One action =
(dx, dy, dz, gripper) in [-1, 1]: a displacement of the *commanded* grip position of up to `max_delta_m` per control
step and a gripper command (> 0 open, <= 0 closed).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from vla.core.types import ActionSpec

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor


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
    """The action vector of the tabletop environments."""
    return ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, control_hz)


def namespace(array: Array) -> ModuleType:
    """numpy or torch, whichever `array` belongs to. Never imports torch: who holds a tensor has done so."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np


def like(values: Any, array: Array) -> Array:
    """`values` as an array of the kind, precision and place of `array`."""
    xp = namespace(array)
    return np.asarray(values) if xp is np else xp.as_tensor(values, dtype=array.dtype, device=array.device)


def advance_command(command_n3: Array, grip_n3: Array, action_nA: Array, config: ControlConfig) -> Array:
    """New commanded grip positions (n, 3), m: moved by the action, kept near the hand and inside the workspace."""
    xp = namespace(command_n3)
    moved = command_n3 + config.max_delta_m * xp.clip(action_nA[:, :3], -1.0, 1.0)
    moved = grip_n3 + xp.clip(moved - grip_n3, -config.max_lead_m, config.max_lead_m)
    return xp.clip(moved, like(config.low_m, moved), like(config.high_m, moved))


def joint_targets(
    qpos_n7: Array,
    jacobian_n67: Array,
    grip_n3: Array,
    rotation_n33: Array,
    command_n3: Array,
    hold_rotation_33: Array,
    damping: float,
) -> Array:
    """Joint targets (n, 7), rad, one damped-least-squares step toward the commanded pose (Wampler 1986; Nakamura and
    Hanafusa 1986): dq = J^T (J J^T + damping I)^-1 e."""
    xp = namespace(qpos_n7)
    turn = 0.5 * xp.cross(rotation_n33, hold_rotation_33[None], axis=1).sum(-1)
    error = xp.concatenate([command_n3 - grip_n3, turn], axis=-1).clip(-0.1, 0.1)
    transposed = jacobian_n67.swapaxes(1, 2)
    gram = jacobian_n67 @ transposed + damping * like(np.eye(6), jacobian_n67)
    return qpos_n7 + (transposed @ _solve(gram, error[..., None]))[..., 0]


def _solve(gram: Array, right: Array) -> Array:
    if namespace(gram) is np:
        return np.linalg.solve(gram, right)
    # Without the check for singularity (damping excludes it), which would make the host wait for the device.
    return sys.modules["torch"].linalg.solve_ex(gram, right).result
