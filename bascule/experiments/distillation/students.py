"""The policies of `vla experiment distil`: students of a privileged teacher, of one that is shuffled, of half a one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bascule.experiments.distillation.config import DistilConfig
from bascule.teachers import PrivilegedTeacher
from envs.demos.record import record
from envs.registry import load_suite
from envs.seeds import DEMO_BLOCK
from rl.models.critic import privileged_state
from rl.recipes import tabletop_pick_guided
from rl.teacher.state_teacher import fit_teacher
from vla.core.types import ActionChunk, Observation, Prefix
from vla.data.lerobot_dataset import DemoSet, load_dataset
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.processor import Processor
from vla.training.distillation.student import student_config, take_decoder, teacher_latents
from vla.training.distillation.teacher import Teacher
from vla.training.recipes import RECIPES
from vla.training.train import build_vla, train
from vla.training.train_config import DistillationConfig, TrainConfig, TrainProgress


def demonstrations(config: DistilConfig, out: Path, seed: int) -> DemoSet:
    """The seed's demonstrations, recorded once."""
    place, seeds = out / f"demos-{seed}", DEMO_BLOCK * seed
    return load_dataset(record(config.suite, config.demos, place, seed0=seeds, num_workers=config.workers))


def plain_policy(config: DistilConfig, demos: DemoSet, seed: int) -> tuple[TrainConfig, VLA]:
    """The recipe for few demonstrations, and its untrained policy."""
    recipe = RECIPES["tabletop-few"]()
    model = replace(recipe.model, backbone=config.backbone)
    recipe = replace(recipe, model=model, steps=config.steps, seed=seed, num_threads=config.workers)
    return recipe, build_vla(recipe, demos)


def fit(config: DistilConfig, demos: DemoSet, processor: Processor, seed: int) -> PrivilegedTeacher:
    """The teacher of the recipe `tabletop-pick-guided`, from imitation of the same demonstrations alone."""
    guide, plane = tabletop_pick_guided().guide, load_suite(config.suite).plane
    assert guide is not None, "the recipe has a teacher"
    chunk = RECIPES["tabletop-few"]().model.chunk_size
    return PrivilegedTeacher(fit_teacher(demos, processor, chunk, guide.teacher, plane=plane, seed=seed), processor)


def train_student(
    config: DistilConfig,
    recipe: TrainConfig,
    plain: VLA,
    demos: DemoSet,
    arm: str,
    seed: int,
    folder: Path,
    shares: Sequence[int],
) -> dict[int, Path]:
    """An arm's policy, exactly resumable: {share of the steps in percent: its checkpoint of then}. KeyboardInterrupt
    when it is stopped."""
    if arm == "plain":
        return _train(recipe, plain, demos, folder, shares, None)
    teacher: Teacher = fit(config, demos, plain.processor, seed)
    if arm == "shuffled":
        teacher = Shuffled(teacher, demos, seed)
    elif arm == "no-decoder":
        teacher = FreshDecoder(teacher, seed)
    learning = DistillationConfig("privileged", 0 if arm == "tune-only" else config.align_steps)
    recipe = student_config(recipe, teacher, demos, learning)
    model = build_vla(recipe, demos)
    take_decoder(model, teacher)
    return _train(recipe, model, demos, folder, shares, teacher)


def _train(
    recipe: TrainConfig, model: VLA, demos: DemoSet, folder: Path, shares: Sequence[int], teacher: Teacher | None
) -> dict[int, Path]:
    *early, last = shares
    places = {max(1, recipe.steps * share // 100): folder.with_name(f"{folder.name}-after-{share}") for share in early}

    def keep(progress: TrainProgress) -> None:
        if progress.stage == "train" and progress.done in places:
            model.save(places[progress.done])

    told = None if teacher is None else lambda: teacher
    resume = (folder / "config.json").exists()
    if train(recipe, model, demos, folder, on_step=keep, resume=resume, teacher=told).interrupted:
        raise KeyboardInterrupt
    return dict(zip(early, places.values(), strict=True)) | {last: folder}


class FreshDecoder:
    """A teacher whose latents are kept, and whose decoder is forgotten: new weights of the same shape."""

    def __init__(self, teacher: Teacher, seed: int) -> None:
        self._teacher = teacher
        self.chunk_size, self.action_names = teacher.chunk_size, teacher.action_names
        generator = torch.Generator().manual_seed(seed)
        weight = teacher.decoder.tensors["weight"]
        # as the l1 head's last layer: an untrained policy barely moves
        fresh = 0.1 * weight.shape[1] ** -0.5 * torch.randn(weight.shape, generator=generator)
        bias = torch.zeros_like(teacher.decoder.tensors["bias"])
        self.decoder = replace(teacher.decoder, tensors={"weight": fresh, "bias": bias})

    def latents(self, demos: DemoSet, frames: slice) -> Tensor:
        """The teacher's own latents."""
        return self._teacher.latents(demos, frames)


class Shuffled:
    """A teacher that says of each frame what belongs to another one, drawn from all. Its decoder is the real one."""

    def __init__(self, teacher: Teacher, demos: DemoSet, seed: int) -> None:
        self.chunk_size, self.action_names, self.decoder = teacher.chunk_size, teacher.action_names, teacher.decoder
        order = torch.randperm(demos.num_frames, generator=torch.Generator().manual_seed(seed))
        self._latents = teacher_latents(teacher, demos)[order]

    def latents(self, demos: DemoSet, frames: slice) -> Tensor:
        """Latents of other frames."""
        return self._latents[frames]


class TeacherPolicy:
    """The privileged teacher acting by itself, to measure it. A `vla.core.types.Policy`."""

    def __init__(self, teacher: PrivilegedTeacher, like: VLA) -> None:
        """`like`: a policy whose decisions it makes instead."""
        self._network, self._processor = teacher.network, like.processor
        self.spec = VLAPolicy(like).spec

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget."""

    @torch.no_grad()
    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The whole chunk (B, C, A) in environment units, from the simulator's state."""
        return self._processor.unnormalise_action(self._network(privileged_state(obs)).numpy())
