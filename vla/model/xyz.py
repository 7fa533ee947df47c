"""Where things are in the robot's frame: depth and calibration give every pixel three coordinates (4D-VLA).

A place in a picture says where something is only to a policy that has learnt with this very camera. The depth map at
the place, taken back through the camera's matrices, says the same in metres, wherever the camera stands. Two places are
looked up: the centre of every raw token, and where the backbone's queries point. After 4D-VLA (Zhang et al. 2025, arXiv
2506.22242), which adds an embedding of each patch's coordinates to its token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vla.backbones.features import Features
from vla.model.config import XYZConfig
from vla.processing.batch import ModelInput
from vla.processing.cameras.calibration import FAR_M, NEAR_M

RAW_DIM = 4
"""Numbers for each raw token: its coordinates, and 1 where they are known."""
LIMIT = 4.0
"""Normalised coordinates are limited to this: a wall far behind the table would drown everything else."""
_REACH = 3.0
"""Offsets from a camera that are much longer than so many times the scale count as far."""
_BETWEEN_PX = 1e-3
_SHARPNESS = 4
"""Power of a visibility by which the views of a query are weighed: the view that sees it best says where it is."""


def point_dim(num_views: int) -> int:
    """Numbers for each query that points: its coordinates, and for each view its offset from the camera and how well it
    is seen there."""
    return 3 + 4 * num_views


def back_project(depth_BVHW: Tensor, intrinsics_BV33: Tensor, extrinsics_BV44: Tensor) -> tuple[Tensor, Tensor]:
    """Every pixel's coordinates (B, V, H, W, 3) in the frame of the extrinsics, m, and whether they are known
    (B, V, H, W). Matrices as in `vla.core.types.Observation`."""
    height, width = depth_BVHW.shape[-2:]
    v, u = torch.meshgrid(
        torch.arange(height, device=depth_BVHW.device) + 0.5,
        torch.arange(width, device=depth_BVHW.device) + 0.5,
        indexing="ij",
    )
    return _unprojected(depth_BVHW, u, v, intrinsics_BV33[:, :, None, None], extrinsics_BV44[:, :, None, None])


def look_up(
    depth_BVHW: Tensor, intrinsics_BV33: Tensor, extrinsics_BV44: Tensor, xy_BM2: Tensor, view_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Coordinates (B, M, 3), m, of what is seen at `xy_BM2` (-1 to 1 from edge to edge) of the views `view_M`, and
    whether they are known (B, M). The depth is that of the pixel, the ray goes through the place itself."""
    height, width = depth_BVHW.shape[-2:]
    u, v = (xy_BM2[..., 0] + 1) / 2 * width, (xy_BM2[..., 1] + 1) / 2 * height
    # The middle of a patch lies between pixels: of those always the same, however the device rounds.
    column, row = (((at + _BETWEEN_PX).floor().long()) for at in (u, v))
    column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    depth_BM = depth_BVHW.flatten(1).gather(1, (view_M * height + row) * width + column)
    return _unprojected(depth_BM, u, v, intrinsics_BV33[:, view_M], extrinsics_BV44[:, view_M])


def _unprojected(depth: Tensor, u: Tensor, v: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 3) m and (...) bool of depths (...) at pixels u, v, by matrices (..., 3, 3) and (..., 4, 4)."""
    known = (depth > NEAR_M) & (depth < FAR_M)  # NaN is neither
    depth = torch.where(known, depth, torch.zeros_like(depth))
    y = (v - intrinsics[..., 1, 2]) / intrinsics[..., 1, 1]
    x = (u - intrinsics[..., 0, 2] - intrinsics[..., 0, 1] * y) / intrinsics[..., 0, 0]
    ray = torch.stack([x * depth, y * depth, depth], -1)
    world = (extrinsics[..., :3, :3] @ ray[..., None])[..., 0] + extrinsics[..., :3, 3]
    return world, known


def normalised(xyz: Tensor, config: XYZConfig) -> Tensor:
    """Coordinates (..., 3) in metres as the bridge reads them: about 0 in the middle of the workspace."""
    return ((xyz - xyz.new_tensor(config.centre_m)) / config.scale_m).clamp(-LIMIT, LIMIT)


def with_xyz(features: Features, inp: ModelInput[Tensor], config: XYZConfig) -> Features:
    """The features with the coordinates of every raw token and of what every query points at, float32. ValueError for
    inputs without depth."""
    if inp.depth_BVHW is None or inp.intrinsics_BV33 is None or inp.extrinsics_BV44 is None:
        raise ValueError("this policy reads depth: its inputs need depth, intrinsics and extrinsics of every camera")
    cameras = inp.depth_BVHW.float(), inp.intrinsics_BV33.float(), inp.extrinsics_BV44.float()
    batch, views = inp.depth_BVHW.shape[:2]  # len() would make an int of it in an export
    coords_N3 = features.coords_NE.float()
    xy_BN2 = coords_N3[None, :, :2].expand(batch, -1, -1)
    xyz_BN3, known_BN = look_up(*cameras, xy_BN2, coords_N3[:, 2].long())
    raw = torch.cat([normalised(xyz_BN3, config) * known_BN[..., None], known_BN[..., None].float()], -1)
    features = replace(features, raw_xyz_BNE=raw)
    if features.points_BQE is None:
        return features
    points_BQV3 = features.points_BQE.float().unflatten(-1, (views, 3))
    queries = points_BQV3.shape[1]
    view_M = torch.arange(views, device=raw.device).repeat(queries)
    xyz_BM3, known_BM = look_up(*cameras, points_BQV3[..., :2].flatten(1, 2), view_M)
    seen_BQV = points_BQV3[..., 2] * known_BM.unflatten(1, (queries, views))
    place_BQ3 = fused(xyz_BM3.unflatten(1, (queries, views)), seen_BQV)
    offset_BQV3 = place_BQ3[:, :, None] - cameras[2][:, None, :, :3, 3]
    told = torch.cat([normalised(place_BQ3, config), near(offset_BQV3, config).flatten(2)], -1)
    known_BQ1 = (seen_BQV > 0).any(-1, keepdim=True)
    return replace(features, points_xyz_BQE=torch.cat([told * known_BQ1, seen_BQV], -1))


def near(offset: Tensor, config: XYZConfig) -> Tensor:
    """Offsets (..., 3) from cameras, m, as the bridge reads them: of what is near the offset itself, of what is far
    little more than its direction. From a camera on the hand this is how far the hand has to go; and what is seen of a
    thing is its front, its middle lies behind it in this direction."""
    reach = _REACH * config.scale_m
    distance = torch.linalg.vector_norm(offset, dim=-1, keepdim=True).clamp(min=1e-6)
    return offset / distance * torch.tanh(distance / reach) * _REACH


def fused(xyz_BQV3: Tensor, seen_BQV: Tensor) -> Tensor:
    """One place (B, Q, 3) of the several views': their mean, weighed by how well each sees it; 0 where none does."""
    best_BQ1 = seen_BQV.amax(2, keepdim=True)
    weight = (seen_BQV / best_BQ1.clamp(min=1e-6)) ** _SHARPNESS
    return (weight[..., None] * xyz_BQV3).sum(2) / weight.sum(2, keepdim=True).clamp(min=1e-6)
