"""Imitation: train bridge and head on demonstrations, and optionally the backbone. One loop, exactly resumable.

`OUT` is one checkpoint folder (`vla.core.checkpoint`: saved atomically, always whole) plus `metrics.jsonl`. Batches,
dropout and augmentation follow from (seed, step) alone, so a run that was interrupted and resumed makes the same
parameters, bit for bit, as one that was not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla.backbones.features import Features, hears_noise, with_query_noise
from vla.core.checkpoint import CONFIG, load_checkpoint
from vla.core.config import difference, encode, fill_defaults, lookup, save_json
from vla.core.disk import remove
from vla.data.batches import Ahead, Batch, LiveDemos, Source, join
from vla.data.feature_cache import encode_demos
from vla.data.lerobot_dataset import DemoSet
from vla.model.config import check_loads
from vla.model.model import VLA
from vla.processing.augment import augment, draw_augmentation
from vla.processing.batch import ModelInput
from vla.processing.processor import Processor
from vla.processing.text import warn_of_lookalikes
from vla.runtime.distributed import assemble, held, launched, load_model, load_optimiser, part_of, whole
from vla.runtime.locks import locked, refuse_used
from vla.runtime.machine import idle_cores
from vla.runtime.process import Stop, restored_threads, stop_signals
from vla.runtime.run_log import METRICS, TRACKERS, Metrics, mean_of
from vla.training.advantage.labels import check_logs, labelled, telling
from vla.training.distillation.student import LATENTS, alignment, alignment_targets
from vla.training.distillation.teacher import Teacher
from vla.training.interventions import frames_of_steps, learnt
from vla.training.language_cotraining import LanguageTask
from vla.training.modulation import asking, routed
from vla.training.multi_robot import build_vla, members_of
from vla.training.optim import average_into, checkpoint_layers, compile_parts, copy_into, parameter_groups
from vla.training.run_identity import check_policy, fingerprint, same_data
from vla.training.sampling import batch_frames, mix
from vla.training.talking import TalkTask
from vla.training.train_config import MAY_CHANGE, TrainConfig, TrainProgress, TrainReport, learning_rate

__all__ = [
    "METRICS", "TrainConfig", "TrainProgress", "TrainReport", "TrainingDiverged", "batch_frames", "build_vla",
    "learning_rate", "train",
]  # fmt: skip

OnStep = Callable[[TrainProgress], None]


class TrainingDiverged(FloatingPointError, ValueError):
    """The loss or its gradient is no longer finite: the learning rate or the data must change. The last checkpoint is
    from before."""


def train(
    cfg: TrainConfig,
    vla: VLA,
    demos: DemoSet | Mapping[str, DemoSet],
    out: str | os.PathLike[str],
    *,
    on_step: OnStep | None = None,
    resume: bool = False,
    teacher: Callable[[], Teacher] | None = None,
) -> TrainReport:
    """Train `vla` in place and leave its checkpoint in `out`. Several named datasets: a policy built for all of them.

    `resume`: continue from the checkpoint in `out` if there is one, else begin. Ctrl-C and SIGTERM finish the step,
    save, return. `teacher`: of a student that is aligned (`cfg.distillation`); asked once a run, before the first step.
    ValueError: the demonstrations do not fit the policy, `out` is taken, or what is resumed was another run.
    TrainingDiverged: loss or gradient not finite.
    """
    out = Path(out)
    if problem := cfg.problem():
        raise ValueError(problem)
    for name in cfg.trackers:
        lookup(name, TRACKERS, "tracker")
    check_policy(cfg, vla)
    check_loads(vla)
    if cfg.advantage is not None:
        check_logs(demos if isinstance(demos, Mapping) else {"demonstrations": demos})
    demos = learnt(cfg.interventions, demos)
    members = members_of(vla, demos)
    if launched()[0] == 0:
        warn_of_lookalikes((text for _, part in members.values() for text in part.instruction), vla.processor.tokens)
    with locked(out), restored_threads(), stop_signals() as stop, torch.random.fork_rng(devices=[]):
        taken = refuse_used(out / CONFIG, out, "a checkpoint", resume=resume)
        out.mkdir(parents=True, exist_ok=True)
        run = _Run(cfg, vla, {name: part for name, (_, part) in members.items()})
        if taken:
            run.restore(out)
        torch.set_num_threads(run.threads)
        if run.step >= cfg.steps:
            return TrainReport(run.step, False, None, 0.0, 0.0, 0.0)
        if run.team.rank == 0:
            save_json(out / "train.json", encode(cfg))
        begin = time.monotonic()
        source = asking(vla, next(iter(members.values()))[1], _source(run, members, out, on_step, stop), begun=taken)
        if run.step < run.align_steps or (cfg.distillation is not None and not taken):
            demos, save = [part for _, part in members.values()], run.team.rank == 0
            run.targets = alignment_targets(vla, teacher, demos, out, stop, on_step, begun=taken, save=save)
        with compile_parts(vla, cfg.compile), checkpoint_layers(vla.backbone, cfg.checkpointing):
            return _loop(run, source, out, on_step, stop, time.monotonic() - begin)


class Objective(nn.Module):
    """Batch -> loss: what is wrapped, sharded and differentiated."""

    def __init__(self, vla: VLA, language: LanguageTask | TalkTask | None, cfg: TrainConfig) -> None:
        super().__init__()
        self.vla, self.language, self.query_noise = vla, language, cfg.query_noise
        self.untold = 0.0 if cfg.advantage is None else cfg.advantage.untold

    def forward(self, batch: Batch, weight: float, scenes: tuple | None, scenes_weight: float) -> tuple[Tensor, ...]:
        """(what to differentiate, the actions' loss, the questions' loss or the distance from the teacher)."""
        seen = batch.seen
        with routed(self.vla, batch) as pull:
            features = seen if isinstance(seen, Features) else self.vla.encode(seen)
            features = telling(with_query_noise(features, self.query_noise), batch, self.untold)
            if batch.latent is not None:
                distance, action = alignment(self.vla, features, batch)
                return distance * weight, action, distance.detach()
            action, _ = self.vla.loss(features, batch.proprio_BP, batch.action_BCA, batch.mask)
        if self.language is None or scenes is None:
            return (action + pull) * weight, action.detach(), action.new_zeros(())
        language = self.language(self.vla.backbone, *scenes)
        return action * weight + language * scenes_weight, action.detach(), language.detach()


class _Run:
    """Training state that a checkpoint must restore: model, optimiser, average, step."""

    def __init__(self, cfg: TrainConfig, vla: VLA, demos: Mapping[str, DemoSet]) -> None:
        self.cfg, self.vla, self.step = cfg, vla, 0
        self.recent: list[dict[str, float]] = []
        """Figures of the last `log_every` steps, of which those up to step `logged` are in the log as a mean."""
        self.logged = 0
        self.live = vla.backbone_learns or cfg.augment is not None
        """The backbone runs at every step, instead of once over the dataset."""
        self.data = fingerprint(demos.values(), cfg.talk or cfg.language)
        self.choose = frames_of_steps(cfg, vla, demos)
        self.align_steps = 0 if cfg.distillation is None else cfg.distillation.align_steps
        self.targets: Tensor | None = None
        """Latents that a student is aligned with in its first steps, in the order of the frames."""
        self.team = assemble(shard=cfg.shard, unused=vla.backbone_learns or self.align_steps > 0)
        if cfg.batch_size % (self.team.size * cfg.accumulate):
            raise ValueError(
                f"batch_size {cfg.batch_size} does not divide among {self.team.size} processes x {cfg.accumulate} parts"
            )
        self.threads = cfg.num_threads or min(4, max(1, round(idle_cores())))
        self.objective = Objective(vla, _questions(cfg, vla), cfg)
        self.team.place(self.objective)
        self.wrapped = self.team.wrap(self.objective)
        groups, self.scales = parameter_groups(self.objective, cfg)
        # Sharded and plain parameters (scalars) cannot be updated in one batched call.
        batched = False if cfg.shard and self.team.size > 1 else None
        self.optimiser = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, foreach=batched)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        talks = set() if vla.talker is None else set(vla.talker.parameters())
        self.acting, self.talking = ([p for p in self.parameters if (p in talks) == says] for says in (False, True))
        self.average = [p.clone() for p in held(self.parameters)] if cfg.ema_decay else None

    def fetch(self, source: Source, step: int) -> list[tuple[Batch, float]]:
        """This process's parts of a step's batch, with their shares of the whole batch's mean."""
        cfg = self.cfg
        frames = self.choose(step, source.sizes)
        places = self.team.share(torch.arange(cfg.batch_size)).chunk(cfg.accumulate)
        parts = [source.take(frames[place]) for place in places]
        if step < self.align_steps:
            parts = [replace(part, latent=self.targets[frames[i]]) for part, i in zip(parts, places, strict=True)]
        total = max(1.0, source.weigh(frames)) if len(frames) > len(places[0]) else max(1.0, parts[0].weight)
        if cfg.augment is not None:
            views = parts[0].seen.images_BVHWC.shape[1]
            draws = draw_augmentation(cfg.batch_size, views, mix(cfg.seed, -(1 << 40) - step))
            parts = [_augmented(part, draws[place], cfg, self.vla) for part, place in zip(parts, places, strict=True)]
        return [(part, part.weight / total) for part in parts]

    def update(self, parts: list[tuple[Batch, float]]) -> dict[str, float]:
        """One optimiser step; its figures, as the optimiser saw them."""
        cfg, team, size = self.cfg, self.team, self.team.size
        # Dropout too must follow from (seed, step) alone; processes must not all drop the same places.
        torch.manual_seed(mix(cfg.seed, -1 - self.step) + team.rank)
        for group, scale in zip(self.optimiser.param_groups, self.scales, strict=True):
            group["lr"] = learning_rate(cfg, self.step) * scale
        self.optimiser.zero_grad(set_to_none=True)
        value = asked = 0.0
        aligning = self.step < self.align_steps
        for number, (batch, share) in enumerate(parts):
            scenes, scenes_weight = self._scenes(number, len(parts))
            with team.part(self.wrapped, number == len(parts) - 1):
                # Processes' gradients are averaged: undo that for the sum over the batch.
                goal, action, other = self.wrapped(batch.to(self.vla.device), share * size, scenes, scenes_weight)
                goal.backward()
            part = share if aligning else 1 / len(parts) / size
            value, asked = value + float(action) * share, asked + float(other) * part
        value, asked = team.total(value, asked)
        norm = team.clip(self.acting, cfg.grad_clip)
        if self.talking:  # apart: a frozen backbone's policy acts as if it had not learnt to talk
            team.clip(self.talking, cfg.grad_clip)
        rate = self.optimiser.param_groups[0]["lr"]
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"loss {value} with gradient norm {norm} at step {self.step} (learning rate "
                f"{rate:.2g}): lower lr, or look for extreme values in the data"
            )
        self.optimiser.step()
        if self.average is not None:
            average_into(self.average, held(self.parameters), cfg.ema_decay)
        self.step += 1
        figures = {"loss": value, "grad_norm": norm, "lr": rate}
        if aligning:
            return figures | {"align_loss": asked}
        return figures if self.objective.language is None else figures | {"language_loss": asked}

    def _scenes(self, number: int, parts: int) -> tuple[tuple | None, float]:
        """The vision-language scenes of one part, and their weight."""
        language = self.objective.language
        if language is None:
            return None, 0.0
        rows, rng = language.draw(mix(self.cfg.seed, (1 << 41) + self.step))
        place = number * self.team.size + self.team.rank
        mine = rows[place :: parts * self.team.size]
        if not len(mine):
            mine = rows[:1]
        return (mine, rng), language.config.weight / parts

    def save(self, out: Path) -> None:
        """Write a checkpoint from which the run resumes bit for bit. Every process calls it, rank 0 writes."""
        state: dict[str, Any] = {
            "step": self.step,
            "config": encode(self.cfg),
            "data": self.data,
            "threads": self.threads,
            "recent": self.recent,
            "logged": self.logged,
            "optimiser": whole(self.optimiser.state_dict()),
        }
        if self.objective.language is not None:
            state["reader"] = whole(self.objective.language.state_dict())
        mine = held(self.parameters)
        raw = [] if self.average is None else [p.clone() for p in mine]
        if self.average is not None:
            state["raw"] = [p.clone() for p in whole([p.detach() for p in self.parameters])]
            copy_into(mine, self.average)
        try:
            tensors = whole(self.vla.state_dict())
            if self.team.rank == 0:
                self.vla.save(out, trainer_state=state, tensors=tensors)
            self.team.wait()
        finally:
            if self.average is not None:
                copy_into(mine, raw)

    def restore(self, out: Path) -> None:
        """Continue from the checkpoint in `out`. ValueError if its configuration or demonstrations differ, or if
        it holds no training state."""
        checkpoint = load_checkpoint(out)
        state = checkpoint.trainer_state
        if state is None:
            raise ValueError(f"{out} holds a finished policy without its training state: it cannot be resumed")
        before, now = fill_defaults(encode(TrainConfig()), state["config"]), encode(self.cfg)
        for config in (before, now):  # left to the backbone, it is what the policy reads
            config["image_size"] = config["image_size"] or self.vla.processor.config.image_size
        for name in now:
            if name not in MAY_CHANGE and before[name] != now[name]:
                field, was, wanted = difference(name, before[name], now[name])
                raise ValueError(
                    f"{out} was trained with {field}={was!r}, not {wanted!r}: resume it as it was begun, or begin "
                    "another run (--out)"
                )
        if not same_data(state["data"], self.data):
            raise ValueError(
                f"{out} was trained on other demonstrations (other numbers, texts or pictures, another "
                "--image-size or other questions): resume it on those, or begin another run (--out)"
            )
        load_model(self.vla, checkpoint.tensors)
        if self.objective.language is not None:
            load_model(self.objective.language, state["reader"])
        load_optimiser(self.optimiser, state["optimiser"])
        self.step = state["step"]
        self.recent, self.logged = state.get("recent", []), state.get("logged", self.step)
        self.threads = self.cfg.num_threads or state["threads"]
        if self.average is not None:
            self.average = [p.clone() for p in held(self.parameters)]
            raw = [part_of(value, p) for value, p in zip(state["raw"], self.parameters, strict=True)]
            copy_into(held(self.parameters), held(raw))

    def finish(self) -> None:
        """Leave in `vla` what the checkpoint holds."""
        if self.average is not None:
            copy_into(held(self.parameters), self.average)


