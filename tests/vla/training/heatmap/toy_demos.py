"""Small demonstrations with depth: two cameras look at a hand that picks and places."""

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
