"""Orthographic views of what depth cameras see: point clouds in the robot's frame, drawn from above, front and side.

BridgeVLA (arXiv 2506.07961), and RVT before it (Goyal et al. 2023), turn the pictures of any number of cameras into the
same few views of the workspace: a policy that reads them does not depend on where the cameras stand, and what it says
of a pixel is said of a line in the robot's frame. Everything is batched torch, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vla.model.heatmap.config import Workspace

VIEWS = ("top", "front", "side")
COMPONENTS = ((1, 0, 2), (1, 2, 0), (0, 2, 1))
"""For each view, the component of a position along the picture's right, along its down, and toward who looks.
From above, right is +y and down +x, as the front camera's picture has them."""
SIGNS = ((1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, -1.0, -1.0))
"""Directions of those components."""
_DIRECTIONS = sorted(
    {pair for parts, signs in zip(COMPONENTS, SIGNS, strict=True) for pair in zip(parts, signs, strict=True)}
)
_NEARNESS_BITS = 20
_EMPTY = -1


def back_project(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> Tensor:
    """Points (..., H, W, 3) in the world, m, of depth maps (..., H, W), metres along each camera's axis.

    `intrinsics` (..., 3, 3) and `extrinsics` (..., 4, 4) as in `vla.core.types.Observation`.
    """
    height, width = depth.shape[-2:]
    row = (torch.arange(height, device=depth.device, dtype=depth.dtype) + 0.5)[:, None]
    column = torch.arange(width, device=depth.device, dtype=depth.dtype) + 0.5

    def of(matrix: Tensor, *place: int) -> Tensor:
        return matrix[(..., *place)][..., None, None]

    x = (column - of(intrinsics, 0, 2)) / of(intrinsics, 0, 0) * depth
    y = (row - of(intrinsics, 1, 2)) / of(intrinsics, 1, 1) * depth
    local = torch.stack([x, y, depth], -1)
    turn, shift = extrinsics[..., :3, :3].transpose(-1, -2), extrinsics[..., None, :3, 3]
    lead = depth.shape[:-2]
    world = torch.baddbmm(shift.reshape(-1, 1, 3), local.reshape(-1, height * width, 3), turn.reshape(-1, 3, 3))
    return world.view(*lead, height, width, 3)


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
    offset = points_BN3 - centre_B3[:, None]
    x_BN, y_BN, z_BN = (part.abs() < half_B[:, None] for part in offset.unbind(-1))
    within = x_BN & y_BN & z_BN & seen_BN
    point = within.flatten().nonzero()[:, 0]
    scene = point.div(points_BN3.shape[1], rounding_mode="floor")
    unit = offset.flatten(0, 1).index_select(0, point) / (2 * half_B.index_select(0, scene)[:, None])
    red, green, blue = colours_BN3.flatten(0, 1).index_select(0, point).long().unbind(-1)
    packed = (red << 16) + (green << 8) + blue
    parts, signs = (list(column) for column in zip(*_DIRECTIONS, strict=True))
    along = unit.T[parts] * unit.new_tensor(signs)[:, None] + 0.5
    pixel = dict(zip(_DIRECTIONS, (along * side).int().clamp_(0, side - 1), strict=True))
    near = dict(zip(_DIRECTIONS, (along * (1 << _NEARNESS_BITS)).long() << 24, strict=True))
    place, key = [], []
    first = (scene * (views * side)).int()  # row of a scene's first picture, all pictures one below the other
    for view, directions in enumerate(zip(COMPONENTS, SIGNS, strict=True)):
        right, down, toward = zip(*directions, strict=True)
        place.append((first + view * side + pixel[down]) * side + pixel[right])
        # One number for nearness and colour: the largest of a pixel's points is what is seen there.
        key.append(near[toward] + packed)
    seen = torch.full((batch * views * side * side,), _EMPTY, dtype=torch.int64, device=points_BN3.device)
    seen = seen.scatter_reduce(0, torch.cat(place).long(), torch.cat(key), "amax").view(batch, views, side, side)
    reach = [round(float(workspace.splat_m * side / (2 * half))) for half in half_B]
    seen = (
        torch.cat([_widened(seen[i : i + 1], reach[i]) for i in range(batch)])
        if len(set(reach)) > 1
        else _widened(seen, reach[0])
    )
    colour = torch.stack([(seen >> shift).to(torch.uint8) for shift in (16, 8, 0)], -1)
    return torch.where(seen[..., None] == _EMPTY, colour.new_tensor(workspace.background), colour)


def _widened(key_BVHW: Tensor, reach: int) -> Tensor:
    """The largest number within `reach` pixels in both directions: every point drawn as a square."""
    for axis in (2, 3):
        widest, side = key_BVHW.clone(), key_BVHW.shape[axis]
        for shift in range(1, min(reach, side - 1) + 1):
            rest = side - shift
            for here, there in ((0, shift), (shift, 0)):
                mine = widest.narrow(axis, here, rest)
                mine.copy_(torch.maximum(mine, key_BVHW.narrow(axis, there, rest)))
        key_BVHW = widest
    return key_BVHW
