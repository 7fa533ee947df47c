"""Vision-language pre-training of the embedded backbones on rendered scenes: point, answer, describe. No actions yet.

A run can be stopped and resumed: `OUT/state.pt` holds all that it needs, and every step draws its scenes by its number.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from vla.backbones.backbone import SPEC_FILE, Backbone
from vla.backbones.hub import load as load_backbone
from vla.backbones.tiny import learn_words
from vla.core.config import encode, load_json, save_json, write_atomic
from vla.core.disk import writing
from vla.data.dataset_meta import set_digest
from vla.runtime.locks import locked, refuse_used
from vla.training.grounding.loss import evaluate, scene_loss
from vla.training.grounding.pointing import Reader
from vla.training.grounding.questions import POINT_QUESTIONS, GroundingSet, read_questions, words_of
from vla.training.grounding.sight import HEARD, fit_sight, heard, set_threshold
from vla.training.train_config import PretrainConfig

_STATE = "state.pt"
_RUN = "pretrain.json"
"""The file of a run that holds what it was begun with."""
_MAY_CHANGE = ("minutes", "max_steps", "save_every", "measure_every", "half")
"""Fields of PretrainConfig that a resumed run may set differently."""


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
    initial: Path | str,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_sight: Callable[[int], None] | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train an embedded backbone on grounding sets; writes a backbone folder to `out` and returns held-out figures.

    `initial`: the backbone to start from, a name or a folder; one that does not spell every word learns those that are
    new to it. `on_sight` is told the number of scenes done in the last part (`sight_scenes`). Of several sets the
    figures are named by their folders. `resume` continues the run in `out` from its last saved step, with the minutes
    that it has left, or begins one. ValueError for a folder that holds a run and no `resume`, or a finished one.
    """
    folders = [data_folder] if isinstance(data_folder, Path) else list(data_folder)
    if config.weights and len(config.weights) != len(folders):
        raise ValueError(f"{len(config.weights)} weights for {len(folders)} grounding sets: give one each, or none")
    if not all(0 < weight < math.inf for weight in config.weights):
        raise ValueError(f"weights of sets must be positive numbers, got {', '.join(map(str, config.weights))}")
    if not 1 <= (asked := config.points_per_scene) <= POINT_QUESTIONS:
        raise ValueError(f"a scene has {POINT_QUESTIONS} questions that name something, not {asked}")
    if config.batch_scenes % config.num_processes:
        raise ValueError(f"batch_scenes {config.batch_scenes} must be a multiple of {config.num_processes} processes")
    share = config.batch_scenes // config.num_processes
    for folder in folders:
        learnt = len(np.load(folder / "images.npy", mmap_mode="r")) - config.holdout
        if learnt < share:
            raise ValueError(
                f"{folder} has {max(0, learnt)} scenes to learn from, beside {config.holdout} held out, and a step "
                f"draws up to {share}: make more of them (vla ground-data --scenes)"
            )
    with locked(out), tempfile.TemporaryDirectory() as folder:
        refuse_finished(out, resume=resume)
        out.mkdir(parents=True, exist_ok=True)
        about = _about(config, folders, initial)
        if (out / _STATE).exists():
            _check_same(load_json(out / _RUN) if (out / _RUN).exists() else {}, about, out)
        else:
            save_json(out / _RUN, about)
        store = str(Path(folder) / "store")
        context = mp.get_context("spawn")
        others = [
            context.Process(target=_run, args=(rank, config, folders, out, store, initial), daemon=True)
            for rank in range(1, config.num_processes)
        ]
        for process in others:
            process.start()
        try:
            return _run(0, config, folders, out, store, initial, on_step, on_sight)
        finally:
            for process in others:
                process.join(timeout=20)
                process.kill()


def _about(config: PretrainConfig, folders: Sequence[Path], initial: Path | str) -> dict[str, Any]:
    """All that decides what a run learns, but for its budget: a resumed one must have it in common."""
    sets = [[folder.name, len(np.load(folder / "images.npy", mmap_mode="r"))] for folder in folders]
    said = {name: value for name, value in encode(config).items() if name not in _MAY_CHANGE}
    return {**said, "data": sets, "contents of the sets": [*map(set_digest, folders)], "initial": str(initial)}


