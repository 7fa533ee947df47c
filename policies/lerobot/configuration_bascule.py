"""The LeRobot configuration of a Bascule policy: `--policy.type=bascule` and its flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

from vla.model.config import DEFAULT_BACKBONE


def _identity() -> dict[str, NormalizationMode]:
    # The policy normalises by itself, with the processor that trained it: LeRobot's tools pass everything through.
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@PreTrainedConfig.register_subclass("bascule")
@dataclass
class BasculeConfig(PreTrainedConfig):
    """The options of a new policy, or (`parts`) the configuration of a trained one.

    A field of a fresh policy means what the field of that name means in `vla.model.model.VLAConfig`, `BridgeConfig`,
    `ProcessorConfig` or `TrainConfig`.
    """

    chunk_size: int = 8
    n_action_steps: int = 8
    """Number of actions executed before `select_action` reads a new observation."""
    backbone: str = DEFAULT_BACKBONE
    """A name or a local folder: what `vla.backbones.backbone.load_backbone` takes."""
    head: str = "l1"
    freeze_backbone: bool = True
    backbone_dtype: str = "float32"
    bridge_width: int = 160
    gate_init: float = 1.0
    image_size: int | None = None
    """Pixels of a view as it is sent to the backbone, square. None: what the backbone reads."""
    max_text_tokens: int = 24
    """Room for an instruction; more when the dataset's tasks are longer."""
    seed: int = 0
    """Seed for initialising the bridge and the head."""
    optimizer_lr: float = 1e-3
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 100
    scheduler_decay_steps: int = 10_000
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_identity)
    action_feature_names: list[str] | None = None
    """Filled by LeRobot from the dataset; `lerobot-rollout` orders a robot's actions by it."""
    parts: dict[str, Any] | None = None
    """Written when the policy is made: configuration, processor, statistics and backbone, as in a Bascule checkpoint.
    From then on the fields of a fresh policy no longer count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps must be in 1..{self.chunk_size} (the chunk size), got {self.n_action_steps}"
            )
        if any(mode is not NormalizationMode.IDENTITY for mode in self.normalization_mapping.values()):
            raise ValueError("bascule policies normalise by themselves: leave normalization_mapping alone")

    def validate_features(self) -> None:
        """ValueError where the dataset lacks what a policy needs."""
        if not self.image_features:
            raise ValueError("a bascule policy needs at least one camera: the dataset has no observation.images.*")
        if self.robot_state_feature is None:
            raise ValueError("a bascule policy needs the robot's state: the dataset has no observation.state")
        if self.action_feature is None:
            raise ValueError("a bascule policy needs actions: the dataset has no feature 'action'")

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW with the learning rate, weight decay and gradient clipping of this configuration."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """Cosine decay to 1 % of the learning rate after a linear warm-up; lengths in optimizer steps."""
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=0.01 * self.optimizer_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )

    @property
    def observation_delta_indices(self) -> None:
        """None: the policy reads the current observation only."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """Offsets of the `chunk_size` actions in a training target, from 0 on."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """None: the policy reads no rewards."""
        return None
