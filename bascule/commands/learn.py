"""Commands that learn: pre-training, imitation, online RL, and all of them in a row."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from bascule.commands.base import Command, check_numbers, given, stays
from bascule.quickstart.config import QuickstartConfig
from vla.core.checkpoint import CONFIG
from vla.core.config import lookup, unknown
from vla.core.paths import quoted
from vla.model.config import check_backbone, retirement
from vla.runtime.devices import choose_device
from vla.runtime.locks import refuse_used

if TYPE_CHECKING:
    from envs.grounding.mixture import Plan
    from vla.training.train_config import TrainConfig


@dataclass(frozen=True)
class Quickstart(Command):
    """Teach a policy from demonstrations, refine it by online RL, serve it; writes report.html."""

    out: Path = Path(QuickstartConfig.out)
    """The folder for everything that the run makes."""
    resume: bool = False
    """Continue the run in OUT with its first stage that is not done; start it if there is none yet."""
    suite: str | None = None
    """The suite to learn and to be measured in. Default: tabletop-pick."""
    recipe: str | None = None
    """tabletop; or tabletop-robust: randomised demonstrations and RL, measured in perturbed environments, too
    (15 minutes). Default: tabletop."""
    backbone: str | None = None
    """Another backbone than the recipe's: a name (`vla list backbones`) or a folder."""
    seed: int | None = None
    """Seed of demonstrations, weights and RL. Default: 0."""
    demos: int | None = None
    """Number of demonstrations. Default: 20, scarce on purpose: many leave RL little to do."""
    imitation_steps: int | None = None
    """Gradient steps of imitation. Default: 700; tabletop-robust: 800."""
    rl_updates: int | None = None
    """Updates of online RL. Default: 16 (four minutes on idle cores); tabletop-robust: 18 (eight minutes)."""
    rl_seconds: float | None = None
    """Limit of online RL's time. Default: 960; tabletop-robust: 1920; many tasks, robosuite: 240, no updates."""
    eval_episodes: int | None = None
    """Scenes on which each policy is measured. Default: 400."""
    control_episodes: int | None = None
    """Scenes of each control. Default: 200."""
    served_episodes: int | None = None
    """Scenes that are played through the policy server. Default: 12."""
    workers: int | None = None
    """Processes that simulate. Default: 2."""
    smoke: bool = False
    """Everything once, with tiny budgets: proves that it runs, teaches nothing."""

    def run(self) -> int | None:
        from bascule.quickstart.job import quickstart

        asked = {name: value for name, value in vars(self).items() if name != "resume" and value is not False}
        asked = given(**asked | {"out": str(self.out)})
        report = quickstart(QuickstartConfig(**asked), resume=self.resume, given=asked)
        if failed := [stage for stage in report["stages"] if stage["state"] == "failed"]:
            told = "; ".join(f"{stage['name']}: {stage['reason']}" for stage in failed)
            print(f"vla: error: {told}; vla quickstart --resume --out {quoted(self.out)} tries again", file=sys.stderr)
            return 1
        return None

    def kept(self) -> str:
        told = f"what finished stays in {self.out}; vla quickstart --resume --out {quoted(self.out)} goes on"
        return stays(self.out, told)


