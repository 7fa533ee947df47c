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
    total: Tensor | float = 0.0
    for view, (parts, signs) in enumerate(zip(COMPONENTS, SIGNS, strict=True)):
        score = torch.log(heat_BVHW[:, view] + _FLOOR)
        right, down = parts[:2]
        score = score.flip(-1) if signs[0] < 0 else score
        score = score.flip(-2) if signs[1] < 0 else score
        # Rows run along `down`, columns along `right`; the cube's axes are x, y, z.
        score = score.transpose(-1, -2) if right < down else score
        total = total + score.unsqueeze(1 + parts[2])
    assert isinstance(total, Tensor)
    return total


def peak(heat_BVHW: Tensor, centre_B3: Tensor, half_B: Tensor) -> Tensor:
    """(B, 3) centre of the cell where the summed heat-maps are highest, m."""
    resolution = heat_BVHW.shape[-1]
    best = log_volume(heat_BVHW).flatten(1).argmax(1)
    cell = torch.stack([best // resolution**2, best // resolution % resolution, best % resolution], -1)
    unit = (cell.to(centre_B3.dtype) + 0.5) / resolution * 2 - 1
    return centre_B3 + half_B[:, None] * unit


def sample_views(maps_BVCHW: Tensor, points_B3: Tensor, centre_B3: Tensor, half_B: Tensor) -> Tensor:
    """Features (B, 3 views * C) of the cells of each view's map (any resolution) onto which a point falls."""
    side = maps_BVCHW.shape[-1]
    pixel = project(points_B3[:, None], centre_B3, half_B, side)[:, :, 0, :2].long().clamp(0, side - 1)
    batch, views = pixel.shape[:2]
    b = torch.arange(batch, device=pixel.device)[:, None]
    v = torch.arange(views, device=pixel.device)
    return maps_BVCHW[b, v, :, pixel[..., 1], pixel[..., 0]].flatten(1)
