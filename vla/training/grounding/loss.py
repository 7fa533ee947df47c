"""Loss and figures of pre-training: several questions about one picture at once.

The picture's tokens come first and attention is causal, so they do not depend on the question, and one packed sequence
[patches][question 1][question 2]... with a block mask computes exactly what separate sequences would, without encoding
the picture again for each.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vla.backbones.backbone import Backbone
from vla.backbones.families import Patches
from vla.training.grounding.pointing import Reader, pointing_loss, state_hidden
from vla.training.grounding.questions import IGNORED, POINT_QUESTIONS, GroundingSet
from vla.training.train_config import PretrainConfig


def pack(backbone: Backbone, patches: Tensor, prompts: Tensor, answers: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Hidden states of packed sequences; picture tokens (B, N, D), prompts (B, Kp, Tp), answers (B, Ka, Ta). Also the
    prefix length N."""
    b, kp, tp = prompts.shape
    ka, ta = answers.shape[1:]
    n, q = backbone.num_patches, backbone.num_queries
    embed = backbone.vlm.model.get_input_embeddings()
    words = backbone.hear(prompts.flatten(0, 1)).unflatten(0, (b, kp))
    point_segments = torch.cat([words, backbone.ask(words, prompts > 0)], 2).flatten(1, 2)
    embeds = torch.cat([patches, point_segments.to(patches.dtype), embed(answers).flatten(1, 2).to(patches.dtype)], 1)

    here = {"device": prompts.device}
    valid_p = torch.cat([prompts > 0, torch.ones(b, kp, q, dtype=torch.bool, **here)], 2)
    valid_a = answers > 0
    positions = torch.cat(
        [
            torch.arange(n, **here).expand(b, -1),
            (n + valid_p.long().cumsum(2) - 1).flatten(1),
            (n + valid_a.long().cumsum(2) - 1).flatten(1),
        ],
        1,
    ).clamp(min=0)
    valid = torch.cat([torch.ones(b, n, dtype=torch.bool, **here), valid_p.flatten(1), valid_a.flatten(1)], 1)
    segment = torch.cat(
        [
            torch.zeros(n, dtype=torch.long, **here),
            1 + torch.arange(kp, **here).repeat_interleave(tp + q),
            1 + kp + torch.arange(ka, **here).repeat_interleave(ta),
        ]
    )
    same = (segment[None, :] == 0) | (segment[None, :] == segment[:, None])
    allowed = (same.tril())[None] & valid[:, None, :]
    bias = torch.zeros(allowed.shape, dtype=torch.float32, **here).masked_fill_(~allowed, -30000.0)
    return backbone.decode(embeds, bias[:, None].to(embeds.dtype), positions), n


