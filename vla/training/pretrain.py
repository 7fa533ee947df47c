"""Vision-language pre-training of the tiny backbone on rendered scenes: point, answer, describe. No actions yet.

Several questions share one image: the image tokens come first and attention is causal, so they do not depend on the
question, and one packed sequence [patches][question 1][question 2]... with a block mask computes exactly what separate
sequences would, without encoding the image again for each.
"""

from __future__ import annotations

import json
import math
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vla.backbones.backbone import SPEC_FILE, Backbone
from vla.backbones.tiny import build_tiny, learn_words
from vla.core.disk import writing
from vla.runtime.locks import locked, refuse_used
from vla.training.grounding_set import IGNORED, POINT_QUESTIONS, GroundingSet, read_questions, words_of
from vla.training.pointing_loss import Reader, pointing_loss, state_hidden


@dataclass(frozen=True)
class PretrainConfig:
    """Budget and losses of a pre-training run."""

    minutes: float = 45.0
    """Wall-clock budget; the learning rate decays to its floor at its end."""
    max_steps: int = 1_000_000
    batch_scenes: int = 32
    points_per_scene: int = 3
    answers_per_scene: int = 1
    lr: float = 1.2e-3
    warmup_steps: int = 100
    floor: float = 0.03
    weight_decay: float = 0.02
    heatmap_weight: float = 1.0
    answer_weight: float = 0.3
    reader_weight: float = 1.0
    """Weight of the loss on positions in metres. Less for a trained backbone, whose reader starts untrained."""
    num_queries: int = 8
    sharp: bool = True
    """Teach the queries a second look, at the picture itself (`vla.backbones.pointer.SharpPointer`)."""
    only_pointer: bool = False
    """Train nothing but that second look, on a backbone that is otherwise finished."""
    seed: int = 0
    num_processes: int = 2
    """Data-parallel processes of one thread each: on small tensors they use two cores, two threads use 1.2."""
    holdout: int = 256
    """Scenes of each set that are kept to measure with."""
    weights: tuple[float, ...] = ()
    """How often each of several grounding sets is drawn; none: by their sizes."""


