"""Losses of the pointer in pre-training: where in which view something is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.backbones.backbone import Backbone

_VISIBLE = 0.4
"""Weight of the loss of visibility, by which a thing that is not there is noticed: with 0.1 it stayed below a hundredth
of the whole loss, and a colour and a kind on two things were taken for one."""


def _heatmap_loss(logits_BVP: Tensor, uv_BV3: Tensor, grid_P2: Tensor, sigma: float) -> Tensor:
    """Cross-entropy of one query's attention with a Gaussian around the true point, in the views that see it."""
    d2 = ((uv_BV3[:, :, None, :2] - grid_P2) ** 2).sum(-1)
    goal = (-d2 / (2 * sigma**2)).softmax(-1)
    loss = -(goal * logits_BVP.log_softmax(-1)).sum(-1)
    seen = uv_BV3[..., 2] > 0.5
    return (loss * seen).sum() / seen.sum().clamp(min=1)


def _look_loss(
    pointed_B2VC: Tensor,
    logits_B2VP: Tensor,
    points: Tensor,
    grid_P2: Tensor,
    *,
    spread: float,
    beta: float,
    weight: float,
) -> Tensor:
    """Loss of the naming queries at one pointer: attention near the point, error of its coordinate, and visibility."""
    total = pointed_B2VC.new_zeros((), dtype=torch.float32)
    for k in range(2):
        named = ~points[:, k, 5].isnan()  # seen by the first view or not; a thing that is not there is seen by none
        if not named.any():
            continue
        uv = points[named, k, 3:].unflatten(1, (-1, 3))
        seen = uv[..., 2] > 0.5
        total = total + weight * _heatmap_loss(logits_B2VP[named, k], uv, grid_P2, spread)
        error = F.smooth_l1_loss(pointed_B2VC[named, k, :, :2], uv[..., :2], beta=beta, reduction="none").sum(-1)
        total = total + 0.1 / beta * (error * seen).sum() / seen.sum().clamp(min=1)
        total = total + _VISIBLE * F.binary_cross_entropy_with_logits(pointed_B2VC[named, k, :, 2], uv[..., 2])
    return total


def pointing_loss(
    backbone: Backbone,
    reader: Reader,
    fine: Tensor,
    hidden: Tensor,
    queries: Tensor,
    points: Tensor,
    grip: Tensor,
    weight: float,
    reader_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of B questions. `fine` of the scenes they are about (`Backbone.look`), each asked equally often; `hidden`
    (B, >=N, D) final states, `queries` (B, Q, D), `points` (B, 2, 3 + 3V) labels, NaN where nothing is named (its
    first three where something is that is not there); query 0
    points at the object, query Q/2 at the place, the others are free."""
    naming = list(backbone.naming)
    pointed, logits = backbone.point(hidden, queries)
    side = backbone.side
    total = _look_loss(
        pointed[:, naming], logits[:, naming], points, backbone.grid_P2, spread=1.0 / side, beta=0.1, weight=weight
    )
    if backbone.sharp is not None:
        pointed, logits = backbone.sharpen(fine, hidden, queries, pointed, logits)
        side, grid = backbone.sharp.side, backbone.sharp.grid_P2
        total = total + _look_loss(
            pointed[:, naming], logits, points, grid, spread=1.3 / side, beta=0.03, weight=weight
        )
    read = reader(queries, torch.cat([pointed[..., :2], pointed[..., 2:].sigmoid()], -1).flatten(2))
    xyz = points[:, :, :3]
    goal = torch.cat([xyz[:, 0], xyz[:, 0] - grip, xyz[:, 1], xyz[:, 1] - grip], 1) / 0.1
    known = ~goal.isnan()
    error = F.smooth_l1_loss(read, goal.nan_to_num(), beta=0.1, reduction="none")
    total = total + reader_weight * (error * known).sum() / known.sum().clamp(min=1)
    with torch.no_grad():
        miss_m = (read[:, :2] - goal[:, :2]).norm(dim=1) * 0.1
    return total, {"miss_mm": miss_m * 1e3, "read": read.detach(), "goal": goal}


class Reader(nn.Module):
    """Positions from what the queries say and where they point; exists only during pre-training."""

    def __init__(self, width: int, num_queries: int, point_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(num_queries * (width + point_dim), 256), nn.GELU(), nn.Linear(256, 12)
        )  # object, object - grip, place, place - grip: 3 each, units of 0.1 m

    def forward(self, queries_BQD: Tensor, points_BQE: Tensor) -> Tensor:
        """Query states (B, Q, D) and pointed coordinates (B, Q, E) -> positions (B, 12), units of 0.1 m."""
        return self.net(torch.cat([queries_BQD.float().flatten(1), points_BQE.float().flatten(1)], 1))


def state_hidden(hidden_last: Tensor, n: int, kp: int, tp: int, q: int) -> tuple[Tensor, Tensor]:
    """(B*Kp, N, D) patch states repeated per question and (B*Kp, Q, D) query states."""
    b = len(hidden_last)
    queries = hidden_last[:, n : n + kp * (tp + q)].unflatten(1, (kp, tp + q))[:, :, tp:]
    patches = hidden_last[:, None, :n].expand(-1, kp, -1, -1)
    return patches.reshape(b * kp, n, -1), queries.reshape(b * kp, q, -1)
