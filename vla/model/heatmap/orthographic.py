"""Orthographic views of what depth cameras see: point clouds in the robot's frame, drawn from above, front and side.

BridgeVLA (arXiv 2506.07961), and RVT before it (Goyal et al. 2023), turn the pictures of any number of cameras into the
same few views of the workspace: a policy that reads them does not depend on where the cameras stand, and what it says
of a pixel is said of a line in the robot's frame. Everything is batched torch, on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.model.heatmap.config import COMPONENTS, SIGNS, VIEWS, Workspace

_ACROSS = sorted({(v[0][k], v[1][k]) for v in zip(COMPONENTS, SIGNS, strict=True) for k in (0, 1)})
"""Components and directions that run along some picture's right or down."""
_NEARNESS_BITS = 20
_EMPTY = -1


def back_project(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> Tensor:
    """Points (..., H, W, 3) in the world, m, of depth maps (..., H, W), metres along each camera's axis.

    `intrinsics` (..., 3, 3) and `extrinsics` (..., 4, 4) as in `vla.core.types.Observation`.
    """
    height, width = depth.shape[-2:]
    row = torch.arange(height, device=depth.device, dtype=depth.dtype) + 0.5
    column = torch.arange(width, device=depth.device, dtype=depth.dtype) + 0.5
    # Components first: each lies by itself in memory, as drawing reads them.
    turn, shift = (part.contiguous() for part in extrinsics[..., :3, :].movedim(-2, 0).split([3, 1], -1))
    x = turn[..., 0, None] * ((column - intrinsics[..., 0, 2, None]) / intrinsics[..., 0, 0, None])
    y = turn[..., 1, None] * ((row - intrinsics[..., 1, 2, None]) / intrinsics[..., 1, 1, None])
    ray = (x + turn[..., 2, None])[..., None, :] + y[..., None]
    return torch.addcmul(shift[..., None], depth, ray).movedim(0, -1)


def project(points_BN3: Tensor, centre_B3: Tensor, half_B: Tensor, resolution: int) -> Tensor:
    """Pixels (B, 3 views, N, 3): column and row (the first pixel is 0..1), and nearness, 0..1 within the cube of half
    side `half_B` around `centre_B3`, m."""
    unit = (points_BN3 - centre_B3[:, None]) / (2 * half_B[:, None, None])
    along = torch.stack([unit[..., list(parts)] for parts in COMPONENTS], 1)
    sign = torch.tensor(SIGNS, dtype=unit.dtype, device=unit.device)[:, None]
    size = torch.tensor([resolution, resolution, 1.0], dtype=unit.dtype, device=unit.device)
    return (along * sign + 0.5) * size


def render(
    points_BN3: Tensor, colours_BN3: Tensor, seen_BN: Tensor, centre_B3: Tensor, half_B: Tensor, workspace: Workspace
) -> Tensor:
    """Views (B, 3, R, R, 3) uint8 of coloured points (uint8) in cubes of half side `half_B` around `centre_B3`, m.

    Where several points fall on a pixel the nearest to the viewer is seen; between equally near ones (to a millionth
    of the cube) the colour decides, so that the order of the points does not matter. `seen_BN` False: not a point.
    """
    side, views, batch = workspace.resolution, len(VIEWS), len(points_BN3)
    offset_3BN = points_BN3.movedim(-1, 0) - centre_B3.T.contiguous()[..., None]
    point = ((offset_3BN.abs().amax(0) < half_B[:, None]) & seen_BN).flatten().nonzero()[:, 0]
    unit = offset_3BN.flatten(1).index_select(1, point)
    red, green, blue = colours_BN3.flatten(0, 1).unbind(-1)
    packed = ((red.int() << 16) + (green.int() << 8) + blue.int()).index_select(0, point)
    if batch > 1:
        scene = point.div(points_BN3.shape[1], rounding_mode="floor")
        unit, first = unit / (2 * half_B.index_select(0, scene)), scene * side
    else:
        unit, first = unit / (2 * half_B), 0
    pixel = {
        (part, sign): (unit[part].mul(sign).add_(0.5).mul_(side)).long().clamp_(0, side - 1) for part, sign in _ACROSS
    }
    seen = torch.full((views, batch * side * side), _EMPTY, dtype=torch.int64, device=points_BN3.device)
    for view, (parts, signs) in enumerate(zip(COMPONENTS, SIGNS, strict=True)):
        right, down, (part, sign) = zip(parts, signs, strict=True)
        place = (first + pixel[down]) * side + pixel[right]
        near = unit[part].mul(sign).add_(0.5).mul_(1 << _NEARNESS_BITS).long()
        # One number for nearness and colour: the largest of a pixel's points is what is seen there.
        seen[view].scatter_reduce_(0, place, near.bitwise_left_shift_(24).add_(packed), "amax")
    seen = seen.view(views, batch, side, side).transpose(0, 1)
    reach = [round(float(workspace.splat_m * side / (2 * half))) for half in half_B]
    seen = (
        torch.cat([_widened(seen[i : i + 1], reach[i]) for i in range(batch)])
        if len(set(reach)) > 1
        else _widened(seen, reach[0])
    )
    seen = torch.where(seen == _EMPTY, workspace.background * 0x10101, seen)
    return torch.stack([(seen >> shift).to(torch.uint8) for shift in (16, 8, 0)], -1)


def _widened(key_BVHW: Tensor, reach: int) -> Tensor:
    """The largest number within `reach` pixels in both directions: every point drawn as a square."""
    for axis in (2, 3):
        side = key_BVHW.shape[axis]
        reach = min(reach, side - 1)
        ends = (0, 0, reach, reach) if axis == 2 else (reach, reach)
        widest, width = F.pad(key_BVHW, ends, value=_EMPTY), 1
        while width < 2 * reach + 1:  # the largest of so many pixels from here on, and of as many further on
            step = min(width, 2 * reach + 1 - width)
            rest = widest.shape[axis] - step
            widest = torch.maximum(widest.narrow(axis, 0, rest), widest.narrow(axis, step, rest))
            width += step
        key_BVHW = widest
    return key_BVHW