def _questions(cfg: TrainConfig, vla: VLA) -> LanguageTask | TalkTask | None:
    """The questions that are asked beside the actions; None for a run without."""
    if cfg.talk is not None:
        return TalkTask(cfg.talk, vla)
    return None if cfg.language is None else LanguageTask(cfg.language, vla.backbone, seed=cfg.seed)


def _source(
    run: _Run, members: Mapping[str, tuple[Processor, DemoSet]], out: Path, on_step: OnStep | None, stop: Stop
) -> Source:
    """Cached features where the backbone sees the same pictures every time, images otherwise."""
    cfg, vla, team = run.cfg, run.vla, run.team
    if run.live:
        return join({name: LiveDemos(own, part, vla.chunk_size) for name, (own, part) in members.items()})
    total = sum(part.num_frames for _, part in members.values())
    before, encoded = 0, {}
    # Several processes share one copy on disk: the first computes it, then the others find it there.
    folder = out if cfg.keep_features or team.size > 1 else None
    if team.rank:
        team.wait()
    for name, (processor, part) in members.items():

        def progress(done: int, _: int, before: int = before) -> None:
            if stop.requested:
                raise KeyboardInterrupt  # nothing has been learnt yet, and a checkpoint that was here still is
            if on_step is not None:
                on_step(TrainProgress("encode", before + done, total))

        encoded[name] = encode_demos(
            vla,
            part,
            processor=processor,
            batch_size=cfg.encode_batch,
            folder=folder,
            word_noise=cfg.word_noise if hears_noise(vla.backbone) else 0.0,
            on_progress=progress,
        )
        before += part.num_frames
    if team.rank == 0:
        team.wait()
    parts = {name: (members[name][1], part) for name, part in encoded.items()}
    return labelled(vla, cfg.advantage, parts, join(encoded), out, seed=cfg.seed, begun=run.step > 0)


