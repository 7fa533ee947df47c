"""The stochastic policy over action chunks, and its greedy and sampled forms as `Policy` objects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rl.configs.learning import ActorConfig
from rl.models.distribution import ChunkDistribution, ChunkGaussian
from rl.models.network import FlowNetwork, PolicyNetwork
from rl.models.policy_inputs import PolicyInput
from vla.backbones.features import Mishearing
from vla.core.types import ActionChunk, ActionSpec, Observation, PolicySpec, Prefix


class GaussianChunkActor(nn.Module):
    """Normal distribution over action chunks: its mean is the network's chunk, its standard deviation a parameter per
    action component. Only executed control steps are scored.

    With `ActorConfig.noise` "flow" the same noise is spread over the denoising steps of a flow head instead.
    The mean is computed in float32 and has no tanh, so at step 0 the greedy policy *is* the imitation policy.
    """

    def __init__(self, network: PolicyNetwork, action_names: Sequence[str], config: ActorConfig | None = None) -> None:
        """`action_names` are the environment's. ValueError for standard deviations outside their bounds, or a network
        without a trainable parameter."""
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
        if self.config.noise == "flow" and not isinstance(network, FlowNetwork):
            raise ValueError("noise 'flow' goes between the steps of a flow head, and this network has none")
        self.network = network
        self.model = network.module
        """Registered here, so that checkpoints name the parameters `model.*`."""
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("the model has no trainable parameter outside its backbone: nothing for RL to train")
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float32).log().to(self.device))
        self.train(False)

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return next(self.model.parameters()).device

    @property
    def chunk_size(self) -> int:
        """Control steps C of a chunk."""
        return self.network.chunk_size

    def train(self, mode: bool = True) -> GaussianChunkActor:
        """Stay in eval mode for any `mode`: with dropout, the policy scored would not be the one that acted."""
        return super().train(False)

    def named_policy_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that the policy loss trains: every trainable parameter of the network, and `log_std`."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def encode(self, obs: Observation, noise: Mishearing | None = None) -> tuple[PolicyInput, Tensor]:
        """Return the inputs of the trained part for B observations, and the normalised proprio (B, P). `noise`:
        on the words, for a network whose backbone can hear them so."""
        return self.network.encode(obs) if noise is None else self.network.encode(obs, noise)

    def mean(self, inputs: PolicyInput, proprio_BP: Tensor) -> Tensor:
        """Return the mean chunk (B, C, A), normalised, in float32 even under autocast."""
        # bf16 means at sigma 0.08 put a third of untouched samples outside a 0.1 clip band: fp32 is not optional here
        with torch.autocast(device_type=proprio_BP.device.type, enabled=False):
            return self.network.mean(inputs, proprio_BP).float()

    def distribution(self, inputs: PolicyInput, proprio_BP: Tensor) -> ChunkDistribution:
        """Return the distribution over the decisions of B environments. Its samples are scored before any clipping."""
        if self.config.noise == "flow":
            return self.network.flow_chain(inputs, proprio_BP, self.log_std)
        mean = self.mean(inputs, proprio_BP)
        return ChunkGaussian(mean, self.log_std, self.config.correlation, getattr(torch, self.config.log_prob_dtype))

    def chunk_of(self, sample: Tensor) -> Tensor:
        """Return the normalised chunk (B, C, A) of a sample: of a denoising chain, its last state."""
        return sample[:, -1] if self.config.noise == "flow" else sample

    @torch.no_grad()
    def clamp_std(self) -> None:
        """Keep every standard deviation within the configured band. This changes the parameter, so that a gradient can
        lead it back inside."""
        self.log_std.clamp_(math.log(self.config.std_min), math.log(self.config.std_max))

    def to_env(self, action_BCA: Tensor, spec: ActionSpec, n_action_steps: int | None = None) -> ActionChunk:
        """Convert a normalised chunk (B, C, A) to environment units within the bounds; only its first `n_action_steps`,
        if given."""
        action = self.network.unnormalise_action(action_BCA[:, :n_action_steps].cpu().numpy())
        return np.clip(action, np.float32(spec.low), np.float32(spec.high)).astype(np.float32, copy=False)


class GreedyPolicy:
    """The mean action, which is evaluated and deployed. A `vla.core.types.Policy`."""

    def __init__(self, actor: GaussianChunkActor, spec: ActionSpec, n_action_steps: int) -> None:
        self.actor, self.action_spec = actor, spec
        chunk_size = actor.chunk_size
        self.spec = PolicySpec(spec, chunk_size, min(n_action_steps, chunk_size))

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget: every decision is made from the observation alone."""

    @torch.no_grad()
    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Return the whole chunk (B, C, A) in environment units."""
        return self.actor.to_env(self.choose(*self.actor.encode(obs)), self.action_spec)

    def choose(self, inputs: PolicyInput, proprio_BP: Tensor) -> Tensor:
        """Return the normalised chunk (B, C, A)."""
        return self.actor.mean(inputs, proprio_BP)


class SampledPolicy(GreedyPolicy):
    """The actor with its exploration noise, scaled by `std_scale`."""

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

    def choose(self, inputs: PolicyInput, proprio_BP: Tensor) -> Tensor:
        """Sample a normalised chunk (B, C, A)."""
        policy = self.actor.distribution(inputs, proprio_BP)
        return self.actor.chunk_of(policy.sample(self.generator, std_scale=self.std_scale))
