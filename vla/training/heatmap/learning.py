"""The loop in which a heat-map head learns from looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.model.heatmap.head import Seen
from vla.model.heatmap.model import HeatmapModel, heat_loss
from vla.model.heatmap.rotation import BINS
from vla.model.heatmap.volume import peak
from vla.training.heatmap.looks import Lesson

_WARMUP, _CLIP = 50, 1.0
FRESH_LR = 5.0
"""Learning rate of what has not learnt anything yet, where that of what has is 1."""


def loss_of(model: HeatmapModel, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of heat-maps, and that of verdicts: flags and, where the hand turns, each axis's bins
    (BridgeVLA weighs them alike)."""
    seen, centre, half = lesson.seen.float(), lesson.centre_B3, lesson.half_B
    logits, maps, asked = model.head(seen, _slots(model, lesson, seen), lesson.hand_B3, centre, half)
    heat = heat_loss(logits, lesson.at_B3, centre, half).mean()
    told = ~lesson.flags_BF.isnan().any(-1)
    if not told.any():
        return heat, heat.new_zeros(())
    logits = model.head.verdicts_at(maps, asked, lesson.state_BS, lesson.at_B3, centre, half)[told]
    flags, turn = logits.split([lesson.flags_BF.shape[1], logits.shape[1] - lesson.flags_BF.shape[1]], 1)
    verdicts = F.binary_cross_entropy_with_logits(flags, lesson.flags_BF[told])
    if turn.shape[1]:
        verdicts = verdicts + F.cross_entropy(
            turn.unflatten(1, (3, BINS)).flatten(0, 1), lesson.turn_B3[told].flatten()
        )
    return heat, verdicts


def _slots(model: HeatmapModel, lesson: Lesson, seen: Seen) -> Tensor:
    chosen = model.head.chosen_slot(seen, lesson.state_BS)
    fixed = model.head.fixed_slot(lesson.slot_B.clamp(min=0))
    return torch.where((lesson.slot_B < 0)[:, None], chosen, fixed)


def learn(
    model: HeatmapModel,
    lesson: Lesson,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.05,
    taught: Collection[str] = (),
    on_step: Callable[[int, float, float], None] | None = None,
) -> None:
    """Train the head in place: AdamW, warm-up and a cosine to zero. The parameters named in `taught` go on from what
    they have learnt with a lower rate. FloatingPointError for a loss that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.head.named_parameters())
    groups = [
        {"params": [value for name, value in named.items() if (name in taught) == known], "rate": rate * lr}
        for known, rate in ((True, 1.0), (False, FRESH_LR))
    ]
    optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            warm = min(1.0, (step + 1) / min(_WARMUP, max(1, steps // 10)))
            group["lr"] = group["rate"] * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(lesson.batch_size, (batch_size,), generator=generator)
        heat, flags = loss_of(model, lesson.select(rows))
        loss = heat + flags
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss {float(loss)} at step {step}: lower lr")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trainable(), _CLIP)
        optimiser.step()
        if on_step is not None:
            on_step(step + 1, float(heat.detach()), float(flags.detach()))
    model.eval()


@torch.no_grad()
def errors_mm(model: HeatmapModel, lesson: Lesson, *, batch_size: int = 32) -> Tensor:
    """(B,) distances in mm between the peaks of the summed heat-maps and the places to find."""
    found = []
    for rows in torch.arange(lesson.batch_size).split(batch_size):
        part = lesson.select(rows)
        seen, centre, half = part.seen.float(), part.centre_B3, part.half_B
        logits, _, _ = model.head(seen, _slots(model, part, seen), part.hand_B3, centre, half)
        heat = logits.flatten(2).softmax(-1).view_as(logits)
        found.append(1000 * (peak(heat, centre, half) - part.at_B3).norm(dim=-1))
    return torch.cat(found)