def _check_same(begun: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """ValueError for a run in `out` that was begun otherwise."""
    for name, value in now.items():
        own = name == "initial" and str(value).startswith(str(out))  # where the run put what it began with
        if name in begun and begun[name] != value and not own:
            raise ValueError(
                f"{out} was begun with {name} {begun[name]}, not {value}: resume it as it was begun, or begin another "
                "run (--out)"
            )


def refuse_finished(out: Path, *, resume: bool) -> None:
    """ValueError for a folder that holds a run and no `resume`, or a finished run."""
    if refuse_used(out / SPEC_FILE, out, "a backbone", resume=resume) and not (out / _STATE).exists():
        raise ValueError(f"{out} holds a finished backbone: choose another folder (--out)")


def _in_sight(
    config: PretrainConfig,
    backbone: Backbone,
    data: GroundingSet,
    share: np.ndarray,
    on_sight: Callable[[int], None] | None,
) -> dict[str, float]:
    """Teach the backbone whether what is named is in sight, and set its threshold on held-out scenes. `share` of the
    scenes that each set gives."""
    sets = data.split(config.holdout)
    if config.sight_scenes:
        rng = np.random.default_rng([config.seed, 1])
        counts = [min(len(own), int(config.sight_scenes * part)) for (own, _), part in zip(sets, share, strict=True)]
        rows = [rng.choice(own, n, replace=False) for (own, _), n in zip(sets, counts, strict=True)]
        learnt = heard(backbone, data, np.concatenate(rows), rng, noise=HEARD, on_scenes=on_sight)
        fit_sight(backbone, *learnt, seed=config.seed)
    held_out = np.concatenate([kept for _, kept in sets])
    rng = np.random.default_rng([config.seed, len(held_out)])
    return set_threshold(backbone, *heard(backbone, data, held_out, rng, new_words=True))


def _run(
    rank: int,
    config: PretrainConfig,
    folders: list[Path],
    out: Path,
    store: str,
    initial: Path | str,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_sight: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """One rank's training loop."""
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    state = torch.load(out / _STATE, weights_only=True) if (out / _STATE).exists() else None
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
    if state is not None:
        backbone.load_state_dict(state["backbone"])
        reader.load_state_dict(state["reader"])
        optimiser.load_state_dict(state["optimiser"])
    batch = config.batch_scenes // config.num_processes
    sets = data.split(config.holdout)
    share = np.array(config.weights or [len(own) for own, _ in sets], np.float64)
    share /= share.sum()

    def draw(rng: np.random.Generator) -> np.ndarray:
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
    step = 0 if state is None else state["step"]
    start = time.monotonic() - (0.0 if state is None else state["seconds"])

    def save() -> None:
        backbone.save(out)
        held = {"backbone": backbone.state_dict(), "reader": reader.state_dict(), "optimiser": optimiser.state_dict()}
        buffer = io.BytesIO()
        torch.save({**held, "step": step, "seconds": time.monotonic() - start}, buffer)
        write_atomic(out / _STATE, buffer.getvalue())

    try:
        while True:
            fraction = max((time.monotonic() - start) / (60 * config.minutes), step / config.max_steps)
            fraction = team.share(fraction)
            if fraction >= 1 or config.only_sight:
                break
            scale = config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * fraction))
            for group in optimiser.param_groups:
                group["lr"] = config.lr * scale * min(1.0, (step + 1) / config.warmup_steps)
            rng = np.random.default_rng([config.seed, rank, step])
            total, row = scene_loss(backbone, reader, data, draw(rng), rng, config)
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
            if step % config.measure_every == 0:
                row |= figures_now()
            if step % config.save_every == 0:
                save()
            if step % 50 == 0:
                with writing(out / "metrics.jsonl"):
                    log.write(json.dumps(row) + "\n")
                    log.flush()
            if on_step:
                on_step(row)
        if log is None:
            return {}
        figures = ({} if config.only_sight else figures_now()) | {"steps": step, "seconds": time.monotonic() - start}
        if config.paraphrase:
            figures |= _in_sight(config, backbone, data, share, on_sight)
        log.write(json.dumps(figures) + "\n")
        if fold := getattr(backbone.vlm, "fold", None):
            fold()
        backbone.save(out)
        (out / _STATE).unlink(missing_ok=True)
        return figures
    finally:
        if log is not None:
            log.close()
        team.close()
