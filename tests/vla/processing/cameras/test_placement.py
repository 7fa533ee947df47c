"""Extrinsics of the wrong way round, told by what cameras measure and how they move; right ones stay silent."""

from dataclasses import replace

import numpy as np
import pytest

from vla.processing.cameras.placement import THIN, Look, against_the_hand, apart, confirmed

SIZE, FRAMES = 32, 24
NAMES = ("grip_x", "grip_y", "grip_z", "grip_qx", "grip_qy", "grip_qz")
EPISODE = np.repeat([0, 1], FRAMES // 2)


def looking(eye, at):
    """world_from_camera of a camera at `eye` that looks at `at`: x right, y down, z forward."""
    forward = (np.asarray(at) - eye) / np.linalg.norm(np.asarray(at) - eye)
    right = np.cross(forward, [0.0, 0.01, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    pose[:3, 3] = eye
    return pose


def table_look(poses):
    """The measurements of cameras with these poses (N, 4, 4) of a table at z = 0, without end."""
    lens = np.array([[SIZE, 0, SIZE / 2], [0, SIZE, SIZE / 2], [0, 0, 1.0]])
    v, u = np.mgrid[:SIZE, :SIZE] + 0.5
    rays = np.stack([(u - SIZE / 2) / SIZE, (v - SIZE / 2) / SIZE, np.ones_like(u)], -1)
    down = np.einsum("nij,hwj->nhwi", poses[:, :3, :3], rays)[..., 2]
    depth = np.where(down < -1e-3, -poses[:, None, None, 2, 3] / np.minimum(down, -1e-3), 0)
    return Look(
        depth.astype(np.float32), np.tile(lens, (len(poses), 1, 1)).astype(np.float32), poses.astype(np.float32)
    )


def scene():
    """(looks, state): a camera beside the table, and one above a hand that moves and turns."""
    t = np.linspace(0, 3, FRAMES)
    hand = np.stack([0.5 + 0.1 * np.sin(2 * t), 0.12 * np.cos(3 * t), 0.2 + 0.05 * np.sin(t)], 1)
    lever = 0.05 * np.stack([np.cos(0.3 * t), np.sin(0.3 * t), np.ones_like(t)], 1)
    wrist = np.stack([looking(eye, eye - [0.02, 0, 1]) for eye in hand + lever])
    front = np.tile(looking([1.2, 0.1, 0.8], [0.5, 0, 0]), (FRAMES, 1, 1))
    turned = np.random.default_rng(0).normal(size=(FRAMES, 3))
    return {"front": table_look(front), "wrist": table_look(wrist)}, np.concatenate([hand, turned], 1)


def test_what_one_camera_measures_the_other_confirms():
    """By a slow count: each point into the other picture, and the depth of its pixel."""
    looks, _ = scene()
    one, other = looks["wrist"], looks["front"]
    inverse, found, every = np.linalg.inv(other.extrinsics_N44.astype(float)), 0, 0
    for n in range(FRAMES):
        for row in range(0, SIZE, THIN):
            for column in range(0, SIZE, THIN):
                depth = float(one.depth_NHW[n, row, column])
                if not 0.01 < depth < 10:
                    continue
                every += 1
                ray = np.array([(column + 0.5 - SIZE / 2) / SIZE, (row + 0.5 - SIZE / 2) / SIZE, 1, 1 / depth]) * depth
                x, y, z, _ = inverse[n] @ one.extrinsics_N44[n] @ ray
                u, v = x / z * SIZE + SIZE / 2, y / z * SIZE + SIZE / 2
                if z > 0.01 and 0 <= u < SIZE and 0 <= v < SIZE:
                    found += abs(other.depth_NHW[n, int(v), int(u)] - z) < 0.03
    assert confirmed(one, other) == pytest.approx(found / every, abs=0.005) and found / every > 0.8


@pytest.mark.parametrize("turned", [(), ("front",), ("front", "wrist")])
def test_the_cameras_that_meet_by_the_inverse_are_named(turned):
    looks, _ = scene()
    given = {name: look.inverted() if name in turned else look for name, look in looks.items()}
    told = apart(given)
    assert [cameras for cameras, _ in told] == ([turned] if turned else [])
    assert all("'front' and 'wrist'" in text and "robot_from_camera" in text for _, text in told)


def test_cameras_that_see_nothing_in_common_are_not_told():
    looks, _ = scene()
    away = looks["wrist"].extrinsics_N44.copy()
    away[:, 1, 3] += 7
    assert apart({**looks, "wrist": replace(looks["wrist"], extrinsics_N44=away)}) == []
    blind = replace(looks["wrist"], depth_NHW=0 * looks["wrist"].depth_NHW)
    assert apart({**looks, "wrist": blind}) == apart({"front": looks["front"]}) == []


def test_a_camera_on_the_hand_moves_with_it():
    looks, state = scene()
    poses = {name: look.extrinsics_N44 for name, look in looks.items()}
    assert against_the_hand(poses, state, NAMES, EPISODE) == []
    inverse = {name: np.linalg.inv(pose) for name, pose in poses.items()}
    ((cameras, text),) = against_the_hand(inverse, state, NAMES, EPISODE)
    assert cameras == ("wrist",) and "moves with the hand" in text and "not camera_from_robot" in text
    # In millimetres as well; and nothing is said where the state does not name a place, or nothing moves.
    assert against_the_hand(inverse, 1000 * state, NAMES, EPISODE) and not against_the_hand(
        poses, 1000 * state, NAMES, EPISODE
    )
    assert against_the_hand(inverse, state, ("a", *NAMES[1:]), EPISODE) == []
    assert against_the_hand(inverse, 0 * state, NAMES, EPISODE) == []
    # A camera beside the robot that is put elsewhere between episodes does not ride on the hand.
    beside = np.where(EPISODE[:, None, None] > 0, looking([0.2, 1.2, 0.7], [0.5, 0, 0]), poses["front"])
    assert against_the_hand({"front": np.linalg.inv(beside)}, state, NAMES, EPISODE) == []
    # Nor does one that sweeps by itself, by chance against the hand along one axis.
    wide = state * [3, 0.3, 0.3, 1, 1, 1]
    swept = np.tile(np.diag([1.0, -1.0, -1.0, 1.0]), (FRAMES, 1, 1))
    swept[:, :3, 3] = wide[:, :3] * [-1, 0, 0] + np.random.default_rng(3).normal(size=(FRAMES, 3)) * [0, 0.1, 0.1]
    assert against_the_hand({"neck": swept}, wide, NAMES, EPISODE) == []
