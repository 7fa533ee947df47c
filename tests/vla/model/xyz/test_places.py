"""Places in the robot's frame: the arithmetic against the equation, and that a policy reads them as it says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.envs.geometry import backproject
from tests.vla.depth_policy import SIZE, B, V, cameras, observation, policy
from tests.vla.toy_backbone import CAMERAS, load_toy, toy_observation
from vla.model.config import VLAConfig, XYZConfig, model_problem
from vla.model.heads.residual import Latents
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.model.xyz import back_project, look_up, normalised, point_dim, with_xyz
from vla.processing.cameras.depth import depth_views


def tensors(obs):
    return [torch.from_numpy(part) for part in depth_views(CAMERAS, SIZE, obs)]


def test_every_pixel_as_the_equation_says():
    obs = observation()
    seen, known = back_project(*tensors(obs))
    assert seen.shape == (B, V, SIZE, SIZE, 3) and known.all()
    for b in range(B):
        for v, camera in enumerate(CAMERAS):
            slow = backproject(*(getattr(obs, name)[camera][b] for name in ("depth", "intrinsics", "extrinsics")))
            np.testing.assert_allclose(seen[b, v], slow, atol=1e-5)


def test_a_place_is_looked_up_in_its_own_view_at_its_own_pixel():
    views = tensors(observation())
    seen, _ = back_project(*views)
    places = [(0, 0, 0), (1, 2, 5), (1, SIZE - 1, SIZE - 1), (0, 6, 1)]
    xy = torch.tensor([[(c + 0.5) / SIZE * 2 - 1, (r + 0.5) / SIZE * 2 - 1] for _, r, c in places])
    found, known = look_up(*views, xy.expand(B, -1, -1), torch.tensor([v for v, _, _ in places]))
    want = torch.stack([seen[:, v, r, c] for v, r, c in places], 1)
    assert known.all() and torch.allclose(found, want, atol=1e-5)
    # Within a pixel the ray moves, the depth does not; beyond the edge the edge's depth is read.
    beside, _ = look_up(*views, (xy + 0.3 / SIZE).expand(B, -1, -1), torch.tensor([v for v, _, _ in places]))
    assert 1e-4 < (beside - found).abs().max() < 0.1
    _, known = look_up(*views, torch.tensor([[[7.0, -7.0]]]).expand(B, -1, -1), torch.tensor([0]))
    assert known.all()


@pytest.mark.parametrize("nothing", [0.0, np.nan, np.inf, -1.0, 50.0])
def test_what_was_not_measured_is_nowhere(nothing):
    vla = policy()
    obs = observation()
    for camera in CAMERAS:
        obs.depth[camera][:] = nothing
    features = vla.encode(vla.processor.prepare(obs))
    assert (features.raw_xyz_BNE == 0).all() and (features.points_xyz_BQE == 0).all()
    assert np.isfinite(vla.predict(vla.processor.prepare(obs))).all()


def test_the_view_that_sees_best_says_where_and_garbage_in_the_other_is_not_heard():
    vla = policy()
    inp = vla.processor.prepare(observation())
    features = vla.encode(inp)
    points = features.points_BQE.unflatten(-1, (V, 3)).clone()
    points[..., 0, 2], points[..., 1, 2] = 0.0, 0.9  # only the second view sees anything
    xyz = with_xyz(replace(features, points_BQE=points.flatten(2)), inp, XYZConfig()).points_xyz_BQE
    views = (inp.depth_BVHW, inp.intrinsics_BV33, inp.extrinsics_BV44)
    want, _ = look_up(*views, points[:, :, 1, :2], torch.ones(points.shape[1], dtype=torch.int64))
    assert torch.allclose(xyz[..., :3], normalised(want, XYZConfig()), atol=1e-4)
    for view in range(V):  # from every camera, also from the one that does not see it
        away = (want - inp.extrinsics_BV44[:, None, view, :3, 3]).double()
        length = away.norm(dim=-1, keepdim=True)
        slow = away / length * 3 * torch.tanh(length / 0.3)
        assert torch.allclose(xyz[..., 3 + 3 * view : 6 + 3 * view].double(), slow, atol=1e-4)
    assert torch.equal(xyz[..., 3 + 3 * V :], points[..., 2]) and xyz.shape[-1] == point_dim(V)
    blind = replace(inp, depth_BVHW=inp.depth_BVHW.clone())
    blind.depth_BVHW[:, 0] = torch.nan
    again = with_xyz(replace(features, points_BQE=points.flatten(2)), blind, XYZConfig()).points_xyz_BQE
    assert torch.equal(again, xyz)


def test_a_point_of_the_table_is_the_same_whatever_camera_sees_it():
    """Two cameras, one plane: the depth maps differ, the coordinates of one point in both do not."""
    point, size = np.array([0.5, 0.1, 0.0]), 64
    found = []
    for eye in ([1.2, 0.3, 0.7], [0.2, -0.6, 0.9]):
        forward = point - eye + np.array([0.03, -0.02, 0.0])
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = np.stack([right, np.cross(forward, right), forward], 1), eye
        inner = np.array([[80.0, 0, 32], [0, 80, 32], [0, 0, 1]])
        u, v = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
        rays = np.stack([(u - 32) / 80, (v - 32) / 80, np.ones_like(u)], -1) @ matrix[:3, :3].T
        depth = -eye[2] / rays[..., 2]
        at = matrix[:3, :3].T @ (point - eye)
        xy = (inner @ at / at[2])[:2] / size * 2 - 1
        views = [torch.tensor(part, dtype=torch.float32)[None, None] for part in (depth, inner, matrix)]
        xyz, known = look_up(*views, torch.tensor(xy, dtype=torch.float32)[None, None], torch.tensor([0]))
        assert known.all()
        found.append(xyz[0, 0].numpy())
    # The pixel's depth is that of its centre, half a pixel away at most.
    assert np.abs(found[0] - found[1]).max() < 0.015 and np.abs(found[0] - point).max() < 0.015


def test_the_policy_reads_places_in_metres_and_no_pixels():
    vla = policy(raw=False)
    inp = vla.processor.prepare(observation())
    features = vla.encode(inp)
    action = vla.act(features, inp.proprio_BP)
    shifted = replace(features, points_BQE=features.points_BQE + 0.3, coords_NE=features.coords_NE + 0.3)
    assert torch.equal(vla.act(shifted, inp.proprio_BP), action)
    moved = inp.extrinsics_BV44.clone()
    moved[..., 0, 3] += 0.2
    elsewhere = vla.act(vla.encode(replace(inp, extrinsics_BV44=moved)), inp.proprio_BP)
    assert (elsewhere - action).abs().max() > 1e-3
    points = Latents.of(vla.bridge, features, inp.proprio_BP).points_BE  # what RL's residual reads
    assert torch.equal(points, features.points_xyz_BQE.flatten(1))
    vla.add_refiner(8, seed=0)
    assert torch.equal(vla.act(features, inp.proprio_BP), action)


def test_raw_tokens_carry_their_places():
    vla = policy(queries=False)
    inp = vla.processor.prepare(observation())
    features = vla.encode(inp)
    assert (
        features.raw_xyz_BNE.shape == (B, features.coords_NE.shape[0], 4) and (features.raw_xyz_BNE[..., 3] == 1).all()
    )
    elsewhere = replace(features, raw_xyz_BNE=features.raw_xyz_BNE * torch.tensor([-1.0, 1, 1, 1]))
    assert (vla.act(elsewhere, inp.proprio_BP) - vla.act(features, inp.proprio_BP)).abs().max() > 1e-4
    unplaced = replace(features, raw_xyz_BNE=None)
    with pytest.raises(ValueError, match="robot's frame"):
        vla.act(unplaced, inp.proprio_BP)


def test_a_policy_without_it_is_as_it_was():
    plain, with_it = policy(xyz=None), policy()
    extra = {name for name in with_it.state_dict() if name not in plain.state_dict()}
    assert {name.split(".")[1] for name in extra} == {"embed_xyz"}
    obs = observation()
    inp = plain.processor.prepare(obs)  # depth is there, and not read
    assert inp.depth_BVHW is None and len(inp.arrays) == 4
    features = plain.encode(inp)
    assert features.raw_xyz_BNE is None and features.points_xyz_BQE is None
    assert features.pointed_BQE is features.points_BQE
    assert not VLAPolicy(plain).spec.depth and VLAPolicy(with_it).spec.depth


def test_it_is_saved_loaded_and_acts_the_same_alone_and_in_a_batch(tmp_path):
    vla = policy()
    vla.save(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["model"]["xyz"]["scale_m"] == 0.1
    again = VLA.load(tmp_path / "policy", load_backbone=load_toy)
    obs = observation()
    acted = VLAPolicy(again).act(obs)
    np.testing.assert_allclose(acted, vla.predict(vla.processor.prepare(obs)), atol=1e-5)
    np.testing.assert_allclose(VLAPolicy(again).act(obs.select([1])), acted[1:2], atol=1e-5)
    some = replace(obs, live=np.array([True, False, True]))
    np.testing.assert_allclose(VLAPolicy(again).act(some)[[0, 2]], acted[[0, 2]], atol=1e-5)


def test_what_is_missing_is_named():
    vla = policy()
    full = observation()
    for name in ("depth", "intrinsics", "extrinsics"):
        lacking = replace(full, **{name: {CAMERAS[0]: getattr(full, name)[CAMERAS[0]]}})
        with pytest.raises(ValueError, match=f"lacks the {name} of camera '{CAMERAS[1]}'"):
            vla.processor.prepare(lacking)
        with pytest.raises(ValueError, match=f"lacks the {name} of camera '{CAMERAS[0]}'"):
            VLAPolicy(vla).act(replace(full, **{name: None}))
    small = {camera: array[:, :4] for camera, array in full.depth.items()}
    with pytest.raises(ValueError, match="4x8 pixels, its picture 8x8|align"):
        vla.processor.prepare(replace(full, depth=small))
    whole = {camera: array.astype(np.uint16) for camera, array in full.depth.items()}
    with pytest.raises(ValueError, match="must be floats"):
        vla.processor.prepare(replace(full, depth=whole))
    assert "metres" in model_problem(VLAConfig(xyz=XYZConfig(scale_m=0.0)))


def test_a_map_of_another_size_gives_the_same_places():
    large = replace(toy_observation(), **cameras(size=4 * SIZE), images={})
    depth, inner, outer = (torch.from_numpy(part) for part in depth_views(CAMERAS, SIZE, large))
    seen, _ = back_project(depth, inner, outer)
    full, _ = back_project(*(torch.from_numpy(part) for part in depth_views(CAMERAS, 4 * SIZE, large)))
    assert torch.allclose(depth[0, 0, 1, 2], torch.from_numpy(large.depth[CAMERAS[0]])[0, 6, 10])
    pixel_m = 1.5 / (1.2 * 4 * SIZE)  # between the centres of a large pixel and of the small one that is sampled
    assert (seen - full[:, :, 2::4, 2::4]).abs().max() < 1.5 * pixel_m
