"""Model configuration: `VLAConfig` and its bridge's configurations, and checks before a run. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vla.backbones.lora import LoRAConfig
from vla.core.config import decode, encode, find, unknown
from vla.processing.preprocess import ProcessorConfig
from vla.processing.stats import Stats

HEAD_NAMES = ("l1", "linear", "flow", "bins", "frequencies")
"""Names in `vla.model.heads.registry.HEADS`, repeated here because importing that module imports torch."""
BACKBONE_NAMES = (
    "small", "tiny", "tiny-goals", "smollm2-135m", "smolvlm2-256m", "smolvlm2-500m", "qwen2.5-vl-3b", "qwen3-vl-2b",
    "paligemma2-3b", "gemma3-4b", "internvl3-1b",
)  # fmt: skip
"""Short names of backbones (`vla.backbones.hub`)."""
DEFAULT_BACKBONE = "small"
DEFAULT_PIXELS = 96
"""Height and width of the pictures that it reads: what demonstrations are best drawn at."""
RETIRED_BACKBONES = ("tiny", "tiny-goals")
"""Still there for policies that were trained on them; nothing starts from them by itself."""


@dataclass(frozen=True)
class BridgeConfig:
    """Shape of the bridge. The chunk size belongs to the whole policy and is given to `Bridge` beside this."""

    width: int = 160
    heads: int = 4
    kv_heads: int = 2
    """Grouped keys and values for the raw tokens; must divide `heads`. (Queries and chunk use all heads.)"""
    ffn_multiple: int = 2
    rope: bool = True
    """Rotary positions over the chunk in the self-attention, on top of the learned ones."""
    raw: bool = True
    """Read the raw image tokens (the gated attention). False: action queries and proprio only."""
    queries: bool = True
    """Read the action queries, and where they point. False: raw tokens and proprio only."""
    coordinate_values: bool = True
    """Raw tokens' values carry their image coordinates, so that attention returns where it looked."""
    gate_init: float = 0.0
    """Initial g in tanh(g). 0 as in the paper: raw tokens join when they help."""
    taps: tuple[int, ...] | str | None = None
    """Which of the backbone's L layers feeds each block: "all" (or None), "last", "last:N" (N blocks) or
    "last:all", "every:K", "first:N", or the layers themselves, one per block. See `resolve_taps`."""
    points_at: tuple[int, ...] | None = None
    """Which blocks see the pointed coordinates; None: all."""
    dropout: float = 0.0
    point_stem: bool = True
    """Start the latent from the pointed coordinates and proprio through a small network, besides attending to them: the
    head then need not discover that eight tokens hold positions."""
    grouped: bool = False
    """Group the keys and values of queries, proprio and chunk by `kv_heads` as well, not only those of raw tokens."""
    shared_projections: bool = False
    """One query projection for the three attentions and one output projection of their sum (as the released code has
    them), instead of one each: a third of those weights."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if self.heads < 1 or self.width % self.heads:
            return f"bridge width {self.width} is not a multiple of heads {self.heads}"
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            return f"bridge heads {self.heads} is not a multiple of kv_heads {self.kv_heads}"
        if self.rope and (self.width // self.heads) % 2:
            return f"rope needs an even head width, not {self.width // self.heads}: change width or heads"
        if not 0.0 <= self.dropout < 1.0:
            return f"bridge dropout {self.dropout} is not in [0, 1)"
        if not (self.raw or self.queries):
            return "a bridge that reads neither raw tokens nor queries is blind: set raw or queries"
        return None


@dataclass(frozen=True)
class FaithfulConfig:
    """Shape of a released policy. Its chunk size belongs to the whole policy."""

    layout: Literal["base", "pro"]
    """pro: keys and values of their own for each source, and the rotation."""
    width: int = 896
    """Width of the latent and of the backbone's hidden states."""
    heads: int = 8
    num_blocks: int = 24
    """Block i reads layer i of the backbone."""
    action_dim: int = 7
    """Only shapes the stem: it starts from action_dim * width zeros."""
    noise_std: float = 0.02
    """Standard deviation of the noise that replaces the zeros in training mode."""
    bf16_table: bool = False
    """The rotation's table in bfloat16, positions included, as in the released weights' own precision."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if self.heads < 1 or self.width % (2 * self.heads):
            return f"a released policy needs an even head width: width {self.width} over {self.heads} heads has none"
        if self.num_blocks < 1 or self.action_dim < 1:
            return "a released policy needs at least one block and one action component"
        return None


@dataclass(frozen=True)
class XYZConfig:
    """Coordinates in the robot's frame, from depth and calibration, in place of those in the pictures
    (`vla.model.xyz`)."""

    centre_m: tuple[float, float, float] = (0.5, 0.0, 0.1)
    """The middle of the workspace in the frame of the cameras' extrinsics."""
    scale_m: float = 0.1
    """Coordinates are divided by this: so that a centimetre is much and the workspace has a side of a few."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        return None if self.scale_m > 0 else f"xyz.scale_m must be a positive number of metres, got {self.scale_m}"


@dataclass(frozen=True)
class ModulatorConfig:
    """Shape of a pool of modulators (`vla.model.modulators`): what learns new tasks on a policy that stands still."""

    count: int = 10
    """Modulators in the pool. A new dataset takes one that none has used yet."""
    rank: int = 8
    alpha: float = 16.0
    """A modulator's output is scaled by alpha / rank."""
    decoder: bool = False
    """Modulate the backbone's language model, too, not only bridge and head: it then runs at every step."""
    assign: Literal["dataset", "observation"] = "dataset"
    """Who chooses the modulator that learns: all episodes of a dataset together, at its beginning, or each observation
    for itself, as published."""
    known_keys: int = 16
    """Keys of what the policy could do before. 0: everything is given to modulators."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if self.count < 1 or self.rank < 1 or not self.alpha > 0:
            return f"modulators need a positive count, rank and alpha, got {self.count}, {self.rank} and {self.alpha}"
        if self.known_keys < 0:
            return f"modulators' known_keys must be 0 or more, got {self.known_keys}"
        return None


@dataclass(frozen=True)
class DistilledConfig:
    """The head of a policy that a teacher taught (`vla.training.distillation`): a mapper, and the teacher's decoder."""

    width: int
    """Width of the teacher's latent."""
    reads: Literal["head", "step", "chunk"]
    """The decoder: the action head that `VLAConfig.head` names; or one linear layer that reads the latent of each step,
    or one latent of the whole chunk."""
    mapper_width: int = 320
    """Hidden width of the mapper from the bridge's latent."""


