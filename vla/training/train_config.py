"""Imitation and pre-training runs: configuration, learning rate at every step, result. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vla.model.config import VLAConfig, model_problem
from vla.processing.config import AugmentConfig

_LARGEST = 1e30
MAY_CHANGE = ("log_every", "save_every", "num_threads", "encode_batch", "keep_features", "trackers")
"""Fields of TrainConfig that a resumed run may set differently: they do not decide what is learnt."""


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
    save_every: int = 100
    """Steps between checkpoints."""
    measure_every: int = 1000
    """Steps between measurements on the scenes that are kept."""
    weights: tuple[float, ...] = ()
    """How often each of several grounding sets is drawn; none: by their sizes."""
    paraphrase: bool = False
    """Say every question in other words each time it is drawn (`vla.language.paraphrase`)."""
    half: bool = True
    """Compute in bfloat16, which is slower than float32 on processors without instructions for it."""
    absent: float = 0.25
    """With `paraphrase`: share of the questions that name something which is not there."""
    sight_scenes: int = 12_000
    """With `paraphrase`: scenes from whose sentences it is learnt, last of all, whether what is named is in sight
    (`vla.training.grounding.sight`). 0: the pointers' visibility tells it."""
    only_sight: bool = False
    """Learn nothing but that, on a backbone that is otherwise finished."""


@dataclass(frozen=True)
class LanguageConfig:
    """How much of every step goes to language."""

    data: str = "runs/ground-data"
    """Folder that `vla ground-data` made."""
    weight: float = 0.1
    """Weight of the questions' loss; that of the actions is 1."""
    scenes: int = 8
    """Per step, over all processes and accumulated parts; each brings three things to point at and one question."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if self.scenes < 1 or not self.weight > 0:
            return f"language.scenes and language.weight must be positive, got {self.scenes} and {self.weight}"
        return None


@dataclass(frozen=True)
class DistillationConfig:
    """Learning from a teacher (`vla.training.distillation`)."""

    teacher: str
    """Its folder."""
    align_steps: int
    """Steps, the run's first, in which the student's latents learn to be the teacher's. 0: only its decoder is used."""

    def problem(self, steps: int) -> str | None:
        """Describe what is wrong with this configuration in a run of `steps`, or return None."""
        if not 0 <= self.align_steps < steps:
            return (
                f"align_steps must be at least 0 and less than the run's {steps} steps, got {self.align_steps}: the "
                "actions are learnt after the alignment"
            )
        return None


@dataclass(frozen=True)
class TalkConfig:
    """How much of every step goes to answering questions (`vla.training.talking`)."""

    data: str = "runs/talk-data"
    """Folder that `vla talk-data` made."""
    weight: float = 1.0
    """Weight of the answers' loss; that of the actions is 1."""
    moments: int = 16
    """Per step, over all processes and accumulated parts."""
    questions: int = 10
    """About each moment."""
    smoothing: float = 0.05
    """Share of a label's probability that goes to the words of all answers alike (VLA4CD)."""
    shuffled: bool = False
    """Give every question the answer of another one of its kind: a control that must not learn to answer."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if self.moments < 1 or self.questions < 1 or not self.weight > 0:
            return "talk.moments, talk.questions and talk.weight must be positive"
        if not 0 <= self.smoothing < 1:
            return f"talk.smoothing must be in [0, 1), got {self.smoothing}"
        return None


@dataclass(frozen=True)
class JudgeConfig:
    """How logged episodes are judged, and what of it the policy is told (`vla.training.advantage`)."""

    good: float = 0.2
    """Share of a task's logged frames whose actions are called good: those with the largest advantage. Demonstrations
    always are."""
    steps_ahead: int = 24
    """Control steps after which the value model looks again."""
    untold: float = 0.3
    """Share of the frames of a batch whose label the policy is not told."""
    folds: int = 5
    """Value models: each judges the episodes that it has not learnt from."""
    value_steps: int = 200
    """Gradient steps of each."""
    shuffled: bool = False
    """Give every frame the label of another one of its dataset: a control that must not improve."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if not (0 < self.good < 1 and 0 <= self.untold < 1):
            return f"advantage.good must be in (0, 1) and untold in [0, 1), got {self.good} and {self.untold}"
        if self.steps_ahead < 1 or self.folds < 2 or self.value_steps < 1:
            return "advantage needs steps_ahead and value_steps of 1 or more, and at least 2 folds"
        return None


