"""The policy's model: VLA = backbone + bridge + head, with the processor that feeds it; and VLAPolicy, which acts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vla.backbones.features import Features
from vla.backbones.lora import add_lora, merge_lora
from vla.backbones.vision_only import NoDecoder
from vla.core.checkpoint import refuse_misfit
from vla.core.config import lookup
from vla.core.types import IMAGE_SIZE, ActionSpec
from vla.model.advantage import guided
from vla.model.bridge import Bridge
from vla.model.config import FaithfulConfig, ModulatorConfig, TalkerConfig, VLAConfig, model_problem
from vla.model.heads.distilled import make_head
from vla.model.heads.residual import Latents, Refiner
from vla.model.modulators import IDENTITY, Pool, modulated_layers
from vla.model.released.bridge import FaithfulBridge
from vla.model.stored import BackboneLoader, read_policy, save_policy
from vla.model.xyz import RAW_DIM, point_dim, with_xyz
from vla.processing.processor import ModelInput, Processor, ProcessorConfig, Stats

if TYPE_CHECKING:
    from vla.backbones.backbone import Backbone


class VLA(nn.Module):
    """Observation -> chunk of actions. `encode` once, then `act`, `loss` and `latent` on the features."""

    def __init__(self, config: VLAConfig, backbone: Backbone | nn.Module, processor: Processor) -> None:
        """Fresh bridge and head on a backbone. Most callers want `VLA.build` or `VLA.load`."""
        super().__init__()
        if problem := model_problem(config):
            raise ValueError(problem)
        if processor.config.depth != (config.xyz is not None):
            raise ValueError("model and processor disagree about depth: xyz needs a processor with depth")
        if not config.decoder:
            backbone = NoDecoder(backbone)
        self.config = config
        self.backbone = backbone
        self.processor = processor
        self.backbone_dtype: torch.dtype = getattr(torch, config.backbone_dtype)
        self.bridge = _make_bridge(config, backbone, processor)
        if self.bridge.layers_needed < backbone.num_layers and hasattr(backbone, "stop_after"):
            backbone.stop_after(self.bridge.layers_needed)
        self.head = make_head(config, processor.action_width)
        self.members: dict[str, Processor] = {}
        """A policy for several robots: each one's processor, by name. `processor` is the one in use."""
        self.refiner = self._new_refiner(config.refiner_width) if config.refiner_width else None
        self.talker = None if config.talk is None else _make_talker(config.talk, backbone, processor)
        self.grounding_threshold: float | None = None
        """The `confidence` below which nothing that the instruction names is in sight. None: not known for this
        backbone, or no longer true of one that learns."""
        if self.backbone_learns:  # what was calibrated is not what will be asked
            backbone.grounding_threshold = None
        if config.language:
            self.grounding_threshold = getattr(backbone, "grounding_threshold", None)
        if config.freeze_backbone:
            backbone.requires_grad_(False)
        if config.lora is not None:
            add_lora(backbone, config.lora)
        self.pool = None if config.modulators is None else self._new_pool(config.modulators)
        self.train(self.training)

    @staticmethod
    def build(
        config: VLAConfig,
        *,
        stats: Stats,
        action_spec: ActionSpec,
        cameras: Sequence[str],
        image_size: int | None = None,
        picture_size: int | None = None,
        aspects: Sequence[float] | None = None,
        max_text_tokens: int = 24,
        proprio_names: Sequence[str] | None = None,
        backbone: Backbone | nn.Module | None = None,
        seed: int = 0,
        released_scaling: bool = False,
    ) -> VLA:
        """An untrained policy for one robot: bridge and head from `seed`, backbone as `config.backbone` says.

        `stats` fixes the proprio width, the backbone (its `image_size`, else 84) the image size unless one is given,
        and `picture_size` that of the training pictures, if they were smaller than that; `aspects` are
        their widths by their heights, one per camera;
        `backbone` is used instead of loading one; `released_scaling` is the processor's. ValueError for what does not
        fit.
        """
        if backbone is None:
            from vla.backbones.hub import load as load_backbone

            backbone = load_backbone(config.backbone, num_views=len(cameras))
        views = getattr(backbone, "num_views", len(cameras))
        if views != len(cameras):
            raise ValueError(f"the backbone reads {views} camera views, got {len(cameras)}: {', '.join(cameras)}")
        size = image_size or getattr(backbone, "image_size", IMAGE_SIZE)
        processor_config = ProcessorConfig(
            cameras=tuple(cameras),
            proprio_dim=stats.proprio.dim,
            action_names=action_spec.names,
            image_size=size,
            max_text_tokens=max_text_tokens,
            text_rule="signs",
            action_low=action_spec.low,
            action_high=action_spec.high,
            control_hz=action_spec.control_hz,
            released_scaling=released_scaling,
            proprio_names=None if proprio_names is None else tuple(proprio_names),
            picture_size=min(size, picture_size or size),
            aspects=None if aspects is None else tuple(aspects),
            depth=config.xyz is not None,
        )
        processor = Processor(processor_config, stats, backbone.tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return VLA(config, backbone, processor)

    @property
    def processor(self) -> Processor:
        """Between observations and the model; it reads instructions as long as the backbone does."""
        return self._processor

    @processor.setter
    def processor(self, processor: Processor) -> None:
        processor.text_limit = max(processor.text_limit, getattr(self.backbone, "text_limit", 0))
        self._processor = processor

    @property
    def device(self) -> torch.device:
        """The device that holds the bridge."""
        return next(self.bridge.parameters()).device

    @property
    def chunk_size(self) -> int:
        """Control steps C predicted per decision."""
        return self.config.chunk_size

    @property
    def action_dim(self) -> int:
        """Action width of the model: wider than one robot's when it was trained for several."""
        return self.processor.action_width

    @property
    def point_dim(self) -> int:
        """Numbers that the bridge reads of where each query points: of the backbone's, or of `vla.model.xyz`'s."""
        return _point_dim(self.config, self.backbone, self.processor)

    @property
    def backbone_learns(self) -> bool:
        """True if gradients flow into the backbone: its features may not be cached then."""
        modulators = self.config.modulators
        adapted = self.config.lora is not None or (modulators is not None and modulators.decoder)
        return adapted or not self.config.freeze_backbone

    @property
    def action_spec(self) -> ActionSpec:
        """Names, bounds and control rate of the robot's actions."""
        return self.processor.action_spec

    def train(self, mode: bool = True) -> VLA:
        """Set training mode; what is frozen stays in evaluation mode: no dropout, no running statistics."""
        super().train(mode and self.pool is None)
        if not self.backbone_learns:
            self.backbone.eval()
        return self

    def encode(self, inp: ModelInput) -> Features:
        """The backbone's view of a batch, float32. Without gradients when the backbone is frozen: fit for caching."""
        inp = inp.to(self.device)
        if not (torch.is_grad_enabled() and self.backbone_learns):
            inp = inp.without_padding()
        return self.encode_as_is(inp)

    def encode_as_is(self, inp: ModelInput, dtype: torch.dtype | None = None) -> Features:
        """`encode` of a batch on the device, padding included: nothing here depends on the values, so that a CUDA graph
        can hold it. `dtype`: instead of the backbone's own."""
        gradients = torch.is_grad_enabled() and self.backbone_learns
        dtype = dtype or self.backbone_dtype
        low = dtype != torch.float32
        with (
            torch.set_grad_enabled(gradients),
            torch.autocast(self.device.type, dtype=dtype if low else torch.bfloat16, enabled=low),
        ):
            mask = inp.token_mask_BT if self.config.language else torch.zeros_like(inp.token_mask_BT)
            features = self.backbone(inp.images_BVHWC, inp.token_ids_BT, mask)
        features = features.float()
        return features if self.config.xyz is None else with_xyz(features, inp, self.config.xyz)

    def confidence(self, features: Features) -> Tensor | None:
        """How surely the named object is in sight (B,); None without a threshold to hold it against."""
        if self.grounding_threshold is None:
            return None
        return self.backbone.confidence(features.queries_BLQD[:, -1], features.points_BQE)

    def latent(self, features: Features, proprio_BP: Tensor) -> Tensor:
        """Action latent (B, C, D), float32, of normalised proprio. What heads read."""
        with torch.autocast(self.device.type, enabled=False):
            return self.bridge(features, proprio_BP)

    def condition(self, features: Features, proprio_BP: Tensor) -> Latents:
        """All that head and refiner read, float32: what a policy whose bridge is frozen need compute only once."""
        with torch.autocast(self.device.type, enabled=False):
            return Latents.of(self.bridge, features, proprio_BP)

    def act_on(self, latents: Latents, proprio_BP: Tensor) -> Tensor:
        """Normalised actions (B, C, A), float32, of what `condition` gave."""
        if self.refiner is None:
            return self.head(latents.latent_BCD)
        if self.config.refines == "logits":
            return self.head.decode(self.refined(self.head.logits(latents.latent_BCD), latents, proprio_BP))
        return self.refined(self.head(latents.latent_BCD), latents, proprio_BP)

    def refined(self, base: Tensor, latents: Latents, proprio_BP: Tensor) -> Tensor:
        """The head's actions (B, C, A), or logits (B, C, A, bins), with the residual of a policy that has one. It
        belongs to what the policy could do when RL trained it: modulators learn without it, and act without it."""
        with torch.autocast(self.device.type, enabled=False):
            residual = self.refiner(latents, proprio_BP)
            if self.pool is not None:
                residual = residual * (self.pool.chosen_B == IDENTITY)[:, None, None]
            return base + residual.view_as(base)

    def act(self, features: Features, proprio_BP: Tensor) -> Tensor:
        """Normalised actions (B, C, A), float32: the same function in training and serving, no noise anywhere."""
        action_BCA = self.act_on(self.condition(features, proprio_BP), proprio_BP)
        return action_BCA if self.config.advantage is None else guided(self, features, proprio_BP, action_BCA)

    def add_refiner(self, width: int, *, seed: int, on: Literal["actions", "logits"] = "actions") -> None:
        """Give the policy a residual to be trained by RL; its actions stay what they are. Nothing if it has one."""
        if self.refiner is None:
            self.config = replace(self.config, refiner_width=width, refines=on)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.refiner = self._new_refiner(width).to(self.device)

    def add_modulators(self, config: ModulatorConfig, *, seed: int) -> None:
        """Give the policy a pool of modulators, and freeze everything else. Until the pool knows what was known before
        (`Pool.know`) and has learnt, it is of no use. ValueError for a policy that cannot have one."""
        changed = replace(self.config, modulators=config, freeze_backbone=True)
        if problem := model_problem(changed):
            raise ValueError(problem)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pool = self._new_pool(config).to(self.device)
        self.config = changed
        self.train(self.training)

    def _new_pool(self, config: ModulatorConfig) -> Pool:
        self.requires_grad_(False)
        return Pool(config, modulated_layers(self, config), key_width=2 * self.backbone.width)

    def _new_refiner(self, width: int) -> Refiner:
        return Refiner(
            latent_width=self.bridge.width,
            point_width=self.backbone.num_queries * self.point_dim,
            proprio_dim=self.bridge.proprio_dim,
            action_dim=self.action_dim * (self.head.bins if self.config.refines == "logits" else 1),
            width=width,
        )

    def loss(
        self, features: Features, proprio_BP: Tensor, action_BCA: Tensor, mask_BC: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The head's loss on normalised target actions, and detached scalars to log. `mask_BC` 0 marks padding; it may
        be (B, C, A): components that a robot does not have are padding too."""
        expected = (features.batch_size, self.chunk_size, self.action_dim)
        if tuple(action_BCA.shape) != expected or tuple(mask_BC.shape) not in (expected[:2], expected):
            raise ValueError(
                f"loss needs actions of shape {expected} and a mask of shape {expected[:2]}, got "
                f"{tuple(action_BCA.shape)} and {tuple(mask_BC.shape)}"
            )
        if self.refiner is not None and self.pool is None:
            raise ValueError("this policy was refined by RL; imitation would train its head past the refiner")
        loss = self.head.loss(self.latent(features, proprio_BP), action_BCA, mask_BC)
        if features.stop_BP is not None:
            loss = loss + self.bridge.memory.foresight_loss(features, proprio_BP)
        return loss, {"loss": loss.detach()}

    def predict(self, inp: ModelInput, proprio_BP: NDArray | None = None) -> NDArray[np.float32]:
        """Actions (B, C, A) in environment units, see `to_actions`."""
        with torch.no_grad(), evaluating(self):
            return self.to_actions(self.act(self.encode(inp), inp.proprio_BP.to(self.device)), proprio_BP)

    def to_actions(self, normalised_BCA: Tensor, proprio_BP: NDArray | None = None) -> NDArray[np.float32]:
        """Normalised actions in environment units, within their bounds. FloatingPointError if not finite."""
        action = normalised_BCA.cpu().numpy()
        if not np.isfinite(action).all():
            raise FloatingPointError("the model's action is not finite: its weights or inputs are damaged")
        return self.processor.unnormalise_action(action, proprio_BP)

    def trainable(self) -> list[nn.Parameter]:
        """Parameters an optimiser should own."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        trainer_state: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A self-contained checkpoint: weights with the backbone's, statistics, tokenizer. Loads without a network.

        `tensors`: the state to write, where this process holds only shards of it.
        """
        save_policy(self, folder, trainer_state=trainer_state, tensors=tensors)

    @staticmethod
    def load(
        folder: str | os.PathLike[str],
        *,
        load_backbone: BackboneLoader | None = None,
        member: str | None = None,
        merge: bool = True,
    ) -> VLA:
        """Load what `save` wrote, in evaluation mode on the CPU. ValueError naming the file that is missing or damaged.

        The backbone's shape comes from its saved specification, with the tokenizer's files (name -> bytes) as its
        "tokenizer"; for a `load_backbone` of the caller's they lie in a folder, for the time of the call. Its weights
        come from this checkpoint.
        `member`: of a policy for several robots, the one to control. `merge`: add LoRA adapters into the weights.
        """
        parts = read_policy(folder, load_backbone)
        vla = VLA(parts.config, parts.backbone, parts.processor)
        try:
            vla.load_state_dict(parts.tensors)
        except RuntimeError:
            refuse_misfit(folder, vla.state_dict(), parts.tensors)
            raise
        vla.members.update(parts.members)
        if member is not None:
            vla.processor = lookup(member, vla.members, "member")
        if merge:
            vla.merge_adapters()
        return vla.eval()

    def merge_adapters(self) -> None:
        """Make a plain policy of one with LoRA adapters: the same function, with merged weights."""
        if self.config.lora is not None:
            merge_lora(self.backbone)
            self.backbone.requires_grad_(False)
            self.config = replace(self.config, lora=None)


def _make_bridge(config: VLAConfig, backbone: nn.Module, processor: Processor) -> Bridge | FaithfulBridge:
    if isinstance(config.bridge, FaithfulConfig):
        return FaithfulBridge(
            config.bridge,
            chunk_size=config.chunk_size,
            feature_width=backbone.width,
            num_layers=backbone.num_layers,
            proprio_dim=processor.proprio_width,
        )
    return Bridge(
        config.bridge,
        chunk_size=config.chunk_size,
        feature_width=backbone.width,
        num_layers=backbone.num_layers,
        proprio_dim=processor.proprio_width,
        point_dim=_point_dim(config, backbone, processor),
        num_queries=backbone.num_queries,
        num_views=len(processor.config.cameras),
        raw_xyz_dim=0 if config.xyz is None else RAW_DIM,
        memory=config.memory,
        advantage=config.advantage,
    )


def _point_dim(config: VLAConfig, backbone: nn.Module, processor: Processor) -> int:
    if config.xyz is None or not backbone.point_dim:
        return backbone.point_dim
    return point_dim(len(processor.config.cameras))


def _make_talker(config: TalkerConfig, backbone: nn.Module, processor: Processor) -> nn.Module:
    from vla.model.talking.talker import Talker  # with transformers, which a backbone of one's own may do without

    return Talker(config, backbone, proprio_dim=processor.proprio_width)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: a policy may be tried out in the middle of training."""
    before = model.training
    if before:
        model.eval()
    try:
        yield
    finally:
        if before:
            model.train()
