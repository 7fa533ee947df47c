"""Heat-maps of the three views -> one position: back-projected onto a grid of the workspace and summed."""

from __future__ import annotations

import torch
from torch import Tensor

from vla.model.heatmap.orthographic import COMPONENTS, SIGNS, project

_FLOOR = 1e-4
"""Probability below which a view's verdict is not held against a place: it may be hidden there."""


def soft_targets(points_B3: Tensor, centre_B3: Tensor, half_B: Tensor, resolution: int, *, sigma_px: float) -> Tensor:
    """Heat-maps (B, 3 views, R, R) that sum to 1: a Gaussian around each point's pixel, cut at three deviations.

    A view in which the point lies outside of the cube holds zeros: nothing is learnt there.
    """
    pixel = project(points_B3[:, None], centre_B3, half_B, resolution)[:, :, 0]
    axis = torch.arange(resolution, device=pixel.device, dtype=pixel.dtype) + 0.5
    apart = axis - pixel[..., :2, None]  # (B, V, column and row, R)
    near = torch.exp(-0.5 * (apart / sigma_px).square()) * (apart.abs() <= 3 * sigma_px)
    heat = near[:, :, 1, :, None] * near[:, :, 0, None, :]
    inside = ((pixel[..., :2] >= 0) & (pixel[..., :2] < resolution)).all(-1)
    total = heat.sum((-1, -2), keepdim=True)
    return torch.where(inside[..., None, None], heat / total.clamp(min=1e-12), 0.0)


def log_volume(heat_BVHW: Tensor) -> Tensor:
    """(B, R, R, R), over x, y and z of the cube's cells: the summed logarithms of the views' heat-maps, each of which
    sums to 1, at the pixels onto which a cell falls."""
    parts = (_along_axes(heat_BVHW[:, view], view).unsqueeze(1 + COMPONENTS[view][2]) for view in range(3))
    above, front, side = parts
    return above + (front + side)


def highest(volume_Bxyz: Tensor, centre_B3: Tensor, half_B: Tensor) -> Tensor:
    """(B, 3) centre of the cell where a volume over the cube is highest, m."""
    resolution = volume_Bxyz.shape[-1]
    cell = volume_Bxyz.flatten(1).argmax(1)
    x, y, z = cell // resolution**2, cell // resolution % resolution, cell % resolution
    return _middle(torch.stack([x, y, z], -1), resolution, centre_B3, half_B)


def peak(heat_BVHW: Tensor, centre_B3: Tensor, half_B: Tensor) -> Tensor:
    """(B, 3) centre of the cell where the summed heat-maps are highest, m: `highest` of `log_volume`, without it.

    The view from above says nothing about the height, so the best height of every column is found first; of those
    columns only that could be the highest if front and side agreed about the height.
    """
    resolution = heat_BVHW.shape[-1]
    above_Bxy, front_Byz, side_Bxz = (_along_axes(heat_BVHW[:, view], view) for view in range(3))

    def height(scene: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return above_Bxy[scene, x, y] + (front_Byz[scene, y] + side_Bxz[scene, x]).amax(-1)

    rows = torch.arange(len(heat_BVHW), device=heat_BVHW.device)
    most_Bxy = above_Bxy + (front_Byz.amax(-1)[:, None] + side_Bxz.amax(-1)[:, :, None])
    column = most_Bxy.flatten(1).argmax(1)
    reached_B = height(rows, column // resolution, column % resolution)
    candidates = (most_Bxy >= reached_B[:, None, None]).nonzero(as_tuple=True)
    best_Bxy = torch.full_like(most_Bxy, -torch.inf)
    best_Bxy[candidates] = height(*candidates)
    column = best_Bxy.flatten(1).argmax(1)
    x, y = column // resolution, column % resolution
    z = (front_Byz[rows, y] + side_Bxz[rows, x]).argmax(1)
    return _middle(torch.stack([x, y, z], -1), resolution, centre_B3, half_B)


def _middle(cell_B3: Tensor, resolution: int, centre_B3: Tensor, half_B: Tensor) -> Tensor:
    unit = (cell_B3.to(centre_B3.dtype) + 0.5) / resolution * 2 - 1
    return centre_B3 + half_B[:, None] * unit


def _along_axes(heat_BHW: Tensor, view: int) -> Tensor:
    """Logarithms of a view's heat-map over the two of x, y, z that it shows, in that order and upward."""
    parts, signs = COMPONENTS[view], SIGNS[view]
    score = torch.log(heat_BHW + _FLOOR)
    score = score.flip(-1) if signs[0] < 0 else score
    score = score.flip(-2) if signs[1] < 0 else score
    # Rows run along the picture's down, columns along its right.
    return score.transpose(-1, -2) if parts[0] < parts[1] else score


def sample_views(maps_BVCHW: Tensor, points_B3: Tensor, centre_B3: Tensor, half_B: Tensor) -> Tensor:
    """Features (B, 3 views * C) of the cells of each view's map (any resolution) onto which a point falls."""
    side = maps_BVCHW.shape[-1]
    pixel = project(points_B3[:, None], centre_B3, half_B, side)[:, :, 0, :2].long().clamp(0, side - 1)
    batch, views = pixel.shape[:2]
    b = torch.arange(batch, device=pixel.device)[:, None]
    v = torch.arange(views, device=pixel.device)
    return maps_BVCHW[b, v, :, pixel[..., 1], pixel[..., 0]].flatten(1)
