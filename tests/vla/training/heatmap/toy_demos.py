"""Small demonstrations with depth: two cameras look at a hand that picks and places."""

from dataclasses import replace

import numpy as np

from vla.data.camera_geometry import CameraGeometry
from vla.data.lerobot_dataset import DemoSet

NAMES = ("grip_x", "grip_y", "grip_z", "lead_x", "lead_y", "lead_z", "finger_opening", "gripper_command")
SIZE = 24


def toy_demos(*, depth=True, action_names=("dx", "dy", "dz", "gripper"), still=False):
    """Two episodes of 40 frames: down to a thing, closed from frame 15 on, up and away."""
    parts = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        home, thing, up = np.array([0.5, 0.0, 0.25]), np.array([0.55, 0.1 - 0.2 * seed, 0.03]), [0.5, 0.0, 0.2]
        way = [np.linspace(home, thing, 15, endpoint=False), np.tile(thing, (5, 1)), np.linspace(thing, up, 21)]
        hand = np.concatenate(way)
        action = np.diff(hand, axis=0) / 0.02
        opened = np.where(np.arange(40) < 15, 1.0, -1.0)
        state = np.concatenate([hand[:40], np.zeros((40, 3)), np.clip(opened, 0, 1)[:, None], opened[:, None]], 1)
        grip = np.ones((40, len(action_names) - 3)) * opened[:, None]
        parts.append((state, np.concatenate([0 * action if still else action, grip], 1), rng))
    state, action = (np.concatenate([part[k] for part in parts]).astype(np.float32) for k in (0, 1))
    rng, count = parts[0][2], len(state)
    looking_down = np.diag([1.0, -1.0, -1.0, 1.0]).astype(np.float32)
    looking_down[:3, 3] = [0.53, 0.0, 0.8]
    inner = np.array([[SIZE, 0, SIZE / 2], [0, SIZE, SIZE / 2], [0, 0, 1]], np.float32)
    geometry = {
        name: CameraGeometry(
            rng.integers(600, 800, (count, SIZE, SIZE)).astype(np.uint16),
            np.tile(inner, (count, 1, 1)), np.tile(looking_down, (count, 1, 1)),
        )
        for name in ("front", "wrist")
    }  # fmt: skip
    return DemoSet(
        images={name: rng.integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8) for name in geometry},
        proprio=state, action=action, instruction=["pick up the red cube"] * 40 + ["pick up the blue ball"] * 40,
        episode_index=np.repeat([0, 1], 40), fps=20.0, action_names=action_names, proprio_names=NAMES,
        geometry=geometry if depth else {},
    )  # fmt: skip


TURNING = ("eef_x", "eef_y", "eef_z", "eef_qw", "eef_qx", "eef_qy", "eef_qz", "finger_left", "finger_right")


def turning_demos(yaws=(0.3, -0.5), *, table_m=0.8):
    """The same of a hand that turns to each thing's yaw on its way down, as robosuite's demonstrations are named: on a
    table, by rotations of 0.2 rad for an action of 1, the gripper open at -1."""
    plain = toy_demos()
    count = len(plain.proprio)
    share = np.tile(np.clip(np.arange(40) / 14, 0, 1), 2)
    yaw = np.repeat(yaws, 40) * share
    down = np.stack([np.zeros(count), np.cos(yaw / 2), np.sin(yaw / 2), np.zeros(count)], 1)  # points down, then yaw
    fingers = np.where(plain.proprio[:, 7:] > 0, 0.04, 0.02) * [1, -1]
    state = np.concatenate([plain.proprio[:, :3] + [0, 0, table_m], down, fingers], 1).astype(np.float32)
    turn = np.zeros((count, 3))
    turn[:-1, 2] = np.diff(yaw) / 0.2
    turn[39] = 0
    action = np.concatenate([plain.action[:, :3], turn, -plain.action[:, 3:]], 1).astype(np.float32)
    raised = {}
    for name, camera in plain.geometry.items():
        outer = camera.extrinsics.copy()
        outer[:, 2, 3] += table_m
        raised[name] = replace(camera, extrinsics=outer)
    return replace(
        plain, proprio=state, action=action, proprio_names=TURNING, geometry=raised,
        action_names=("dx", "dy", "dz", "rx", "ry", "rz", "gripper"),
    )  # fmt: skip