@dataclass(frozen=True)
class TalkerConfig:
    """The part that answers questions (`vla.model.talking.talker`)."""

    rank: int = 32
    """Rank of the adapters with which a frozen decoder talks. 0: none, for a decoder that learns from both losses."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    names: tuple[str, ...] = ()
    """Names of things, as "the red cube": the backbone looks for each of them before it answers
    (`vla.model.talking.things`). Without names it talks of what it sees in passing."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        fine = self.rank >= 0 and self.alpha > 0
        return None if fine else f"talk.rank must be 0 or more and talk.alpha positive, got {self.rank}, {self.alpha}"


@dataclass(frozen=True)
class MemoryConfig:
    """Which of an episode's earlier decisions a policy looks at again (`vla.model.memory.recall`)."""

    frames: int = 4
    """M, how many of them."""
    rule: Literal["bank", "uniform", "last", "current"] = "bank"
    """bank: those between which the way from frame to frame is longest; uniform: evenly spaced over the episode; last:
    the latest. current: none, the present frame in their place: a control that must fail where memory is needed."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        return None if self.frames >= 1 else f"a memory needs at least one frame, got {self.frames}"


@dataclass(frozen=True)
class AdvantageConfig:
    """A policy that is told whether its actions shall be good ones (`vla.model.advantage`)."""

    guidance: float = 1.0
    """How far the action goes from that of the policy that is told nothing (0) to that of the one asked for good
    actions (1), and beyond."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        fine = 0 <= self.guidance <= 100
        return None if fine else f"advantage.guidance must be from 0 to 100, got {self.guidance}"


