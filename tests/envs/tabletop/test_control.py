"""The controller says the same to numpy and to torch, and goes where it is told."""

from __future__ import annotations

import numpy as np
import torch

from envs.tabletop.control import ControlConfig, advance_command, joint_targets

CONFIG = ControlConfig()
DOWN = np.diag([1.0, -1.0, -1.0])


def draws(n=5):
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
    return {
        "qpos": rng.normal(size=(n, 7)), "jacobian": rng.normal(size=(n, 6, 7)), "turn": turn,
        "grip": rng.uniform(CONFIG.low_m, CONFIG.high_m, (n, 3)), "action": rng.uniform(-2, 2, (n, 4)),
    }  # fmt: skip


def steer(grip, qpos, jacobian, turn, action, down):
    command = advance_command(grip, grip, action, CONFIG)
    return command, joint_targets(qpos, jacobian, grip, turn, command, down, CONFIG.damping)


def test_numpy_and_torch_agree():
    arrays = draws()
    tensors = {name: torch.as_tensor(values) for name, values in arrays.items()}
    ours, theirs = steer(**arrays, down=DOWN), steer(**tensors, down=torch.as_tensor(DOWN))
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, np.ndarray) and isinstance(b, torch.Tensor)
        assert a.shape == tuple(b.shape) and np.abs(a - b.numpy()).max() < 1e-10


def test_a_step_of_the_joints_moves_the_hand_toward_the_command():
    arrays = draws()
    arrays["turn"] = np.repeat(DOWN[None], 5, axis=0)  # already as it should be held
    command, joints = steer(**arrays, down=DOWN)
    moved = (arrays["jacobian"] @ (joints - arrays["qpos"])[..., None])[..., 0]
    assert np.abs(moved[:, :3] - (command - arrays["grip"])).max() < 0.002  # to first order, but for the damping
    assert np.abs(moved[:, 3:]).max() < 0.002


def test_the_command_stays_near_the_hand_and_inside_the_workspace():
    arrays = draws()
    far = arrays["grip"] + 1.0
    for command in (far, torch.as_tensor(far)):
        grip = arrays["grip"] if command is far else torch.as_tensor(arrays["grip"])
        new = np.asarray(advance_command(command, grip, command[:, [0, 0, 0, 0]] * 0.0, CONFIG))
        assert (new - arrays["grip"] <= CONFIG.max_lead_m + 1e-12).all() and (new <= CONFIG.high_m).all()
