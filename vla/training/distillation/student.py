"""A student of a teacher: its configuration, the decoder that it takes over, and the latents that it is aligned with.

VITA-VLA's two stages (arXiv 2510.09607) in one run: for `align_steps` steps the student's latents learn to be the
teacher's; then everything that learns is tuned by the actions' loss. The phase follows from the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vla.backbones.features import Features
from vla.core.checkpoint import load_tensors, save_tensors
from vla.data.batches import Batch
from vla.data.lerobot_dataset import DemoSet
from vla.model.config import DistilledConfig
from vla.model.heads.distilled import DistilledHead
from vla.model.model import VLA
from vla.runtime.process import Stop
from vla.training.distillation.teacher import Teacher
from vla.training.train_config import DistillationConfig, TrainConfig, TrainProgress

LATENTS = "teacher-latents.safetensors"
"""The file of a run that holds the teacher's latents of its demonstrations, while they are needed."""
_LEAST_STD = 1e-3
"""Least deviation that a latent's dimension is divided by, as a fraction of the dimensions' root mean square: one that
never changes stays near 0."""


def student_config(cfg: TrainConfig, teacher: Teacher, demos: DemoSet, distillation: DistillationConfig) -> TrainConfig:
    """The run's configuration with the teacher's decoder as the policy's head. ValueError, one line, where the teacher
    cannot teach it."""
    _check_actions(teacher, demos)
    decoder, chunk = teacher.decoder, cfg.model.chunk_size
    if teacher.chunk_size != chunk:
        raise ValueError(
            f"the teacher's chunks have {teacher.chunk_size} actions, this run's {chunk}: give --chunk-size "
            f"{teacher.chunk_size}, or another --teacher"
        )
    shape = DistilledConfig(decoder.width, decoder.reads)
    model = replace(cfg.model, head=decoder.head, distilled=shape)
    return replace(cfg, model=model, distillation=distillation)


def take_decoder(vla: VLA, teacher: Teacher) -> None:
    """Give a fresh student the teacher's decoder, and the scales between the two policies' action units."""
    head, decoder = vla.head, teacher.decoder
    assert isinstance(head, DistilledHead), "the student was built from another configuration"
    head.decoder.load_state_dict(decoder.tensors)
    centre, half = vla.processor.action_affine
    head.action_gain.copy_(torch.as_tensor(decoder.half / half))
    head.action_shift.copy_(torch.as_tensor((decoder.centre - centre) / half))


def teacher_latents(
    teacher: Teacher, demos: DemoSet, *, batch_size: int = 64, on_progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """The teacher's latents of every frame, (F, C, D) or (F, D). ValueError if they are not finite."""
    parts = []
    for start in range(0, demos.num_frames, batch_size):
        rows = slice(start, min(start + batch_size, demos.num_frames))
        parts.append(teacher.latents(demos, rows))
        if on_progress is not None:
            on_progress(rows.stop, demos.num_frames)
    latents = torch.cat(parts)
    if not latents.isfinite().all():
        raise ValueError("the teacher's latents are not finite: its weights are damaged, give another --teacher")
    return latents


def alignment_targets(
    vla: VLA,
    teacher: Callable[[], Teacher] | None,
    demos: Sequence[DemoSet],
    out: Path,
    stop: Stop,
    on_step: Callable[[TrainProgress], None] | None,
    *,
    begun: bool,
    save: bool,
) -> Tensor:
    """The standardised latents that the student is aligned with, row by row of the demonstrations.

    The teacher is asked once a run, and what it said is kept in `out` if `save`; `begun`: a run that is resumed reads
    that. A fresh student takes over the latents' mean and deviation, which belong to its weights from then on.
    ValueError without a teacher to ask, for several datasets, and for one that the teacher cannot teach.
    """
    file, head = out / LATENTS, vla.head
    assert isinstance(head, DistilledHead), "only a student of a teacher is aligned"
    if begun and file.is_file():
        return head.standardise(load_tensors(file)["latents"])
    if teacher is None or len(demos) > 1:
        raise ValueError("a run that begins with an alignment needs its --teacher, and one dataset")

    def progress(done: int, total: int) -> None:
        if stop.requested:
            raise KeyboardInterrupt  # nothing has been learnt yet
        if on_step is not None:
            on_step(TrainProgress("encode", done, total))

    latents = teacher_latents(teacher(), demos[0], on_progress=progress)
    if save:
        save_tensors(file, {"latents": latents}, {})
    if not begun:
        flat = latents.flatten(0, -2).double()
        std = flat.std(0, unbiased=False)
        head.latent_mean.copy_(flat.mean(0))
        head.latent_std.copy_(std.clamp(min=max(1e-6, _LEAST_STD * float(std.square().mean().sqrt()))))
    return head.standardise(latents)


def alignment(vla: VLA, features: Features, batch: Batch) -> tuple[Tensor, Tensor]:
    """(distance of the student's latents from those in the batch, standardised; the actions' loss, to be told only)."""
    x_BCD = vla.latent(features, batch.proprio_BP)
    with torch.no_grad():
        action = vla.head.loss(x_BCD, batch.action_BCA, batch.mask)
    return vla.head.alignment(vla.head.mapped(x_BCD), batch.latent, batch.mask), action


def _check_actions(teacher: Teacher, demos: DemoSet) -> None:
    """ValueError, one line, where the teacher acts in other components than were demonstrated."""
    width, names = len(teacher.decoder.centre), teacher.action_names
    if names is None and width != len(demos.action_names):
        raise ValueError(
            f"the teacher's actions have {width} components, the demonstrations' {len(demos.action_names)} "
            f"({', '.join(demos.action_names)}): give a --teacher of this robot"
        )
    if names is not None and names != demos.action_names:
        raise ValueError(
            f"the teacher's actions are {', '.join(names)}, the demonstrations' {', '.join(demos.action_names)}: "
            "give a --teacher of this robot"
        )
