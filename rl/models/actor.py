"""A VLA as a stochastic policy over action chunks, the critic beside it, and both as `Policy` objects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl.configs.learning import ActorConfig
from rl.models.distribution import ChunkDistribution, ChunkGaussian, FlowChain
from rl.models.policy_inputs import Conditions, Seen, summary
from rl.models.state_std import StateScale
from vla.backbones.lora import add_lora
from vla.core.types import ActionChunk, ActionSpec, Observation, PolicySpec, Prefix
from vla.model.config import VLAConfig
from vla.model.flow_head import FlowHead
from vla.model.residual_head import Latents


class GaussianChunkActor(nn.Module):
    """Normal(mean = the imitation head's chunk, std per action dimension), scored over executed control steps.

    (A flow head may have the same noise spread over its denoising steps instead.)

    The mean is the model's own noise-free path in fp32; no tanh, so at step 0 the greedy policy *is* the imitation
    policy. What is frozen is computed once per observation and reused in every epoch: the backbone's features, or all
    up to the head; if the backbone learns, nothing is kept and every step sees the pictures.
    `model` is a `vla.model.model.VLA`: of it this needs backbone, processor, chunk_size, encode(inp), act(features,
    proprio) and save; for a refiner or the head alone also add_refiner, refiner, head, condition and act_on.
    """

    def __init__(
        self, model: nn.Module, action_names: Sequence[str], config: ActorConfig | None = None, *, seed: int = 0
    ) -> None:
        """`seed` is of the refiner's hidden layers and the adapters, if they are added."""
        super().__init__()
        self.config = config or ActorConfig()
        if not 0.0 <= self.config.correlation < 1.0:
            raise ValueError(f"ActorConfig.correlation must be in [0, 1), got {self.config.correlation}")
        std = self.config.init_std(action_names)
        if not all(self.config.std_min <= s <= self.config.std_max for s in std):
            raise ValueError(
                f"initial standard deviations {std} must lie in [{self.config.std_min}, {self.config.std_max}]; "
                "change ActorConfig.motion_std/gripper_std or std_min/std_max"
            )
        if self.config.noise == "flow" and (not isinstance(model.head, FlowHead) or self.config.refiner_width):
            raise ValueError("noise 'flow' goes between the steps of a flow head (and trains it, without a refiner)")
        self.model = model
        self.scale: StateScale | None = None
        """Set by whoever has demonstrations to fit it to."""
        self._choose_what_trains(seed)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("the model has no trainable parameter outside its backbone: nothing for RL to train")
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float32).log().to(self.device))
        self.train(False)

    def _choose_what_trains(self, seed: int) -> None:
        model, config = self.model, self.config
        model.backbone.requires_grad_(False)
        if config.refiner_width:
            if config.trains != "bridge":
                raise ValueError("refiner_width trains the refiner alone: leave ActorConfig.trains at its default")
            model.add_refiner(config.refiner_width, seed=seed)
            model.requires_grad_(False)
            model.refiner.requires_grad_(True)
        elif config.trains == "head":
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        elif config.trains == "lora":
            if getattr(getattr(model, "config", None), "lora", None) is not None:
                raise ValueError("this policy holds adapters already: load it merged, as `VLA.load` does by default")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                add_lora(model.backbone, config.lora)
        elif config.trains == "all":
            model.backbone.requires_grad_(True)
        if isinstance(getattr(model, "config", None), VLAConfig):
            if config.trains == "lora":
                model.config = replace(model.config, lora=config.lora)
            elif config.trains == "all":
                model.config = replace(model.config, freeze_backbone=False)
        self.reads_latents = bool(config.refiner_width) or config.trains == "head"
        self.backbone_learns = config.trains in ("lora", "all") and not config.refiner_width

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> GaussianChunkActor:
        """Stays in eval mode whatever is asked: with dropout, the policy scored would not be the one that acted."""
        return super().train(False)

    def named_policy_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What PPO's policy loss trains: everything trainable of the model, and `log_std`."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def encode(self, obs: Observation) -> tuple[Conditions, Tensor]:
        """What the trained part reads, and normalised proprio (B, P)."""
        return self.conditions_of(self.model.processor.prepare(obs))

    @torch.no_grad()
    def conditions_of(self, inp: Any) -> tuple[Conditions, Tensor]:
        """The same of the model's input."""
        proprio_BP = inp.proprio_BP.to(self.device)
        if self.backbone_learns:
            return Seen(inp), proprio_BP
        features = self.model.encode(inp)
        return (self.model.condition(features, proprio_BP) if self.reads_latents else features), proprio_BP

    def mean(self, conditions: Conditions, proprio_BP: Tensor) -> Tensor:
        """(B, C, A) normalised fp32, whatever autocast surrounds us."""
        # bf16 means at sigma 0.08 put a third of untouched samples outside a 0.1 clip band: fp32 is not optional here
        with torch.autocast(device_type=proprio_BP.device.type, enabled=False):
            if isinstance(conditions, Seen):
                conditions = self.model.encode(conditions.inp)
            act = self.model.act_on if self.reads_latents else self.model.act
            return act(conditions, proprio_BP).float()

    def latents_of(self, conditions: Conditions, proprio_BP: Tensor) -> Tensor:
        """(B, S) a summary of what the trained part reads, detached: what a critic may share of the policy.

        ValueError where the backbone learns: there is nothing that is computed once.
        """
        if isinstance(conditions, Seen):
            raise ValueError(
                "with a learning backbone the policy's latents move: leave CriticConfig.reads 'privileged'"
            )
        return summary(conditions, proprio_BP)

    def log_std_of(self, conditions: Conditions, proprio_BP: Tensor) -> Tensor:
        """(A,), or (B, 1, A) with a state-dependent scale."""
        if self.scale is None:
            return self.log_std
        factor_BA = self.scale(summary(conditions, proprio_BP))
        low, high = math.log(self.config.std_min), math.log(self.config.std_max)
        return (self.log_std + factor_BA[:, None]).clamp(low, high)

    def distribution(self, conditions: Conditions, proprio_BP: Tensor) -> ChunkDistribution:
        """Over decisions. What it samples, not what the world executes of it, is what gets scored."""
        log_std = self.log_std_of(conditions, proprio_BP)
        if self.config.noise == "flow":
            return self._chain(self.latent(conditions, proprio_BP), log_std)
        mean = self.mean(conditions, proprio_BP)
        return ChunkGaussian(mean, log_std, self.config.correlation, getattr(torch, self.config.log_prob_dtype))

    def latent(self, conditions: Conditions, proprio_BP: Tensor) -> Tensor:
        """(B, C, D) that the head reads, float32."""
        if isinstance(conditions, Latents):
            return conditions.latent_BCD
        features = self.model.encode(conditions.inp) if isinstance(conditions, Seen) else conditions
        return self.model.latent(features, proprio_BP)

    def _chain(self, latent_BCD: Tensor, log_std: Tensor) -> FlowChain:
        head = self.model.head
        start = latent_BCD.new_zeros((*latent_BCD.shape[:2], head.action_dim))
        return FlowChain(
            lambda states, first: head.advance(latent_BCD, states, first), head.sampling_steps, start, log_std
        )

    def chunk_of(self, sample: Tensor) -> Tensor:
        """The normalised chunk (B, C, A) that a sample means."""
        return sample[:, -1] if self.config.noise == "flow" else sample

    @torch.no_grad()
    def clamp_std(self) -> None:
        """Keep every std within the configured band. On the parameter, so that a gradient can lead it back inside."""
        self.log_std.clamp_(math.log(self.config.std_min), math.log(self.config.std_max))

    def to_env(self, action_BCA: Tensor, spec: ActionSpec, n_action_steps: int | None = None) -> ActionChunk:
        """Normalised chunk -> environment units within the bounds; only its first `n_action_steps`, if given."""
        action = self.model.processor.unnormalise_action(action_BCA[:, :n_action_steps].cpu().numpy())
        return np.clip(action, np.float32(spec.low), np.float32(spec.high)).astype(np.float32, copy=False)