@dataclass(frozen=True)
class InterventionConfig:
    """How corrections by a person count (`vla.training.interventions`)."""

    weight: float | None = None
    """A person's frames are drawn so many times as often as others. None: so often that they are half of each batch."""
    policy_frames: Literal["leave", "learn"] = "leave"
    """Leave out the policy's own frames of corrected episodes, and those of a hand-over, or learn them, too."""
    shuffle_seed: int | None = None
    """Give every frame of a person the action of another one: a control that must not improve."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if self.weight is not None and not 0 < self.weight < math.inf:
            return f"interventions.weight must be a positive number, got {self.weight}"
        return None


def asked_for(weight: str | None, policy_frames: Literal["leave", "learn"]) -> InterventionConfig | None:
    """The configuration that the flags --intervention-weight and --policy-frames ask for. ValueError for the second
    without the first, and for a weight that is neither "half" nor a number."""
    if weight is None:
        if policy_frames != "leave":
            raise ValueError("--policy-frames goes with --intervention-weight: give one, as half")
        return None
    try:
        return InterventionConfig(None if weight == "half" else float(weight), policy_frames)
    except ValueError:
        raise ValueError(f"--intervention-weight must be half or a number, got {weight!r}") from None


@dataclass(frozen=True)
class TrainConfig:
    """One imitation run."""

    model: VLAConfig = field(default_factory=VLAConfig)
    cameras: tuple[str, ...] | None = None
    """Which cameras the policy sees, in order; None: all of the dataset."""
    action_space: tuple[str, ...] = ()
    """The space in which chunks are predicted (`vla.processing.action_space`); none: as recorded."""
    image_size: int | None = None
    """Pixels of a view as it is sent to the backbone, square; None: what the backbone reads."""
    max_text_tokens: int = 24
    """Room for an instruction; more when the dataset's are longer."""

    steps: int = 1500
    batch_size: int = 64
    """Frames per optimiser step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts a batch is computed in, one after the other, to save memory. The gradient is that of the whole."""
    lr: float = 7e-4
    backbone_lr: float = 0.1
    """Learning rate of a backbone that learns (or of its adapters), as a fraction of `lr`."""
    warmup_steps: int = 100
    lr_floor: float = 0.05
    """The last step's learning rate, as a fraction of `lr`."""
    weight_decay: float = 0.01
    """On matrices only: biases, norms, gates and embeddings of positions stay free."""
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema_decay: float = 0.0
    """Average the weights over about 1 / (1 - decay) steps; the checkpoint then holds the average. 0: off."""
    augment: AugmentConfig | None = None
    """Change the images at random; a frozen backbone then runs at every step, instead of once over the dataset."""
    word_noise: float = 0.0
    """Noise on the words of the demonstrations' instructions, an episode's each its own, as a multiple of that which
    the backbone `small` was pre-trained with: for instructions in words that nobody has demonstrated. 0: none, and
    backbones without such a pre-training hear none."""
    query_noise: float = 0.0
    """Gaussian noise on the states of the action queries, new at every step, as a multiple of each state's deviation;
    none on where they point, and none for a backbone that does not point. States of few demonstrations are learnt by
    heart, places are not."""
    weights: tuple[float, ...] | None = None
    """Sampling weights of several datasets. None: in proportion to their frames."""
    language: LanguageConfig | None = None
    """Train the backbone on pointing and answering in addition to the actions."""
    distillation: DistillationConfig | None = None
    """Align the policy with a teacher before the actions are learnt; `model.distilled` is then the teacher's."""
    talk: TalkConfig | None = None
    """Teach the policy to answer questions about what it sees and does, in addition to the actions."""
    advantage: JudgeConfig | None = None
    """Judge the datasets that say which episodes succeeded, and tell the policy of each chunk whether it was good."""
    interventions: InterventionConfig | None = None
    """Learn from corrections: datasets that say where a person took over from a policy, beside demonstrations."""
    seed: int = 0

    checkpointing: bool = False
    """Recompute the backbone's layers in the backward pass instead of keeping them: less memory, a third more time."""
    compile: str | None = None
    """torch.compile backend for the parts that learn, such as "inductor". None: off."""
    shard: bool = False
    """With several processes: shard parameters and optimiser over them (FSDP2) instead of copying them (DDP)."""

    log_every: int = 20
    save_every: int = 250
    trackers: tuple[str, ...] = ()
    """Besides metrics.jsonl: "tensorboard", "wandb", "trackio"."""
    num_threads: int = 0
    """Torch threads. 0: one per idle core, at most 4, and the same again when resumed (bit-exactness needs that)."""
    encode_batch: int = 64
    keep_features: bool = False
    """Keep the backbone's features on disk in OUT and read them from there (memory-mapped), instead of in memory."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "encode_batch"):
            if getattr(self, name) < 1:
                return f"{name} must be at least 1, got {getattr(self, name)}"
        if self.num_threads < 0:
            return f"num_threads must be at least 1, or 0 for as many as are idle; got {self.num_threads}"
        for name in ("lr", "backbone_lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                return f"{name} must be a positive number, got {getattr(self, name)}"
            if getattr(self, name) > _LARGEST:
                return f"{name} must be at most {_LARGEST:g}, got {getattr(self, name)}"
        if not 0 <= self.ema_decay < 1:
            return f"ema_decay must be in [0, 1), got {self.ema_decay}"
        if self.batch_size % self.accumulate:
            return f"batch_size {self.batch_size} does not divide into accumulate {self.accumulate} equal parts"
        learns = self.model.trains_backbone
        if not learns and (self.language is not None or self.checkpointing):
            return "language and checkpointing are for a backbone that learns: --tune full, or --tune lora"
        if not 0 <= self.word_noise < math.inf:
            return f"word_noise must be 0 or more, got {self.word_noise}"
        if self.word_noise and (learns or self.augment is not None):
            return "word_noise is for a frozen backbone that reads each frame once: leave out --augment and --tune"
        if not 0 <= self.query_noise < math.inf:
            return f"query_noise must be 0 or more, got {self.query_noise}"
        if self.model.memory is not None and self.augment is not None:
            return "memory keeps features that are computed once a frame: leave out --augment, --randomise or --memory"
        if self.keep_features and (learns or self.augment is not None):
            return (
                "keep_features is for a frozen backbone that reads each frame once: leave out --keep-features, or "
                "--augment, --randomise and --tune"
            )
        if self.model.modulators is not None:
            live = ("keep_features", "word_noise") if self.model.modulators.decoder else ()
            for name in ("language", "checkpointing", "compile", "shard", *live):
                if getattr(self, name):
                    return f"modulators learn without {name}: leave it out"
        if self.shard and not learns:
            return "shard is for a backbone that learns: a frozen one needs no gradient and no optimiser to spread"
        if self.weights is not None and not all(0 < weight < math.inf for weight in self.weights):
            return f"weights of datasets must be positive numbers, got {', '.join(map(str, self.weights))}"
        if self.distillation is not None and self.action_space:
            return "a teacher's decoder gives actions as they were recorded: leave out --action-space, or --teacher"
        if self.distillation is not None:
            if self.language is not None or self.weights is not None:
                return "a teacher teaches actions of one dataset: leave out --language and --weights beside --teacher"
            if problem := self.distillation.problem(self.steps):
                return problem
        if self.talk is not None and self.model.talk is None:
            return (
                "this policy has no talker (model.talk): teach it to talk from the beginning, with --talk, not --init"
            )
        if self.talk is not None and (self.language is not None or self.distillation is not None or self.shard):
            return "talk goes neither with language, whose questions are others, nor with a teacher or shard"
        if self.talk is not None and self.model.talk is not None and (self.model.talk.rank > 0) == learns:
            return "a frozen backbone talks by adapters (talk.rank above 0), one that learns without (talk.rank 0)"
        if self.advantage is not None and (learns or self.augment is not None or self.distillation is not None):
            return (
                "advantage judges frames by a frozen backbone's features: leave out --tune, --augment, --randomise and "
                "--teacher"
            )
        if self.interventions is not None:
            for name in ("weights", "advantage", "distillation"):
                if getattr(self, name) is not None:
                    return f"interventions say how often frames are drawn, and {name} does, too: leave one of them out"
            if self.model.memory is not None or self.model.modulators is not None:
                return "interventions are for policies without a memory or modulators, which need whole episodes"
        for part in (self.augment, self.language, self.talk, self.advantage, self.interventions):
            if part is not None and (problem := part.problem()):
                return problem
        return model_problem(self.model)


@dataclass(frozen=True)
class TrainProgress:
    """Argument of `on_step`, which is called after each batch encoded and after each step trained."""

    stage: Literal["encode", "train"]
    done: int
    """Frames encoded, or steps trained (since the very beginning, not since the resume)."""
    total: int
    loss: float | None = None
    lr: float | None = None


@dataclass(frozen=True)
class TrainReport:
    """How a call of `train` ended. The policy itself is in `vla` and in the checkpoint."""

    step: int
    interrupted: bool
    """Ctrl-C or SIGTERM came before the last step; the checkpoint is valid, resume continues."""
    loss: float | None
    """Mean over the last `log_every` steps; None when no step was trained."""
    encode_seconds: float
    train_seconds: float
    samples_per_second: float


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Learning rate of step 0, 1, ..., steps - 1: linear warm-up, then half a cosine down to lr * lr_floor."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    along = (step - cfg.warmup_steps) / max(1, cfg.steps - 1 - cfg.warmup_steps)
    return cfg.lr * (cfg.lr_floor + (1 - cfg.lr_floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, along))))