@torch.no_grad()
def evaluate(backbone: Backbone, reader: Reader, data: GroundingSet, rows: np.ndarray) -> dict[str, float]:
    """Held-out scenes: position error (mm) of the named object and place, answer accuracy (all tokens right)."""
    backbone.eval()
    miss, place, right, total, yes = [], [], 0, 0, [0, 0]
    for part in np.array_split(rows, max(1, len(rows) // 64)):
        index = torch.from_numpy(part)
        with torch.autocast("cpu", torch.bfloat16):
            prompts, answers = data.prompts[index], data.answers[index]
            seen = backbone.look(backbone.normalise(torch.from_numpy(data.images[np.sort(part)])))
            hidden, n = pack(backbone, seen.tokens, prompts, answers)
            kp, q = prompts.shape[1], backbone.num_queries
            tp = prompts.shape[2]
            patches, queries = state_hidden(hidden[-1], n, kp, tp, q)
            grip = data.grip[index].repeat_interleave(kp, 0)
            labels = data.points[index][:, :kp].flatten(0, 1)
            _, info = pointing_loss(backbone, reader, seen.fine, patches, queries, labels, grip, 0.0)
            tail = hidden[-1][:, n + kp * (tp + q) :].unflatten(1, answers.shape[1:])
            guess = backbone.vlm.lm_head(tail).argmax(-1)
        miss.append(info["miss_mm"])
        far = (info["read"][:, 6:8] - info["goal"][:, 6:8]).norm(dim=1) * 100
        place.append(far[~far.isnan()])
        counted = data.labels[index] != IGNORED
        correct = ((guess == data.labels[index]) | ~counted).all(-1)
        right, total = right + int(correct.sum()), total + correct.numel()
        yes[0], yes[1] = yes[0] + int(correct[:, 0].sum()), yes[1] + len(correct)
    backbone.train()
    missed, placed = torch.cat(miss), torch.cat(place)
    return {
        "object_mm_median": missed.median().item(),
        "object_mm_p90": missed.quantile(0.9).item(),
        "place_mm_median": placed.median().item(),
        "yes_no_accuracy": yes[0] / yes[1],
        "answer_accuracy": right / total,
    }


def scene_loss(
    backbone: Backbone,
    reader: Reader,
    data: GroundingSet,
    rows: np.ndarray,
    rng: np.random.Generator,
    config: PretrainConfig,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of some of these scenes' questions, drawn afresh each time."""
    kp, ka, q = config.points_per_scene, config.answers_per_scene, config.num_queries
    rows = np.sort(rows)
    index = torch.from_numpy(rows)
    draw = lambda count: rng.permuted(np.tile(np.arange(count), (len(rows), 1)), axis=1)  # noqa: E731
    asked, answered = draw(POINT_QUESTIONS)[:, :kp], draw(data.answers.shape[1])[:, :ka]
    pick_p, pick_a = torch.from_numpy(asked), torch.from_numpy(answered)
    points = data.points[index[:, None], pick_p]
    if config.paraphrase:
        prompts, answers, labels, nothing = data.spoken(rows, asked, answered, rng, config.absent)
        points = without_what_is_named(points, nothing)
    else:
        prompts = data.prompts[index[:, None], pick_p]
        answers, labels = data.answers[index[:, None], pick_a], data.labels[index[:, None], pick_a]
    device = backbone.queries.device
    prompts, answers, labels = prompts.to(device), answers.to(device), labels.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.half):
        pixels = backbone.normalise(torch.from_numpy(data.images[rows]).to(device))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not config.only_pointer):
            seen = backbone.look(pixels)
            hidden, n = pack(backbone, seen.tokens, prompts, answers)
        tp = prompts.shape[2]
        patches, queries = state_hidden(hidden[-1], n, kp, tp, q)
        points = points.flatten(0, 1).to(device)
        grip = data.grip[index].repeat_interleave(kp, 0).to(device)
        loss, info = pointing_loss(
            backbone, reader, seen.fine, patches, queries, points, grip, config.heatmap_weight, config.reader_weight
        )
        tail = hidden[-1][:, n + kp * (tp + q) :].unflatten(1, (ka, answers.shape[2]))
        counted = labels != IGNORED
        logits = backbone.vlm.lm_head(tail[counted])
    answer_loss = F.cross_entropy(logits.float(), labels[counted])
    total = loss + config.answer_weight * answer_loss
    return total, {
        "loss": total.item(),
        "answer_loss": answer_loss.item(),
        "miss_mm": info["miss_mm"].nanmedian().item(),
    }


def without_what_is_named(points: Tensor, nothing: Tensor) -> Tensor:
    """Labels (..., 2, E) of questions of which those in `nothing` (...) name what no view sees and no place has."""
    gone = torch.full_like(points, torch.nan)
    gone[..., 0, 3:] = 0.0
    return torch.where(nothing[..., None, None], gone, points)


def answered(backbone: Backbone, seen: Patches, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the backbone itself points, without a reader (B * Kp, Q, V, 3), the states of the queries (B * Kp, Q, D)
    and those of the answers (B, Ka, Ta, D); prompts (B, Kp, Tp) and answers (B, Ka, Ta) are tokens."""
    hidden, n = pack(backbone, seen.tokens, prompts, answers)
    kp, tp = prompts.shape[1:]
    patches, queries = state_hidden(hidden[-1], n, kp, tp, backbone.num_queries)
    points, coarse = backbone.point(patches, queries)
    if backbone.sharp is not None:
        points, _ = backbone.sharpen(seen.fine, patches, queries, points, coarse)
    return points, queries, hidden[-1][:, n + kp * (tp + backbone.num_queries) :].unflatten(1, answers.shape[1:])


@torch.no_grad()
def inspect(backbone: Backbone, data: GroundingSet) -> dict[str, float]:
    """Evaluate a finished backbone on a grounding set, without the pre-training reader.

    Distance (median, and what nine in ten keep within) between where it points and the named object, in pixels of
    the front camera's picture as the backbone reads it, and the share of yes/no questions answered right.
    """
    backbone.eval()
    distances, right = [], []
    for part in np.array_split(np.arange(len(data)), max(1, len(data) // 64)):
        index = torch.from_numpy(part)
        looked = backbone.look(backbone.normalise(torch.from_numpy(data.images[part])))
        points, _, tail = answered(backbone, looked, data.prompts[index], data.answers[index])
        truth = data.points[index][:, :POINT_QUESTIONS, 0, 3:6].flatten(0, 1)
        seen = truth[:, 2] > 0.5
        distances.append((points[:, 0, 0, :2] - truth[:, :2]).norm(dim=1)[seen] * backbone.image_size / 2)
        guess, labels = backbone.vlm.lm_head(tail[:, 0]).argmax(-1), data.labels[index][:, 0]
        right.append(((guess == labels) | (labels == IGNORED)).all(-1).float())
    distance = torch.cat(distances)
    return {
        "point_error_px": distance.median().item(),
        "point_error_px_p90": distance.quantile(0.9).item(),
        "yes_no_accuracy": torch.cat(right).mean().item(),
    }