def _pack(backbone: Backbone, patches: Tensor, prompts: Tensor, answers: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Hidden states of packed sequences; picture tokens (B, N, D), prompts (B, Kp, Tp), answers (B, Ka, Ta). Also the
    prefix length N."""
    b, kp, tp = prompts.shape
    ka, ta = answers.shape[1:]
    n, q = backbone.num_patches, backbone.num_queries
    embed = backbone.vlm.model.get_input_embeddings()
    words = embed(prompts)
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
            hidden, n = _pack(backbone, seen.tokens, prompts, answers)
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


class _Team:
    """Data-parallel processes on this machine: rank 0 is the caller's process, the others are spawned."""

    def __init__(self, rank: int, size: int, store: str) -> None:
        self.rank, self.size = rank, size
        if size > 1:
            dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.FileStore(store, size))

    def share(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Mean over ranks, through one flat buffer."""
        if self.size == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.size
        for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view_as(parameter)

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def pretrain(
    config: PretrainConfig,
    data_folder: Path | Sequence[Path],
    out: Path,
    *,
    on_step: Callable[[dict[str, float]], None] | None = None,
    initial: Path | str | None = None,
) -> dict[str, float]:
    """Train the tiny backbone on grounding sets; writes a backbone folder to `out` and returns held-out figures.

    `initial`: start from this backbone, a name or a folder, instead of from random weights; words that are new to it
    are added to its vocabulary. Of several sets the figures are named by their folders.
    """
    folders = [data_folder] if isinstance(data_folder, Path) else list(data_folder)
    if config.weights and len(config.weights) != len(folders):
        raise ValueError(f"{len(config.weights)} weights for {len(folders)} grounding sets: give one each, or none")
    if not 1 <= (asked := config.points_per_scene) <= POINT_QUESTIONS:
        raise ValueError(f"a scene has {POINT_QUESTIONS} questions that name something, not {asked}")
    if config.batch_scenes % config.num_processes:
        raise ValueError(f"batch_scenes {config.batch_scenes} must be a multiple of {config.num_processes} processes")
    with locked(out), tempfile.TemporaryDirectory() as folder:
        refuse_used(out / SPEC_FILE, out, "a backbone", resume=None)
        out.mkdir(parents=True, exist_ok=True)
        store = str(Path(folder) / "store")
        context = mp.get_context("spawn")
        others = [
            context.Process(target=_run, args=(rank, config, folders, out, store, initial, None), daemon=True)
            for rank in range(1, config.num_processes)
        ]
        for process in others:
            process.start()
        try:
            return _run(0, config, folders, out, store, initial, on_step)
        finally:
            for process in others:
                process.join(timeout=20)
                process.kill()


def _run(
    rank: int,
    config: PretrainConfig,
    folders: list[Path],
    out: Path,
    store: str,
    initial: Path | str | None,
    on_step: Callable[[dict[str, float]], None] | None,
) -> dict[str, float]:
    """One rank's training loop."""
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    if initial is None:
        data = GroundingSet(folders)
        backbone = Backbone(
            build_tiny(len(data.tokenizer), config.seed),
            data.tokenizer,
            num_queries=config.num_queries,
            num_views=2,
            sharp=config.sharp,
        )
    else:
        from vla.backbones.hub import load as load_backbone

        backbone = load_backbone(str(initial))
        if backbone.family_name == "embedded":  # other tokenizers spell every word
            learn_words(backbone, words_of(read_questions(folders)))
        data = GroundingSet(folders, backbone.tokenizer)
        if config.sharp:
            backbone.add_sharp()
    backbone.train()
    reader = Reader(backbone.width, config.num_queries, backbone.point_dim)
    if config.only_pointer:
        if backbone.sharp is None:
            raise ValueError("only_pointer trains the second look: leave sharp on")
        backbone.requires_grad_(False)
        backbone.sharp.requires_grad_(True)
    parameters = [p for p in (*backbone.parameters(), *reader.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95))
    rng = np.random.default_rng([config.seed, rank])
    batch = config.batch_scenes // config.num_processes
    sets = data.split(config.holdout)
    share = np.array(config.weights or [len(own) for own, _ in sets], np.float64)
    share /= share.sum()

    def draw() -> np.ndarray:
        counts = rng.multinomial(batch, share)
        return np.concatenate([rng.choice(own, n, replace=False) for (own, _), n in zip(sets, counts, strict=True)])

    def figures_now() -> dict[str, float]:
        if len(sets) == 1:
            return evaluate(backbone, reader, data, sets[0][1])
        named = [
            (folder.name, evaluate(backbone, reader, data, held_out))
            for folder, (_, held_out) in zip(folders, sets, strict=True)
        ]
        return {f"{name}/{figure}": value for name, figures in named for figure, value in figures.items()}

    team = _Team(rank, config.num_processes, store)
    log = (out / "metrics.jsonl").open("a") if rank == 0 else None
    start, step = time.monotonic(), 0
    try:
        while True:
            fraction = max((time.monotonic() - start) / (60 * config.minutes), step / config.max_steps)
            fraction = team.share(fraction)
            if fraction >= 1:
                break
            scale = config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * fraction))
            for group in optimiser.param_groups:
                group["lr"] = config.lr * scale * min(1.0, (step + 1) / config.warmup_steps)
            total, row = scene_loss(backbone, reader, data, draw(), rng, config)
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            team.average_gradients(parameters)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not math.isfinite(norm.item()):
                raise FloatingPointError(f"pre-training gradient is {norm.item()} at step {step}: lower --lr")
            optimiser.step()
            step += 1
            if log is None:
                continue
            row |= {"step": step, "seconds": round(time.monotonic() - start, 1), "fraction": fraction}
            if step % 500 == 0:
                row |= figures_now()
            if step % 100 == 0:
                backbone.save(out)
            if step % 50 == 0:
                with writing(out / "metrics.jsonl"):
                    log.write(json.dumps(row) + "\n")
                    log.flush()
            if on_step:
                on_step(row)
        if log is None:
            return {}
        figures = figures_now() | {"steps": step, "seconds": time.monotonic() - start}
        log.write(json.dumps(figures) + "\n")
        backbone.save(out)
        return figures
    finally:
        if log is not None:
            log.close()
        team.close()


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
    pick_p = torch.from_numpy(draw(POINT_QUESTIONS)[:, :kp])
    pick_a = torch.from_numpy(draw(data.answers.shape[1])[:, :ka])
    prompts = data.prompts[index[:, None], pick_p]
    answers, labels = data.answers[index[:, None], pick_a], data.labels[index[:, None], pick_a]
    device = backbone.queries.device
    prompts, answers, labels = prompts.to(device), answers.to(device), labels.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        pixels = backbone.normalise(torch.from_numpy(data.images[rows]).to(device))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not config.only_pointer):
            seen = backbone.look(pixels)
            hidden, n = _pack(backbone, seen.tokens, prompts, answers)
        tp = prompts.shape[2]
        patches, queries = state_hidden(hidden[-1], n, kp, tp, q)
        points = data.points[index[:, None], pick_p].flatten(0, 1).to(device)
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
        "miss_mm": info["miss_mm"].median().item(),
    }


@torch.no_grad()
def inspect(backbone: Backbone, data: GroundingSet) -> dict[str, float]:
    """Evaluate a finished backbone on a grounding set, without the pre-training reader.

    Distance (median, and what nine in ten keep within) between where it points and the named object, in pixels of the
    front camera's 84, and the share of yes/no questions answered right.
    """
    backbone.eval()
    distances, right = [], []
    for part in np.array_split(np.arange(len(data)), max(1, len(data) // 64)):
        index = torch.from_numpy(part)
        prompts, answers = data.prompts[index], data.answers[index]
        seen = backbone.look(backbone.normalise(torch.from_numpy(data.images[part])))
        hidden, n = _pack(backbone, seen.tokens, prompts, answers)
        kp, q = prompts.shape[1], backbone.num_queries
        tp = prompts.shape[2]
        patches, queries = state_hidden(hidden[-1], n, kp, tp, q)
        points, coarse = backbone.point(patches, queries)
        if backbone.sharp is not None:
            points, _ = backbone.sharpen(seen.fine, queries, points, coarse)
        truth = data.points[index][:, :kp, 0, 3:6].flatten(0, 1)
        seen = truth[:, 2] > 0.5
        distances.append((points[:, 0, 0, :2] - truth[:, :2]).norm(dim=1)[seen] * backbone.image_size / 2)
        tail = hidden[-1][:, n + kp * (tp + q) :].unflatten(1, answers.shape[1:])
        guess, labels = backbone.vlm.lm_head(tail[:, 0]).argmax(-1), data.labels[index][:, 0]
        right.append(((guess == labels) | (labels == IGNORED)).all(-1).float())
    distance = torch.cat(distances)
    return {
        "point_error_px": distance.median().item(),
        "point_error_px_p90": distance.quantile(0.9).item(),
        "yes_no_accuracy": torch.cat(right).mean().item(),
    }
