"""Orthographic views and their heat-maps, against references written from the definition."""

import numpy as np
import pytest
import torch

from vla.model.heatmap.config import Workspace
from vla.model.heatmap.model import Cloud
from vla.model.heatmap.orthographic import COMPONENTS, SIGNS, back_project, project, render
from vla.model.heatmap.volume import log_volume, peak, sample_views, soft_targets

WORKSPACE = Workspace(centre_m=(0.5, 0.0, 0.2), half_m=0.24, resolution=48, splat_m=0.0)


def cube(batch=1, half=0.24):
    return torch.tensor(WORKSPACE.centre_m).expand(batch, 3), torch.full((batch,), half)


def test_positions_come_back_from_their_pixels_within_a_millimetre():
    """A position's three pixels say where it is: each component is seen in two views."""
    rng = np.random.default_rng(0)
    centre, half = cube(1)
    points = torch.from_numpy(rng.uniform(-0.23, 0.23, (1, 500, 3)).astype(np.float32)) + centre
    pixel = project(points, centre, half, 96)
    for view in range(3):
        for place in range(2):
            part, sign = COMPONENTS[view][place], SIGNS[view][place]
            unit = sign * (pixel[0, view, :, place] / 96 - 0.5) * 2
            back = centre[0, part] + half[0] * unit
            assert (back - points[0, :, part]).abs().max() < 1e-3


def test_depth_of_a_known_camera_gives_the_points_it_saw():
    """Points are projected through a turned camera by the textbook formula, and come back from pixel centres."""
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    world_from_camera = np.eye(4)
    world_from_camera[:3, :3], world_from_camera[:3, 3] = turn, [0.3, -0.2, 0.9]
    inner = np.array([[70.0, 0, 31.0], [0, 75.0, 25.0], [0, 0, 1]])
    depth = rng.uniform(0.3, 1.5, (50, 60)).astype(np.float32)
    found = back_project(*(torch.from_numpy(a.astype(np.float32))[None] for a in (depth, inner, world_from_camera)))
    for row, column in ((0, 0), (49, 59), (20, 33)):
        local = np.linalg.inv(turn) @ (found[0, row, column].numpy().astype(float) - world_from_camera[:3, 3])
        u, v, w = inner @ local
        assert (u / w, v / w, local[2]) == pytest.approx((column + 0.5, row + 0.5, depth[row, column]), abs=1e-3)


def slow_render(points, colours, seen, centre, half, workspace):
    """One pixel at a time, from the definition."""
    side = workspace.resolution
    reach = round(workspace.splat_m * side / (2 * half))
    out = np.full((3, side, side, 3), workspace.background, np.uint8)
    best = np.full((3, side, side), -np.inf)
    for point, colour, there in zip(points, colours, seen, strict=True):
        unit = (point - centre) / (2 * half)
        if not there or np.abs(unit).max() >= 0.5:
            continue
        for view, (parts, signs) in enumerate(zip(COMPONENTS, SIGNS, strict=True)):
            u, v, near = (sign * unit[part] + 0.5 for part, sign in zip(parts, signs, strict=True))
            column, row = int(u * side), int(v * side)
            for r in range(max(0, row - reach), min(side, row + reach + 1)):
                for c in range(max(0, column - reach), min(side, column + reach + 1)):
                    if near > best[view, r, c]:
                        best[view, r, c], out[view, r, c] = near, colour
    return out


@pytest.mark.parametrize("splat_m", [0.0, 0.01])
def test_the_nearest_point_is_seen(splat_m):
    rng = np.random.default_rng(2)
    workspace = Workspace(WORKSPACE.centre_m, 0.24, 24, splat_m)
    points = rng.uniform(-0.27, 0.27, (2, 400, 3)).astype(np.float32) + np.array(workspace.centre_m, np.float32)
    colours = rng.integers(0, 256, (2, 400, 3)).astype(np.uint8)
    seen = rng.random((2, 400)) < 0.8
    half = np.array([0.24, 0.12], np.float32)
    tensors = map(torch.from_numpy, (points, colours, seen))
    views = render(*tensors, cube(2)[0], torch.from_numpy(half), workspace)
    for scene in range(2):
        wanted = slow_render(points[scene], colours[scene], seen[scene], workspace.centre_m, half[scene], workspace)
        np.testing.assert_array_equal(views[scene].numpy(), wanted)


