"""Observations with depth and calibration, and an untrained policy that reads them."""

from dataclasses import replace

import numpy as np

from tests.vla.toy_backbone import CAMERAS, SPEC, toy_backbone, toy_observation, toy_stats
from vla.model.config import BridgeConfig, VLAConfig, XYZConfig
from vla.model.model import VLA

B, V, SIZE = 3, 2, 8


def cameras(seed=0, size=SIZE, batch=B):
    """Depth, intrinsics and extrinsics of B observations from two cameras that look down at a table, by name."""
    rng = np.random.default_rng(seed)
    found = {"depth": {}, "intrinsics": {}, "extrinsics": {}}
    for camera in CAMERAS:
        found["depth"][camera] = rng.uniform(0.3, 1.5, (batch, size, size)).astype(np.float32)
        focal = size * 1.2
        found["intrinsics"][camera] = np.tile(
            np.array([[focal, 0, size / 2], [0, focal * 1.1, size / 2 - 1], [0, 0, 1]], np.float32), (batch, 1, 1)
        )
        turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(batch)]
        turns = [turn * np.linalg.det(turn) for turn in turns]  # rotations, not mirrors
        matrix = np.tile(np.eye(4, dtype=np.float32), (batch, 1, 1))
        matrix[:, :3, :3], matrix[:, :3, 3] = np.stack(turns), rng.uniform(-0.5, 0.5, (batch, 3))
        found["extrinsics"][camera] = matrix
    return found


def observation(seed=0, **views):
    return replace(toy_observation(size=SIZE), **(cameras(seed) | views))


def policy(xyz=XYZConfig(), **bridge):
    shape = BridgeConfig(width=16, heads=2, kv_heads=1, **({"gate_init": 0.5} | bridge))
    config = VLAConfig(backbone="toy", bridge=shape, xyz=xyz)
    backbone = toy_backbone(point_dim=3 * V)
    vla = VLA.build(config, stats=toy_stats(), action_spec=SPEC, cameras=CAMERAS, image_size=SIZE, backbone=backbone)
    return vla.eval()
