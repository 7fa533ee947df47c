"""Depth and calibration place a known corner within 2 mm, wherever the camera stands, on both backends."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from envs import make_vec
from envs.make import episode_source
from envs.perturb.perturbation import Perturbation, parse, randomisation
from envs.registry import load_suite
from envs.sim.render_options import drawn_for
from envs.tabletop.episode_source import EpisodeSource
from envs.tabletop.shapes import KINDS
from tests.envs.geometry import backproject
from vla.core.types import PolicySpec
from vla.model.xyz import back_project, look_up

PICK, SEED, SIZE = "tabletop-pick", 100, 512
BACKENDS = ["cpu", *(["warp"] if find_spec("mujoco_warp") else [])]


def top_corners(episode, scene) -> np.ndarray:
    """(N, 3) m of the upper corners of every cube on the table."""
    half = KINDS["cube"].parts[0].size[0]
    found = []
    for slot, (x, y, yaw) in zip(episode.slots, episode.poses, strict=True):
        if scene.objects[slot] == "cube":
            turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
            for sx, sy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                found.append([*(np.array([x, y]) + turn @ [sx * half, sy * half]), 2 * half])
    return np.array(found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_known_corner_is_found_within_2_mm(backend):
    perturb = Perturbation(azimuths=(35.0,))
    options = {"backend": "warp", "device": "cpu"} if backend == "warp" else {"num_workers": 1}
    env = make_vec(PICK, 1, image_size=SIZE, depth=True, calibration=True, perturb=perturb, **options)
    try:
        obs = env.reset(seeds=[SEED])
    finally:
        env.close()
    source = EpisodeSource(load_suite(PICK))
    corners = top_corners(source.sample(SEED), source.scene)
    assert len(corners) >= 4
    camera = "front"
    parts = [torch.from_numpy(part[camera][:, None]) for part in (obs.depth, obs.intrinsics, obs.extrinsics)]
    seen, known = back_project(*parts)
    away = torch.linalg.vector_norm(seen[0, 0][:, :, None] - torch.from_numpy(corners).float(), dim=-1)
    nearest = away.where(known[0, 0][..., None], torch.tensor(np.inf)).flatten(0, 1).amin(0)
    assert (nearest < 0.002).all(), nearest
    slow = backproject(obs.depth[camera][0], obs.intrinsics[camera][0], obs.extrinsics[camera][0])
    assert np.abs(seen[0, 0].numpy() - slow)[known[0, 0].numpy()].max() < 1e-5
    # ... and so is the middle of a cube's top, looked up where the camera's matrices say that it is seen.
    middle = corners[:4].mean(0)
    at = np.linalg.inv(obs.extrinsics[camera][0].astype(np.float64)) @ np.array([*middle, 1.0])
    u, v, w = obs.intrinsics[camera][0] @ at[:3]
    xy = torch.tensor([[[u / w, v / w]]], dtype=torch.float32) / SIZE * 2 - 1
    found, sure = look_up(*parts, xy, torch.tensor([0]))
    assert sure.all() and np.abs(found[0, 0].numpy() - middle).max() < 0.002


def test_azimuths_turn_the_fixed_camera_about_the_point_that_it_looks_at():
    def matrices(*azimuths):
        env = make_vec(
            PICK, 2, num_workers=1, image_size=16, calibration=True, perturb=Perturbation(azimuths=azimuths) or None
        )
        try:
            return env.reset(seeds=[3, 4]).extrinsics
        finally:
            env.close()

    plain, turned = matrices(), matrices(30.0)
    assert np.allclose(plain["wrist"], turned["wrist"])
    before, after = plain["front"][0].astype(float), turned["front"][0].astype(float)
    angle = np.deg2rad(30)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    assert np.allclose(after[:3, :3], turn @ before[:3, :3], atol=1e-6)
    on_table = [eye[:3, 3] - eye[:3, 2] * eye[2, 3] / eye[2, 2] for eye in (before, after)]  # where the axis meets it
    assert np.allclose(on_table[0], on_table[1], atol=1e-6)
    assert np.linalg.norm(before[:3, 3] - on_table[0]) == pytest.approx(np.linalg.norm(after[:3, 3] - on_table[0]))


def test_azimuths_are_drawn_by_seed_and_said_in_words():
    perturb = parse(["azimuths=-20,0,30", "camera=0.5"])
    assert perturb.azimuths == (-20.0, 0.0, 30.0) and perturb.any() and perturb.camera == 0.5
    assert parse(perturb.words().split()) == perturb
    assert randomisation(["azimuths=10"]).azimuths == (10.0,)
    drawn = [perturb.azimuth(seed) for seed in range(60)]
    assert set(drawn) == set(perturb.azimuths) and drawn == [perturb.azimuth(seed) for seed in range(60)]
    assert Perturbation().azimuth(0) == 0.0 and not Perturbation().any()
    assert episode_source(Perturbation(azimuths=(1.0,))) is not EpisodeSource
    for words in (["azimuths=1,two"], ["azimuths=200"], ["azimuths=1", "azimuths=2"]):
        with pytest.raises(ValueError, match="azimuths"):
            parse(words)


class Reads:
    def __init__(self, depth):
        self.spec = PolicySpec(picture_size=32, depth=depth)


def test_depth_is_drawn_only_for_a_policy_that_reads_it():
    assert drawn_for(Reads(None)) == drawn_for(Reads(False)) == {"image_size": 32, "depth": False, "calibration": False}
    assert drawn_for(Reads(True)) == {"image_size": 32, "depth": True, "calibration": True}
    assert drawn_for(None)["depth"] is False
