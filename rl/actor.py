"""A VLA as a stochastic policy over action chunks, the critic beside it, and both as `Policy` objects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rl.advantages import moments
from rl.conditions import Conditions, Seen, summary
from rl.distribution import ChunkDistribution, ChunkGaussian, FlowChain
from rl.scale import StateScale
from vla.adapters import LoRAConfig, add_lora
from vla.flow import FlowHead
from vla.model import VLAConfig
from vla.parallel import Team
from vla.refine import Latents
from vla.types import ActionChunk, ActionSpec, Observation


@dataclass(frozen=True)
class ActorConfig:
    """The Gaussian's spread, in normalised action units ([-1, 1] spans the demonstrations)."""

    motion_std: float = 0.2
    gripper_std: float = 0.3
    """Own value: the world reads only its sign, so small noise there explores nothing."""
    std_min: float = 0.03
    std_max: float = 0.5
    noise: Literal["action", "flow"] = "action"
    """On the chunk itself, or between the denoising steps of a flow head, which then learns as a chain of normals."""
    correlation: float = 0.0
    """Of the noise of neighbouring steps in a chunk (an AR(1) process with the spread above); 0: independent."""
    log_prob_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is there to measure what it costs: at small spreads its rounding alone leaves the clip band."""
    state_std: bool = False
    """Let the spread depend on the state: fitted to demonstrations, then frozen (`rl.scale`)."""
    refiner_width: int = 0
    """Train only a residual of this width on the action (`vla.refine`), all else frozen. 0: as `trains` says."""
    trains: Literal["head", "bridge", "lora", "all"] = "bridge"
    """The head; bridge and head; these and adapters on the backbone; these and the backbone itself."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def init_std(self, action_names: Sequence[str]) -> tuple[float, ...]:
        """One initial standard deviation per action component; those called '...gripper...' get `gripper_std`."""
        return tuple(self.gripper_std if "gripper" in name else self.motion_std for name in action_names)


class GaussianChunkActor(nn.Module):
    """Normal(mean = the imitation head's chunk, std per action dimension), scored over executed control steps.

    (A flow head may have the same noise spread over its denoising steps instead.)

    The mean is the model's own noise-free path in fp32; no tanh, so at step 0 the greedy policy *is* the imitation
    policy. What is frozen is computed once per observation and reused in every epoch: the backbone's features, or all
    up to the head; if the backbone learns, nothing is kept and every step sees the pictures.
    `model` is a `vla.model.VLA`: of it this needs backbone, processor, chunk_size, encode(inp), act(features, proprio)
    and save; for a refiner or the head alone also add_refiner, refiner, head, condition and act_on.
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

    def to_env(self, action_BCA: Tensor, spec: ActionSpec, n_action_steps: int) -> ActionChunk:
        """Normalised chunk -> environment units, within the action bounds, first `n_action_steps` control steps."""
        action = self.model.processor.unnormalise_action(action_BCA[:, :n_action_steps].cpu().numpy())
        return np.clip(action, np.float32(spec.low), np.float32(spec.high)).astype(np.float32, copy=False)


class GreedyPolicy:
    """The mean action: what is evaluated and deployed. A `vla.types.Policy`."""

    def __init__(self, actor: GaussianChunkActor, spec: ActionSpec, n_action_steps: int) -> None:
        self.actor, self.spec, self.n_action_steps = actor, spec, n_action_steps

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget: every decision is made from the observation alone."""

    @torch.no_grad()
    def act(self, obs: Observation) -> ActionChunk:
        return self.actor.to_env(self.choose(*self.actor.encode(obs)), self.spec, self.n_action_steps)

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


class RunningNorm(nn.Module):
    """Input normalisation by running mean and variance. Chan et al. 1983 for merging batches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # float64: counts grow for hours, and the small differences are what a variance is made of
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x_BS: Tensor, team: Team | None = None) -> None:
        """Merge the statistics of a batch (B, S), of all processes' batches."""
        n, mean, var = moments(x_BS, team)
        total = self.count + n
        delta = mean - self.mean
        # with count 0 the initial mean and var have no weight
        self.var.copy_((self.var * self.count + var * n + delta.square() * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)

    def forward(self, x_BS: Tensor) -> Tensor:
        # 1e-6: a component that never moved stays near 0 instead of amplifying its rounding
        scaled = (x_BS - self.mean.float()) / (self.var.float() + 1e-6).sqrt()
        return scaled.clamp(-10.0, 10.0)


Reads = Literal["privileged", "latents", "both"]


@dataclass(frozen=True)
class CriticConfig:
    """The value network. By default asymmetric: it reads simulator state the policy never sees."""

    hidden: tuple[int, ...] = (128, 128)
    reads: Reads = "privileged"
    """Simulator state and proprio; or, sharing the policy's eyes, a summary of what its trained part reads
    (`rl.conditions.summary`: for worlds without privileged state); or both. No gradient of the value reaches the
    policy, whose features are frozen or its own (VL-DAC, arXiv 2508.04280, stops it too)."""


class Critic(nn.Module):
    """State value (B,) from what `CriticConfig.reads` names and the elapsed fraction of the horizon (`critic_state`),
    normalised by running statistics.

    Elapsed time is an input because the same state is worth less when the time limit is near.
    """

    def __init__(
        self, privileged_dim: int, proprio_dim: int, config: CriticConfig | None = None, *, latent_dim: int = 0
    ) -> None:
        """`latent_dim`: width of `GaussianChunkActor.latents_of`, proprio included; needed where it is read."""
        super().__init__()
        config = config or CriticConfig()
        if config.reads != "privileged" and latent_dim < 1:
            raise ValueError(
                f"a critic that reads {config.reads!r} needs latent_dim, the width of the policy's latents"
            )
        seen = proprio_dim if config.reads == "privileged" else latent_dim
        self.state_dim = (0 if config.reads == "latents" else privileged_dim) + seen + 1
        self.norm = RunningNorm(self.state_dim)
        layers: list[nn.Module] = []
        width = self.state_dim
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.Tanh()]
            width = hidden
        last = nn.Linear(width, 1)
        nn.init.normal_(last.weight, std=0.02)  # starts near 0: before it has learnt, advantages are rewards
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last)

    def forward(self, state_BS: Tensor) -> Tensor:
        return self.net(self.norm(state_BS)).squeeze(-1)


def critic_state(
    obs: Observation,
    elapsed_fraction: NDArray[np.float32],
    latents_BS: Tensor | None = None,
    *,
    reads: Reads = "privileged",
) -> Tensor:
    """(B, S) fp32 critic input: privileged state, then proprio or the policy's latents (which hold it), then time.

    ValueError when the environment offers no privileged state and the critic reads it.
    """
    if obs.privileged is None and reads != "latents":
        raise ValueError(
            "the critic reads Observation.privileged, which this environment does not give: choose one that does, or "
            "CriticConfig(reads='latents')"
        )
    time = elapsed_fraction[:, None]
    if latents_BS is None:
        assert reads == "privileged", "what the policy sees was not given"
        return torch.from_numpy(np.concatenate((obs.privileged, obs.proprio, time), axis=1, dtype=np.float32))
    known = () if reads == "latents" else (torch.from_numpy(np.float32(obs.privileged)),)
    return torch.cat([part.to(latents_BS) for part in (*known, latents_BS, torch.from_numpy(time))], 1)