@dataclass(frozen=True)
class VLAConfig:
    """Configuration of a model: backbone, bridge, action head."""

    backbone: str | dict[str, Any] = DEFAULT_BACKBONE
    """A name, a local folder or a specification: what `vla.backbones.backbone.load_backbone` takes."""
    bridge: BridgeConfig | FaithfulConfig = field(default_factory=BridgeConfig)
    """Ours, or a released VLA-Adapter policy's (see `vla.model.released.convert`)."""
    head: str = "l1"
    """l1, linear, flow, bins or frequencies; or MODULE:CLASS, a head of your own (docs/extend.md)."""
    distilled: DistilledConfig | None = None
    """A mapper and a teacher's decoder are the head (`vla train --teacher`); `head` is then that decoder's name."""
    chunk_size: int = 8
    """Control steps predicted per decision."""
    n_action_steps: int | None = None
    """Control steps of a chunk that are executed before the next decision. None: all of them."""
    freeze_backbone: bool = True
    lora: LoRAConfig | None = None
    """Train adapters on the frozen backbone."""
    backbone_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the backbone computes. Features, bridge and head are float32 in either case."""
    refiner_width: int = 0
    """Width of the residual that online RL trains (`vla.model.heads.residual`). 0: there is none."""
    refines: Literal["actions", "logits"] = "actions"
    """The residual is added to the head's actions, or to the logits of a head that chooses among bins."""
    modulators: ModulatorConfig | None = None
    """A pool that learns new tasks while everything else stands still."""
    decoder: bool = True
    """False: no language model, the bridge reads the vision tower's patches and the words' embeddings. A baseline."""
    language: bool = True
    """False: the instruction is left blank. A control that must fail where instructions matter."""
    xyz: XYZConfig | None = None
    """Read where things are in the robot's frame: needs cameras with depth and calibration. None: in the pictures."""
    talk: TalkerConfig | None = None
    """The policy answers questions, too. None: it only acts."""
    memory: MemoryConfig | None = None
    """Look at earlier decisions of the episode again. None: each observation decides alone."""
    advantage: AdvantageConfig | None = None
    """The policy has learnt good and bad actions apart, and is asked for good ones. None: it imitates all alike."""

    @property
    def trains_backbone(self) -> bool:
        """True if the backbone is trained, or adapters on it."""
        return not self.freeze_backbone or self.lora is not None