@dataclass(frozen=True)
class Pretrain(Command):
    """Pre-train an embedded vision-language backbone on rendered scenes, with questions and answers about them."""

    kind: Positional[str] = "small"
    """small: convolutions at several scales, and the words of SmolLM2 (needs the extra smollm)."""
    data: tuple[Path, ...] = ()
    """Folders of `vla ground-data`; the last 256 scenes of each are for evaluation only. Default: it first makes its
    own in OUT/data, 72,000 scenes of the tabletop, robosuite and Meta-World, most of them randomised (4 GB, about an
    hour on two cores), each with a share of its own."""
    weights: tuple[float, ...] = ()
    """How often each of several folders of --data is drawn. Default: by their sizes."""
    scenes: int | None = None
    """Number of scenes to make in all, without --data. Default: 72,000. Every set keeps its share and has at least 288,
    of which 256 are for evaluation only."""
    without: tuple[Literal["robosuite", "metaworld"], ...] = ()
    """Simulators whose scenes are not made, so that they need not be installed."""
    workers: int = 2
    """Processes that render these scenes."""
    out: Path = Path("runs/backbone")
    """The folder for the backbone."""
    minutes: float | None = None
    """Wall-clock budget of the training, without the rendering; the learning rate decays to its end. Default: 110,
    three hours with its scenes."""
    steps: int | None = None
    """Stop after this number of steps, if that is sooner."""
    initial: str | None = None
    """Start from this backbone (a name or a folder) instead of an untrained one."""
    only_pointer: bool = False
    """Train only the part of `initial` that looks at the picture again to refine a pixel; the rest stays."""
    only_sight: bool = False
    """Train only the part of `initial` that tells whether what is named is in sight, and set its threshold; the rest
    stays."""
    lr: float | None = None
    """Largest learning rate. Default: 1.2e-3 from an untrained backbone, 7e-4 from `initial`."""
    questions: int | None = None
    """Number of a scene's five questions that name something to use at each step. Default: all."""
    stem: Literal["imagenet", "random"] = "imagenet"
    """The convolutions' first weights. imagenet: those of MobileNetV2 (needs the extra stem)."""
    dictionaries: Path | None = None
    """A folder with WordNet's folder dict and Moby's words.txt, to score anew what every word means
    (docs/train.md). Default: the scores that the shipped backbone has."""
    image_size: int = 96
    """Height and width of the pictures that it reads, and makes, pixels; a multiple of 16."""
    seed: int = 0
    """Seed of the initial weights and of the order of the scenes; the scenes that are made are always the same."""
    resume: bool = False
    """Continue the run in OUT with its first set of scenes that is missing, and from its last saved step; begin it if
    there is none yet."""

    def run(self) -> None:
        data = self._checked_data()
        import torch

        from vla.backbones.hub import load
        from vla.runtime.console import progress, say, table
        from vla.runtime.console import stdout as results
        from vla.runtime.devices import bfloat16_is_fast
        from vla.training.grounding.pretrain import PretrainConfig, pretrain, refuse_finished
        from vla.training.grounding.questions import POINT_QUESTIONS

        check_numbers(self, questions=(1, POINT_QUESTIONS))
        refuse_finished(self.out, resume=self.resume)
        config = PretrainConfig(only_pointer=self.only_pointer, only_sight=self.only_sight)
        if self.initial is not None and not self.only_pointer:  # the reader starts anew, the backbone does not
            config = replace(config, lr=7e-4, reader_weight=0.3)
        initial = self._initial()
        if initial is None or load(initial).family_name != "embedded":  # which would not spell a paraphrase's words
            half = bfloat16_is_fast(torch.device("cpu"))
            config = replace(config, half=half, paraphrase=True, points_per_scene=POINT_QUESTIONS, minutes=110.0)
        if note := retirement(initial or ""):
            say(f"note: {note}")
        changes = given(
            minutes=self.minutes, max_steps=self.steps, seed=self.seed, weights=self.weights, lr=self.lr,
            points_per_scene=self.questions,
        )  # fmt: skip
        config = replace(config, **changes)
        plan = None
        if not data:
            from envs.grounding.mixture import planned

            each = config.holdout + config.batch_scenes
            pixels = self.image_size if initial is None else load(initial).image_size
            plan = planned(self.out / "data", pixels, self.scenes, without=self.without, at_least=each)
        start = initial or self._new_small()
        if plan is not None:  # after all that can be refused, and after the words, which need another extra
            self._make_scenes(plan)
            data = plan.folders
            config = replace(config, weights=tuple(part.share for part in plan.parts))
        with progress("pre-training", self.steps, unit="steps") as update:
            figures = pretrain(
                config, data, self.out, initial=start, resume=self.resume,
                on_step=lambda row: update(row.get("step", 0), f"loss {row['loss']:.3f}"),
                on_sight=lambda done: update(self.steps or 0, f"in sight or not: {done:,} scenes"),
            )  # fmt: skip
        results().print(table("held-out scenes", ("figure", "value"), list(figures.items())))

    def _checked_data(self) -> tuple[Path, ...]:
        """The folders to learn from, none where they are to be made. ValueError for flags that cannot be."""
        from vla.data.dataset_meta import require_grounding_set

        if self.kind != "small":
            raise ValueError(retirement(self.kind) or unknown(self.kind, ("small",), "kind of backbone"))
        if self.only_pointer and self.initial is None:
            raise ValueError("--only-pointer needs a backbone to sharpen: --initial small, or a folder")
        if self.only_sight and (self.initial is None or retirement(self.initial)):
            raise ValueError("--only-sight is for a finished backbone: vla pretrain small --initial small, or a folder")
        check_numbers(
            self, minutes=(0.01, 1e6), steps=(1, 10**9), image_size=(32, 1024), seed=(0, 2**31),
            scenes=(1, 100_000_000), workers=(1, 1024), lr=(0, 100),
        )  # fmt: skip
        if self.image_size % 16:
            raise ValueError(f"--image-size must be a multiple of 16, got {self.image_size}")
        refuse_used(self.out / "bascule.json", self.out, "a backbone", resume=self.resume)
        if not self.data:
            if self.weights:
                raise ValueError("--weights are for the folders of --data: the scenes that are made have their own")
            refuse_used(self.out / "data", self.out, "the scenes of a run", resume=self.resume)
            return ()
        if self.scenes is not None or self.without:
            raise ValueError("--scenes and --without are for the scenes that are made, without --data")
        for folder in self.data:
            require_grounding_set(folder)
        return self.data

    def _initial(self) -> str | None:
        """The backbone to start from. None: an untrained one, which a run in OUT may have already."""
        if self.initial is None and (self.out / "bascule.json").exists() and not (self.out / "untrained").exists():
            return str(self.out)  # a run of a kind that is retired
        return self.initial

    def _make_scenes(self, plan: Plan) -> None:
        """Render the sets that OUT/data lacks, one after the other."""
        from vla.core.disk import free_bytes, size_words
        from vla.runtime.console import progress, say

        if plan.missing:
            total, needed, free = sum(part.scenes for part in plan.missing), plan.nbytes(), free_bytes(plan.folder)
            say(
                f"{total:,} scenes of {plan.image_size} pixels are made in {plan.folder}; they need "
                f"{size_words(needed)} of {size_words(free)} free"
            )
        for number, part in enumerate(plan.missing, 1):
            with progress(f"{part.name} ({number} of {len(plan.missing)})", part.scenes, unit="scenes") as update:
                made = plan.make(part, self.workers, on_progress=lambda done, _, update=update: update(done))
            say(f"{part.scenes:,} scenes in {made}")

    def _new_small(self) -> Path:
        """The untrained backbone to start from, made unless the run has it."""
        from vla.backbones.small.create import imagenet_file, new_small
        from vla.runtime.console import progress

        folder = self.out / "untrained"
        if not (folder / "bascule.json").exists():
            stem = imagenet_file() if self.stem == "imagenet" else None
            with progress("word vectors", None, unit="words") as update:
                new_small(
                    folder, stem=stem, image_size=self.image_size, seed=self.seed, dictionaries=self.dictionaries,
                    on_word=lambda done, total: update(done, total=total),
                )  # fmt: skip
        return folder

    def kept(self) -> str:
        return stays(self.out, f"finished sets of scenes and the last checkpoint stay in {self.out}; add --resume")


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

    backbone: str | None = None
    """Another vision-language model: a name (`vla list backbones`), a folder, or MODULE:FUNCTION (docs/extend.md).
    With --resume the run keeps the one that it was begun with."""
    tune: Literal["frozen", "lora", "full"] | None = None
    """How much of the vision-language model learns."""
    head: str | None = None
    """Action head: l1, linear, flow, bins, frequencies; or MODULE:CLASS, one of your own (docs/extend.md)."""
    cameras: tuple[str, ...] | None = None
    """The cameras to use, in order. Default: all of the dataset."""
    image_size: int | None = None
    """Read every picture at this square size in pixels: for cameras that changed their resolution, and to save memory.
    The policy reads its backbone's size either way."""
    weights: tuple[float, ...] | None = None
    """How often each of several datasets is drawn."""
    chunk_size: int | None = None
    """Control steps predicted per decision."""
    n_action_steps: int | None = None
    """Actions of a chunk that are executed before the next observation: at most the chunk size."""
    accumulate: int | None = None
    """Number of parts in which a batch is computed, to save memory."""
    augment: bool = False
    """Random crops and colours; a frozen backbone then runs at every step."""
    randomise: Literal["light", "medium", "strong"] | None = None
    """Change recorded pictures at random in a named strength: crops and colours like --augment, blur, and random
    textures laid over. No simulator can draw such pictures anew."""
    language: Path | None = None
    """Folder of `vla ground-data`: a backbone that learns is trained on its questions too, to keep its words."""
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
        from vla.data.dataset_meta import camera_keys, depth_maps, read_info
        from vla.training.recipes import RECIPES

        check_numbers(self, seed=(0, 2**53), steps=(1, 10**9), image_size=(1, 4096))
        config = self._config(lookup(self.recipe, RECIPES, "recipe")())
        if problem := config.problem():
            raise ValueError(problem)
        if self.backbone is not None:
            check_backbone(self.backbone)
        resuming = refuse_used(self.out / CONFIG, self.out, "a checkpoint", resume=self.resume)
        for dataset in self.dataset:
            camera_keys(read_info(dataset)["features"], config.cameras)
        import numpy as np

        from vla.checking.check import training_warnings
        from vla.data.lerobot_dataset import load_datasets
        from vla.model.model import VLA
        from vla.runtime.console import progress, say
        from vla.runtime.console import stderr as console
        from vla.runtime.distributed import launched
        from vla.training.memory_budget import estimate
        from vla.training.multi_robot import unshared_components
        from vla.training.train import build_vla, train

        rank, processes = launched()
        demos = load_datasets(self.dataset, config.cameras, image_size=self.image_size, lazy=self.stream)
        model = VLA.load(self.out, merge=False) if resuming else build_vla(config, demos)
        if resuming and self.backbone is None:  # the recipe's may be another one by now
            config = replace(config, model=replace(config.model, backbone=model.config.backbone))
        model.to(choose_device(self.device))
        if rank == 0:
            if not resuming and (note := retirement(config.model.backbone)):
                say(f"note: {note}")
            budget = estimate(config, model, demos, processes=processes)
            for line in (*(line for part in demos.items() for line in part[1].summary(part[0])), *budget.lines()):
                say(line)
            for dataset, (name, part) in zip(self.dataset, demos.items(), strict=True):
                if depth := depth_maps(read_info(dataset)["features"]):
                    say(f"{name}: depth maps are left out: {', '.join(depth)}")
                longest = max(np.unique(part.episode_index, return_counts=True)[1])
                if config.model.chunk_size > longest:
                    far = f"a chunk of {config.model.chunk_size} actions is longer than any episode ({longest} frames)"
                    say(f"warning: {name}: {far}: what lies beyond is not learnt; give a smaller --chunk-size")
                for warning in (warnings := training_warnings(dataset, part)):
                    say(f"warning: {name}: {warning}")
                if warnings:
                    say(f"{name}: `vla check {quoted(dataset)}` shows more")
            for line in filter(None, (*unshared_components(demos), budget.problem(), budget.no_room(self.out))):
                say(f"warning: {line}")
        quiet = rank > 0 or not console().is_terminal
        with progress("imitation", config.steps, unit="steps") as update:

            def show(state: Any) -> None:
                loss = "encoding images" if state.loss is None else f"loss {state.loss:.4f}"
                update(state.done, loss, total=state.total)
                if quiet and state.stage == "train" and state.done % (10 * config.log_every) == 0:
                    say(f"step {state.done} of {state.total}: {loss}, lr {state.lr:.2g}")

            report = train(config, model, demos, self.out, on_step=show, resume=self.resume)
        if report.interrupted:
            raise KeyboardInterrupt
        if rank == 0:
            say(f"policy after {report.step} steps in {self.out}")
        return None

    def _config(self, config: TrainConfig) -> TrainConfig:
        """The recipe with this command's changes."""
        from vla.backbones.lora import LoRAConfig
        from vla.processing.config import AUGMENTATIONS, AugmentConfig
        from vla.training.train_config import LanguageConfig

        if self.augment and self.randomise is not None:
            raise ValueError("--augment and --randomise both say how pictures change: give one of them")
        shape = given(
            backbone=self.backbone, head=self.head, chunk_size=self.chunk_size, n_action_steps=self.n_action_steps,
        )  # fmt: skip
        model = replace(config.model, **shape)
        if self.tune is not None:
            adapters = (model.lora or LoRAConfig()) if self.tune == "lora" else None
            model = replace(model, freeze_backbone=self.tune != "full", lora=adapters)
        changes = given(
            steps=self.steps, batch_size=self.batch_size, lr=self.lr, seed=self.seed, cameras=self.cameras,
            weights=self.weights, accumulate=self.accumulate, trackers=self.track or None,
            augment=AugmentConfig() if self.augment else AUGMENTATIONS.get(self.randomise or ""),
            language=None if self.language is None else LanguageConfig(data=str(self.language)),
            checkpointing=self.checkpointing or None, keep_features=self.keep_features or None,
            compile="inductor" if self.compile else None, num_threads=self.num_threads,
        )  # fmt: skip
        return replace(config, model=model, **changes)

    def kept(self) -> str:
        return stays(self.out / CONFIG, f"the last checkpoint stays in {self.out}; add --resume to continue")