def _loop(
    run: _Run, source: Source, out: Path, on_step: OnStep | None, stop: Stop, encode_seconds: float
) -> TrainReport:
    cfg, vla, team, first = run.cfg, run.vla, run.team, run.step
    ahead = Ahead(lambda step: run.fetch(source, step)) if run.live else None
    vla.train()
    begin = mark = time.monotonic()
    marked = first
    with _metrics(run, out) as metrics:
        try:
            while run.step < cfg.steps and not team.any(stop.requested):
                last = run.step == cfg.steps - 1
                parts = ahead.get(run.step, last) if ahead else run.fetch(source, run.step)
                run.recent = [*run.recent, run.update(parts)][-cfg.log_every :]
                if run.step % cfg.log_every == 0 or run.step == cfg.steps:
                    now, figures = time.monotonic(), mean_of(run.recent[-(run.step - run.logged) :])
                    if metrics is not None:
                        rate = cfg.batch_size * (run.step - marked) / max(now - mark, 1e-9)
                        metrics.log(run.step, figures | {"seconds": now - begin, "samples_per_second": rate})
                    mark, marked, run.logged = now, run.step, run.step
                if run.step % cfg.save_every == 0 and run.step < cfg.steps:
                    run.save(out)
                if on_step is not None and team.rank == 0:
                    on_step(TrainProgress("train", run.step, cfg.steps, run.recent[-1]["loss"], run.recent[-1]["lr"]))
        finally:
            if ahead is not None:
                ahead.close()
    run.save(out)
    if cfg.distillation is not None and run.step >= run.align_steps and team.rank == 0:
        remove(out / LATENTS)
    run.finish()
    vla.eval()
    seconds = time.monotonic() - begin
    mean = sum(entry["loss"] for entry in run.recent) / len(run.recent) if run.recent else None
    rate = cfg.batch_size * (run.step - first) / max(seconds, 1e-9)
    return TrainReport(run.step, run.step < cfg.steps, mean, encode_seconds, seconds, rate)


@contextmanager
def _metrics(run: _Run, out: Path) -> Iterator[Metrics | None]:
    """The first process's log; None in the others."""
    if run.team.rank:
        yield None
        return
    with Metrics(out, run.cfg.trackers, first_step=run.step, config=encode(run.cfg)) as metrics:
        yield metrics


def _augmented(batch: Batch, draws: Tensor, cfg: TrainConfig, vla: VLA) -> Batch:
    """Its pictures changed, on the model's device."""
    assert cfg.augment is not None and isinstance(batch.seen, ModelInput)
    images = augment(batch.seen.images_BVHWC.to(vla.device), draws, cfg.augment.beside(vla.config.xyz))
    return replace(batch, seen=replace(batch.seen, images_BVHWC=images))