def model_problem(config: VLAConfig) -> str | None:
    """Describe what is wrong with a model's configuration, or return None."""
    if config.chunk_size < 1:
        return f"chunk_size must be at least 1, got {config.chunk_size}"
    steps = config.n_action_steps
    if steps is not None and not 1 <= steps <= config.chunk_size:
        return (
            f"n_action_steps must be in 1..{config.chunk_size} (the chunk size), got {steps}: play fewer actions of "
            f"each chunk (--n-action-steps {min(max(steps, 1), config.chunk_size)}), or make the chunks longer"
        )
    if config.head not in HEAD_NAMES:
        if ":" not in config.head:
            return unknown(config.head, HEAD_NAMES, "head")
        from vla.model.heads.registry import HEADS

        try:
            find(config.head, HEADS, "head")
        except ValueError as problem:
            return str(problem)
    if config.distilled is not None and min(config.distilled.width, config.distilled.mapper_width) < 1:
        return "a teacher's latent and the mapper into it must be at least 1 wide"
    if config.refiner_width < 0:
        return f"refiner_width must be 0 (none) or positive, got {config.refiner_width}"
    if config.refines == "logits" and (config.head not in ("bins", "frequencies") or config.distilled is not None):
        return "a residual on logits needs a head that has some: bins or frequencies"
    if config.lora is not None and not config.freeze_backbone:
        return "lora trains adapters on a frozen backbone: leave freeze_backbone on, or drop lora"
    if config.memory is not None:
        if isinstance(config.bridge, FaithfulConfig) or not config.bridge.queries:
            return "memory keeps what the action queries saw: it needs our bridge, with queries"
        if not config.freeze_backbone or config.lora is not None:
            return "memory keeps features of a frozen backbone: leave out --tune, or --memory"
    if config.xyz is not None and isinstance(config.bridge, FaithfulConfig):
        return "xyz is for our own bridge: a released policy reads no depth"
    if config.modulators is not None and (config.lora is not None or not config.freeze_backbone):
        return "modulators learn on a policy that stands still: add them to a finished one (vla train --init)"
    if config.modulators is not None and isinstance(config.bridge, FaithfulConfig):
        return "modulators are for our own bridge, not for that of a released policy"
    if config.memory is not None and config.modulators is not None and config.modulators.decoder:
        return "memory keeps features that are computed once a frame: leave the modulators in the bridge"
    if config.talk is not None and config.modulators is not None:
        return "a policy that talks takes no modulators, nor one with modulators a talker: leave one of them out"
    if config.talk is not None and not config.decoder:
        return "a policy without a language model (decoder false) cannot talk: leave talk out"
    if config.advantage is not None and (isinstance(config.bridge, FaithfulConfig) or config.modulators is not None):
        return "only a policy with our own bridge, and without modulators, can be asked for good actions"
    if config.advantage is not None and config.advantage.guidance != 1 and config.head == "flow":
        return "actions of a flow head are not guided: set the guidance to 1 (vla train --guidance 1)"
    parts = (
        config.bridge, config.lora, config.xyz, config.modulators, config.talk, config.memory, config.advantage,
    )  # fmt: skip
    return next(filter(None, (part.problem() for part in parts if part is not None)), None)


def check_backbone(name: str) -> None:
    """ValueError for a name that `vla.backbones.hub.load` would not know either, before anything heavy is imported."""
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and ":" not in name and not Path(name).is_dir():
        names = ", ".join(name for name in BACKBONE_NAMES if name not in RETIRED_BACKBONES)
        raise ValueError(f"there is no folder {name}: give the folder of a backbone, or one of {names}")
    if not {"/", ":"} & set(name) and name not in BACKBONE_NAMES and not Path(name).is_dir():
        raise ValueError(unknown(name, BACKBONE_NAMES, "backbone"))


def retirement(backbone: str | dict[str, Any]) -> str | None:
    """One line for somebody who starts something new from a backbone that is retired; None for any other."""
    name = backbone.get("name") if isinstance(backbone, dict) else backbone
    if name not in RETIRED_BACKBONES:
        return None
    return f"the backbone {name} is retired, kept for policies trained on it: use {DEFAULT_BACKBONE}, the default"


def check_loads(vla: Any) -> None:
    """ValueError if this policy (a `vla.model.model.VLA`), saved, could not be loaded again. For the start of a run."""
    if problem := model_problem(vla.config):
        raise ValueError(problem)
    _check("configuration", encode(vla.config), lambda data: decode(VLAConfig, data))
    for processor in (vla.processor, *vla.members.values()):
        _check("processor", encode(processor.config), lambda data: decode(ProcessorConfig, data))
        _check("statistics", processor.stats.to_dict(), Stats.from_dict)


def _check(name: str, part: Any, read: Any) -> None:
    """Write and read it as a checkpoint does, which has no NaN and no infinity."""
    try:
        read(json.loads(json.dumps(part, allow_nan=False)))
    except ValueError as problem:
        raise ValueError(f"this policy could be trained, but not saved and loaded: its {name}: {problem}") from None