class GreedyPolicy:
    """The mean action: what is evaluated and deployed. A `vla.core.types.Policy`."""

    def __init__(self, actor: GaussianChunkActor, spec: ActionSpec, n_action_steps: int) -> None:
        self.actor, self.action_spec = actor, spec
        chunk_size = actor.model.chunk_size
        self.spec = PolicySpec(spec, chunk_size, min(n_action_steps, chunk_size))

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget: every decision is made from the observation alone."""

    @torch.no_grad()
    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The whole chunk (B, C, A) in environment units."""
        return self.actor.to_env(self.choose(*self.actor.encode(obs)), self.action_spec)

    def choose(self, conditions: Conditions, proprio_BP: Tensor) -> Tensor:
        """The normalised chunk (B, C, A)."""
        return self.actor.mean(conditions, proprio_BP)


class SampledPolicy(GreedyPolicy):
    """The actor with its exploration noise, scaled: what calibration measures."""

    def __init__(
        self,
        actor: GaussianChunkActor,
        spec: ActionSpec,
        n_action_steps: int,
        *,
        generator: torch.Generator,
        std_scale: float = 1.0,
    ) -> None:
        super().__init__(actor, spec, n_action_steps)
        self.generator, self.std_scale = generator, std_scale

    def choose(self, conditions: Conditions, proprio_BP: Tensor) -> Tensor:
        policy = self.actor.distribution(conditions, proprio_BP)
        return self.actor.chunk_of(policy.sample(self.generator, std_scale=self.std_scale))
