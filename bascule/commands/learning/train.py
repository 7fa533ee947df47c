"""`vla train`: imitation of demonstrations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bascule.commands.base import Command, check_numbers, given, stays
from vla.core.checkpoint import CONFIG
from vla.core.config import lookup
from vla.core.paths import quoted
from vla.model.config import check_backbone, retirement
from vla.runtime.devices import choose_device
from vla.runtime.locks import refuse_used

if TYPE_CHECKING:
    from vla.model.model import VLA
    from vla.training.train_config import TrainConfig


_DIVERGED = 2.0
"""A run whose loss ends at more than so many times its first one has not learnt."""
_MOST = {
    name: (-math.inf, most)
    for most, names in (
        (10**6, ("n_action_steps", "batch_size", "accumulate", "memory_frames")),
        (10**9, ("align_steps", "steps_ahead")),
        (4096, ("num_threads",)),
    )
    for name in names
}
"""Bounds of numbers whose least is the configuration's to say: beyond, a run would fill the memory or crash."""


@dataclass(frozen=True)
class Train(Command):
    """Train a policy on demonstrations (any LeRobotDataset v3 folder) by imitation."""

    dataset: tuple[Path, ...]
    """The dataset's folder; several make one policy for several robots."""
    out: Path = Path("runs/policy")
    """The folder for the policy."""
    recipe: str = "tabletop"
    """Name of the run's recipe; `vla list recipes` shows them. The flags below change it."""
    steps: int | None = None
    """Gradient steps."""
    batch_size: int | None = None
    """Frames of a step."""
    lr: float | None = None
    """Largest learning rate."""
    seed: int | None = None
    """Seed of the initial weights and of the order of the frames."""
    resume: bool = False
    """Continue the run in OUT bit-exactly; start it if there is none yet."""
    init: Path | None = None
    """Start from this trained policy, with its shape and its normalisation, instead of from fresh weights."""
    modulators: int | None = None
    """Beside --init: freeze the policy and learn the dataset with a pool of so many modulators (low-rank matrices, one
    or a few of which a dataset takes), so that it keeps what it could do. For the next dataset give the policy that
    came of it as --init, and leave this flag out."""
    known: tuple[Path, ...] = ()
    """Beside --modulators: datasets of what the policy can do already. Observations like the first ones of their
    episodes get no modulator; nothing is learnt from them."""
    modulate: Literal["bridge", "decoder"] = "bridge"
    """Beside --modulators: the layers that they change, those of bridge and head, or also those of the backbone's
    language model, which then runs at every step."""

    advantage: bool = False
    """Beside --init: judge the datasets that say which episodes succeeded (`vla demos --policy`), tell the policy of
    each chunk whether it did better than was to be expected, and ask it for good ones from then on. Datasets that do
    not say so count as demonstrations, which are always good."""
    good: float | None = None
    """Beside --advantage: share of each task's logged frames that is called good. (default: 0.2)"""
    steps_ahead: int | None = None
    """Beside --advantage: control steps after which a chunk is judged by what the value model then expects.
    (default: 24)"""
    guidance: float | None = None
    """Beside --advantage: how many times as far from what it does untold as good actions are it goes. (default: 1)"""
    intervention_weight: str | None = None
    """Learn from corrections: --dataset names recordings that say where a person took over (`vla control --teleop`,
    `vla demos --corrections`, LeRobot's strategy dagger), and demonstrations. The person's frames are drawn so many
    times as often as others; half: so often that they are half of each batch. Goes with --init."""
    policy_frames: Literal["leave", "learn"] = "leave"
    """Beside --intervention-weight: leave out what the policy did itself in corrected episodes, which led into trouble,
    or learn it, too."""

    backbone: str | None = None
    """Another vision-language model: a name (`vla list backbones`), a folder, or MODULE:FUNCTION (docs/extend.md).
    With --resume the run keeps the one that it was begun with."""
    tune: Literal["frozen", "lora", "full"] | None = None
    """How much of the vision-language model learns."""
    head: str | None = None
    """Action head: l1, linear, flow, bins, frequencies; or MODULE:CLASS, one of your own (docs/extend.md). heatmap:
    another kind of policy, which says where the hand goes next and reads depth (docs/beyond.md)."""
    teacher: Path | None = None
    """Learn from a small expert on the same demonstrations first, then go on through its action decoder: the folder of
    a policy of ours, of an RL run (its privileged teacher), or of a policy that LeRobot trained, such as act."""
    align_steps: int | None = None
    """Gradient steps, the first of --steps, in which the policy's latents learn to be the teacher's; 0 takes over only
    its decoder. Default: a fifth of --steps."""
    cameras: tuple[str, ...] | None = None
    """The cameras to use, in order. Default: all of the dataset."""
    xyz: bool = False
    """Read where things are in the robot's frame, from the depth and the calibration of every camera (docs/beyond.md):
    the policy then works with cameras that stand elsewhere. The dataset must hold both, see `vla demos --depth`."""
    image_size: int | None = None
    """Read every picture at this square size in pixels: for cameras that changed their resolution, and to save memory.
    The policy reads its backbone's size either way."""
    weights: tuple[float, ...] | None = None
    """How often each of several datasets is drawn."""
    chunk_size: int | None = None
    """Control steps predicted per decision."""
    action_space: tuple[str, ...] | None = None
    """Predict actions as recorded (default), relative to where the robot is when the chunk begins, or
    the delta from one to the next; then NAME=SPACE for single components (docs/train.md)."""
    n_action_steps: int | None = None
    """Actions of a chunk that are executed before the next observation: at most the chunk size."""
    memory: Literal["bank", "uniform", "last"] | None = None
    """Let the policy look at earlier decisions of the episode again: those between which the way from frame
    to frame is longest (bank), evenly spaced ones, or the last."""
    memory_frames: int | None = None
    """How many of them it looks at. (default: 4)"""
    accumulate: int | None = None
    """Number of parts in which a batch is computed, to save memory."""
    augment: bool = False
    """Random crops and colours; a frozen backbone then runs at every step."""
    randomise: Literal["light", "medium", "strong"] | None = None
    """Change recorded pictures at random in a named strength: crops and colours like --augment, blur, and random
    textures laid over. No simulator can draw such pictures anew."""
    language: Path | None = None
    """Folder of `vla ground-data`: a backbone that learns is trained on its questions too, to keep its words."""
    talk: Path | None = None
    """Folder of `vla talk-data`: the policy learns to answer questions about what it sees and does, too. A frozen
    backbone's actions stay what they are without it; with --tune the backbone learns from both."""
    checkpointing: bool = False
    """Recompute the layers' activations instead of keeping them, to save memory."""
    compile: bool = False
    """Compile the model with torch.compile."""
    keep_features: bool = False
    """Keep a frozen backbone's features on disk in OUT instead of in memory."""
    stream: bool | None = None
    """Leave images on disk and decode them as needed; by default when they would fill half of the free memory."""
    track: tuple[str, ...] = ()
    """Trackers to log to in addition to OUT/metrics.jsonl: tensorboard, wandb, trackio."""
    num_threads: int | None = None
    """Threads of torch. Default: as many as there are idle cores, at most four."""
    device: str = "auto"
    """Torch's device, such as cpu or cuda:0. auto: the first GPU if there is one, else the CPU."""

    def run(self) -> int | None:
        if self.head == "heatmap":
            from bascule.commands.learning.heatmap import train_heatmap

            return train_heatmap(self)
        from vla.data.dataset_meta import camera_keys, depth_maps, read_info
        from vla.training.recipes import RECIPES

        check_numbers(self, seed=(0, 2**53), steps=(1, 10**9), image_size=(8, 4096), modulators=(1, 10_000))
        check_numbers(self, chunk_size=(1, 1000), **_MOST)
        config = self._config(lookup(self.recipe, RECIPES, "recipe")())
        if problem := config.problem():
            raise ValueError(problem)
        if self.backbone is not None:
            check_backbone(self.backbone)
        self._check_init()
        resuming = refuse_used(self.out / CONFIG, self.out, "a checkpoint", resume=self.resume)
        for dataset in self.dataset:
            camera_keys(read_info(dataset)["features"], config.cameras)
        import numpy as np

        from bascule.teachers import check_same_suite, load_teacher
        from vla.backbones.features import hears_noise
        from vla.checking.check import training_warnings
        from vla.data.camera_geometry import out_of_reach
        from vla.data.lerobot_dataset import load_datasets
        from vla.model.model import VLA
        from vla.model.xyz import LIMIT
        from vla.runtime.console import progress, say
        from vla.runtime.console import stderr as console
        from vla.runtime.distributed import launched
        from vla.training.advantage.labels import imitated_failures, judgement, untold_moments
        from vla.training.distillation.student import student_config, take_decoder
        from vla.training.interventions import corrected_lines
        from vla.training.memory_budget import estimate
        from vla.training.modulation import unrecognised
        from vla.training.multi_robot import reorderings, unlike
        from vla.training.run_identity import note_beginning
        from vla.training.train import build_vla, train

        rank, processes = launched()
        model = None
        if resuming or self.init is not None:
            model = VLA.load(self.out if resuming else self.init, merge=not resuming)
        depth = (config.model if model is None else model.config).xyz is not None
        demos = load_datasets(self.dataset, config.cameras, image_size=self.image_size, lazy=self.stream, depth=depth)
        teacher = cache(partial(load_teacher, self.teacher)) if self.teacher is not None else None
        if teacher is not None and not resuming:
            check_same_suite(self.teacher, self.dataset[0])
            (one,) = demos.values()
            config = student_config(config, teacher(), one, config.distillation)
        note_beginning(self.out, self.init, self.known, resuming=resuming)
        if model is None:
            model = build_vla(config, demos)
        elif self.init is not None:
            config = self._extended(config, model, resuming)
        if resuming and self.backbone is None:  # the recipe's may be another one by now
            config = replace(config, model=replace(config.model, backbone=model.config.backbone))
        if teacher is not None and resuming:  # it is not asked again for what the policy has taken over
            taken = replace(config.model, head=model.config.head, distilled=model.config.distilled)
            config = replace(config, model=taken)
        elif teacher is not None:
            take_decoder(model, teacher())
        model.to(choose_device(self.device))
        if rank == 0:
            if not resuming and (note := retirement(config.model.backbone)):
                say(f"note: {note}")
            budget = estimate(config, model, demos, processes=processes)
            told = [line for part in demos.items() for line in part[1].summary(part[0])]
            told += corrected_lines(config.interventions, demos)
            for line in (*told, *reorderings(model, demos), *budget.lines()):
                say(line)
            for dataset, (name, part) in zip(self.dataset, demos.items(), strict=True):
                if (maps := depth_maps(read_info(dataset)["features"])) and not depth:
                    say(f"{name}: depth maps are left out, --xyz reads them: {', '.join(maps)}")
                longest = max(np.unique(part.episode_index, return_counts=True)[1])
                if config.model.chunk_size > longest:
                    far = f"a chunk of {config.model.chunk_size} actions is longer than any episode ({longest} frames)"
                    say(f"warning: {name}: {far}: what lies beyond is not learnt; give a smaller --chunk-size")
                told = (untold_moments if self.advantage else imitated_failures)(name, part)
                if depth:
                    places = model.config.xyz
                    told += [
                        f"{name}: {line}"
                        for line in out_of_reach(part.geometry, places.centre_m, LIMIT * places.scale_m)
                    ]
                for line in told:
                    say(f"warning: {line}")
                for warning in (warnings := training_warnings(dataset, part)):
                    say(f"warning: {name}: {warning}")
                if warnings:
                    say(f"{name}: `vla check {quoted(dataset)}` shows more")
            no_room = budget.no_room(self.out, again=not resuming and config.steps > config.save_every)
            if depth and config.augment is not None and config.augment.crop < 1:
                say("pictures are changed without crops: the depth beside them is as it was measured")
            deaf = None
            if config.word_noise and not hears_noise(model.backbone):
                deaf = f"the backbone '{model.config.backbone}' hears no noise on its words: the recipe's is left out"
            for line in filter(None, (*unlike(model.config, demos), budget.problem(), no_room, deaf)):
                say(f"warning: {line}")
        quiet = rank > 0 or not console().is_terminal
        with progress("imitation", config.steps, unit="steps") as update:
            losses: list[float] = []

            def show(state: Any) -> None:
                if state.loss is not None and not losses:
                    losses.append(state.loss)
                loss = "encoding images" if state.loss is None else f"loss {state.loss:.4f}"
                update(state.done, loss, total=state.total)
                if quiet and state.stage == "train" and state.done % (10 * config.log_every) == 0:
                    say(f"step {state.done} of {state.total}: {loss}, lr {state.lr:.2g}")

            report = train(config, model, demos, self.out, on_step=show, resume=self.resume, teacher=teacher)
        if report.interrupted:
            raise KeyboardInterrupt
        if rank == 0:
            for line in (*judgement(self.out), *unrecognised(model, next(iter(demos.values())))):
                say(line)
            if teacher is None and losses and report.loss is not None and report.loss > _DIVERGED * losses[0]:
                say(f"warning: the loss has risen from {losses[0]:.2g} to {report.loss:.2g}, the policy has not learnt "
                    "what was shown: train again with a smaller --lr")  # fmt: skip
            say(f"policy after {report.step} steps in {self.out}")
        return None

    def _check_init(self) -> None:
        """ValueError for flags that do not go together with --init, or without it."""
        shape = "backbone", "tune", "head", "chunk_size", "action_space", "memory"
        flags = (*shape, "n_action_steps", "weights", "teacher")
        if not self.advantage and given(good=self.good, steps_ahead=self.steps_ahead, guidance=self.guidance):
            raise ValueError("--good, --steps-ahead and --guidance go with --advantage")
        if self.init is None:
            if self.intervention_weight is not None:
                raise ValueError("--intervention-weight goes on with the corrected policy: name it with --init")
            if self.advantage:
                raise ValueError("--advantage improves the policy whose episodes were logged: name it with --init")
            if self.modulators is not None or self.known or self.modulate != "bridge":
                raise ValueError("modulators are learnt on a trained policy: name it with --init")
            return
        if self.modulators is None and (self.known or self.modulate != "bridge"):
            flag = "known" if self.known else "modulate"
            raise ValueError(f"--{flag} goes with --modulators, without which the policy forgets: give their number")
        if same := {path.resolve() for path in self.known} & {path.resolve() for path in self.dataset}:
            raise ValueError(f"{same.pop()} is both --known and --dataset: nothing of it would be learnt; name others")
        from bascule.catalogue import trained

        trained(self.init)
        if changed := [flag for flag in flags if getattr(self, flag) is not None] + ["xyz"] * self.xyz:
            raise ValueError(f"--init keeps the shape of its policy: leave out --{changed[0].replace('_', '-')}")
        if self.advantage and self.modulators is not None:
            raise ValueError("--advantage and --modulators both add to the policy of --init: give one of them")
        if len(self.dataset) > 1 and not self.advantage and self.intervention_weight is None:
            raise ValueError("--init goes on with one dataset at a time: give one --dataset, then the next")

    def _extended(self, config: TrainConfig, model: VLA, resuming: bool) -> TrainConfig:
        """The run's configuration for a model that --init names, which gets what it is to learn with (modulators, or
        the label of good actions) unless it is resumed."""
        from vla.data.lerobot_dataset import load_datasets
        from vla.model.advantage import add_advantage
        from vla.model.config import AdvantageConfig, ModulatorConfig
        from vla.runtime.console import say
        from vla.training.modulation import extend

        pool = None
        if self.modulators is not None:
            pool = ModulatorConfig(self.modulators, decoder=self.modulate == "decoder")
        if not resuming:
            depth = model.config.xyz is not None
            known = load_datasets(self.known, config.cameras, image_size=self.image_size, lazy=self.stream, depth=depth)
            for line in extend(model, pool, known, seed=config.seed):
                say(line)
        elif pool is not None and pool != model.config.modulators:
            raise ValueError(f"{self.out} was begun with other modulators: resume it as it was begun")
        asked = AdvantageConfig(**given(guidance=self.guidance))
        if self.advantage and not resuming:
            add_advantage(model, asked, seed=config.seed)
        elif self.advantage and asked != model.config.advantage:
            begun = f"{self.out} was begun with another --guidance than {asked.guidance:g}"
            raise ValueError(f"{begun}: resume it as it was begun")
        if config.model.trains_backbone and not model.config.trains_backbone:
            raise ValueError(
                f"recipe {self.recipe} trains the backbone, and --init keeps that of its policy as it is: give another "
                "--recipe, or train from the beginning, without --init"
            )
        config = replace(config, model=model.config)
        if problem := config.problem():
            raise ValueError(problem)
        return config

    def _config(self, config: TrainConfig) -> TrainConfig:
        """The recipe with this command's changes."""
        from vla.backbones.lora import LoRAConfig
        from vla.model.config import MemoryConfig, XYZConfig
        from vla.processing.config import AUGMENTATIONS, AugmentConfig
        from vla.training.train_config import DistillationConfig, JudgeConfig, LanguageConfig, TalkConfig, asked_for

        if self.augment and self.randomise is not None:
            raise ValueError("--augment and --randomise both say how pictures change: give one of them")
        shape = given(
            backbone=self.backbone, head=self.head, chunk_size=self.chunk_size, n_action_steps=self.n_action_steps,
        )  # fmt: skip
        model = replace(config.model, **shape)
        if self.xyz:
            model = replace(model, xyz=model.xyz or XYZConfig())
        if self.memory_frames is not None and self.memory is None:
            raise ValueError("--memory-frames goes with --memory: give it a rule, as --memory bank")
        if self.memory is not None:
            frames = given(frames=self.memory_frames)
            model = replace(model, memory=MemoryConfig(rule=self.memory, **frames))
        if self.tune is not None:
            adapters = (model.lora or LoRAConfig()) if self.tune == "lora" else None
            model = replace(model, freeze_backbone=self.tune != "full", lora=adapters)
        if self.talk is not None:
            from vla.training.talking import talker_for

            model = replace(model, talk=talker_for(self.talk, learns=model.trains_backbone))
        changes = given(
            steps=self.steps, batch_size=self.batch_size, lr=self.lr, seed=self.seed, cameras=self.cameras,
            weights=self.weights, accumulate=self.accumulate, trackers=self.track or None,
            augment=AugmentConfig() if self.augment else AUGMENTATIONS.get(self.randomise or ""),
            language=None if self.language is None else LanguageConfig(data=str(self.language)),
            talk=None if self.talk is None else TalkConfig(data=str(self.talk)),
            interventions=asked_for(self.intervention_weight, self.policy_frames),
            advantage=JudgeConfig(**given(good=self.good, steps_ahead=self.steps_ahead)) if self.advantage else None,
            checkpointing=self.checkpointing or None, keep_features=self.keep_features or None,
            compile="inductor" if self.compile else None, num_threads=self.num_threads, action_space=self.action_space,
        )  # fmt: skip
        config = replace(config, model=model, **changes)
        if self.teacher is None:
            if self.align_steps is not None:
                raise ValueError("--align-steps aligns the policy with a teacher: give its folder, --teacher")
            return config
        if self.head is not None:
            raise ValueError("--head changes nothing beside --teacher, whose decoder is the head: leave it out")
        if len(self.dataset) > 1:
            raise ValueError("a teacher teaches actions of one dataset: give one --dataset beside --teacher")
        steps = config.steps // 5 if self.align_steps is None else self.align_steps
        return replace(config, distillation=DistillationConfig(str(self.teacher), steps))

    def kept(self) -> str:
        return stays(self.out / CONFIG, f"the last checkpoint stays in {self.out}; add --resume to continue")