def test_order_of_points_does_not_matter():
    """Two colours at one place: the same one is seen, whichever comes first."""
    points = torch.tensor([[[0.5, 0.0, 0.2], [0.5, 0.0, 0.2]]])
    colours = torch.tensor([[[200, 0, 0], [0, 200, 0]]], dtype=torch.uint8)
    seen = torch.ones(1, 2, dtype=torch.bool)
    one = render(points, colours, seen, *cube(), WORKSPACE)
    other = render(points, colours.flip(1), seen, *cube(), WORKSPACE)
    assert torch.equal(one, other)


def test_nothing_measured_is_no_point():
    depth = torch.tensor([[[[0.0, 0.5], [float("nan"), float("inf")]]]])
    inner, outer = torch.eye(3)[None, None], torch.eye(4)[None, None]
    cloud = Cloud.of(torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8), depth, inner, outer)
    assert cloud.seen_BN.tolist() == [[False, True, False, False]]
    assert torch.isfinite(cloud.points_BN3).all()


def test_volume_is_the_sum_over_the_pixels_that_a_cell_falls_on():
    rng = np.random.default_rng(3)
    heat = torch.from_numpy(rng.random((1, 3, 8, 8)).astype(np.float32))
    heat = heat / heat.sum((-1, -2), keepdim=True)
    centre, half = cube()
    volume = log_volume(heat)[0]
    axis = (torch.arange(8) + 0.5) / 8 * 2 - 1
    for _ in range(40):
        x, y, z = rng.integers(0, 8, 3)
        at = centre[0] + half[0] * torch.stack([axis[x], axis[y], axis[z]])
        pixel = project(at[None, None], centre, half, 8)[0, :, 0].long()
        wanted = sum(torch.log(heat[0, view, pixel[view, 1], pixel[view, 0]] + 1e-4) for view in range(3))
        assert float(volume[x, y, z]) == pytest.approx(float(wanted), rel=1e-5)


def test_the_peak_is_that_of_the_volume():
    rng = np.random.default_rng(5)
    heat = torch.from_numpy(rng.random((6, 3, 9, 9)).astype(np.float32))
    heat = heat / heat.sum((-1, -2), keepdim=True)
    centre, half = cube(6)
    best = log_volume(heat).flatten(1).argmax(1)
    cell = torch.stack([best // 81, best // 9 % 9, best % 9], -1)
    assert peak(heat, centre, half).allclose(centre + half[:, None] * ((cell + 0.5) / 9 * 2 - 1), atol=1e-6)


def test_the_peak_after_zooming_is_the_cell_that_holds_the_point():
    """A first look finds the cell, a second look at its surroundings a cell of a quarter of that size."""
    rng = np.random.default_rng(4)
    points = torch.from_numpy(rng.uniform(-0.2, 0.2, (20, 3)).astype(np.float32)) + cube(1)[0]
    centre, half = cube(20)
    for _ in range(2):
        heat = soft_targets(points, centre, half, 48, sigma_px=1.5)
        assert heat.sum((-1, -2)).allclose(torch.ones(20, 3))
        found = peak(heat, centre, half)
        assert ((found - points).abs() <= half[:, None] / 48 * (1 + 1e-3)).all()
        centre, half = found, half / 4


def test_a_point_outside_of_a_view_teaches_it_nothing():
    centre, half = cube()
    above = centre + torch.tensor([0.0, 0.0, 0.3])
    heat = soft_targets(above, centre, half, 48, sigma_px=1.5)
    assert heat[0, 0].sum() == pytest.approx(1) and heat[0, 1:].sum() == 0


def test_features_are_gathered_where_the_point_is_drawn():
    maps = torch.arange(3 * 6 * 6, dtype=torch.float32).view(1, 3, 1, 6, 6)
    centre, half = cube()
    at = centre + torch.tensor([0.1, -0.05, 0.2])
    pixel = project(at[:, None], centre, half, 6)[0, :, 0].long()
    wanted = [float(maps[0, view, 0, pixel[view, 1], pixel[view, 0]]) for view in range(3)]
    assert sample_views(maps, at, centre, half)[0].tolist() == wanted
