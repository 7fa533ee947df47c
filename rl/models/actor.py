"""The stochastic policy over action chunks, and its greedy and sampled forms as `Policy` objects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rl.configs.learning import ActorConfig
from rl.models.distribution import ChunkDistribution, ChunkGaussian
from rl.models.network import FlowNetwork, PolicyNetwork, TokenNetwork
from rl.models.policy_inputs import PolicyInput
from rl.models.tokens import TokenChunk
from vla.backbones.features import Mishearing
from vla.core.types import ActionChunk, ActionSpec, Observation, PolicySpec, Prefix


class ChunkActor(nn.Module):
    """A policy network with noise: a distribution over chunks of actions. Only executed control steps are scored.

    What is deployed is `mean`, computed in float32: at step 0 the greedy policy *is* the imitation policy.
    """

    spread: nn.Parameter
    """Logarithm of the width of the noise."""

    def __init__(self, network: PolicyNetwork, config: ActorConfig) -> None:
        """ValueError for a network without a trainable parameter."""
        super().__init__()
        self.config, self.network = config, network
        self.model = network.module
        """Registered here, so that checkpoints name the parameters `model.*`."""
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("the model has no trainable parameter outside its backbone: nothing for RL to train")

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return next(self.model.parameters()).device

    @property
    def chunk_size(self) -> int:
        """Control steps C of a chunk."""
        return self.network.chunk_size

    def train(self, mode: bool = True) -> ChunkActor:
        """Stay in eval mode for any `mode`: with dropout, the policy scored would not be the one that acted."""
        return super().train(False)

    def named_policy_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the policy that change: every trainable parameter of the network, and the width of
        the noise."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad or p is self.spread)

    @torch.no_grad()
    def encode(self, obs: Observation, noise: Mishearing | None = None) -> tuple[PolicyInput, Tensor]:
        """Return the inputs of the trained part for B observations, and the normalised proprio (B, P). `noise`:
        on the words, for a network whose backbone can hear them so."""
        return self.network.encode(obs) if noise is None else self.network.encode(obs, noise)

    def mean(self, inputs: PolicyInput, proprio_BP: Tensor) -> Tensor:
        """Return the deterministic chunk (B, C, A), normalised, in float32 even under autocast."""
        # bf16 means at sigma 0.08 put a third of untouched samples outside a 0.1 clip band: fp32 is not optional here
        with torch.autocast(device_type=proprio_BP.device.type, enabled=False):
            return self.network.mean(inputs, proprio_BP).float()

    def distribution(self, inputs: PolicyInput, proprio_BP: Tensor) -> ChunkDistribution:
        """Return the distribution over the decisions of B environments. Its samples are scored before any clipping."""
        raise NotImplementedError

    def chunk_of(self, sample: Tensor) -> Tensor:
        """Return the normalised chunk (B, C, A) of a sample."""
        raise NotImplementedError

    @torch.no_grad()
    def widen(self, log_factor: float) -> None:
        """Multiply the width of the noise by exp(log_factor), within its bounds."""
        self.spread.add_(log_factor)
        self.clamp_spread()

    def clamp_spread(self) -> None:
        """Keep the width of the noise within its bounds, if it has any."""

    def noise_metrics(self) -> dict[str, float]:
        """Return the width of the noise, for the log."""
        raise NotImplementedError

    def to_env(
        self, action_BCA: Tensor, spec: ActionSpec, obs: Observation, n_action_steps: int | None = None
    ) -> ActionChunk:
        """Convert a normalised chunk (B, C, A), decided from `obs`, to environment units within the bounds; only its
        first `n_action_steps`, if given."""
        action = self.network.unnormalise_action(action_BCA[:, :n_action_steps].cpu().numpy(), obs.proprio)
        return np.clip(action, np.float32(spec.low), np.float32(spec.high)).astype(np.float32, copy=False)


class GaussianChunkActor(ChunkActor):
    """Normal distribution over action chunks: its mean is the network's chunk, its standard deviation a parameter per
    action component. The mean has no tanh.

    With `ActorConfig.noise` "flow" the same noise is spread over the denoising steps of a flow head instead.
    """

    def __init__(self, network: PolicyNetwork, action_names: Sequence[str], config: ActorConfig | None = None) -> None:
        """`action_names` are the environment's. ValueError for standard deviations outside their bounds, or a network
        without a trainable parameter."""
        config = config or ActorConfig()
        if not 0.0 <= config.correlation < 1.0:
            raise ValueError(f"ActorConfig.correlation must be in [0, 1), got {config.correlation}")
        std = config.init_std(action_names)
        if not all(config.std_min <= s <= config.std_max for s in std):
            raise ValueError(
                f"initial standard deviations {std} must lie in [{config.std_min}, {config.std_max}]; "
                "change ActorConfig.motion_std/gripper_std or std_min/std_max"
            )
        if config.noise == "flow" and not isinstance(network, FlowNetwork):
            raise ValueError("noise 'flow' goes between the steps of a flow head, and this network has none")
        super().__init__(network, config)
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float32).log().to(self.device))
        self.train(False)

    @property
    def spread(self) -> nn.Parameter:
        """Logarithms of the standard deviations (A,)."""
        return self.log_std

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
    def clamp_spread(self) -> None:
        """Keep every standard deviation within the configured band. This changes the parameter, so that a gradient can
        lead it back inside."""
        self.log_std.clamp_(math.log(self.config.std_min), math.log(self.config.std_max))

    def noise_metrics(self) -> dict[str, float]:
        """Return the mean standard deviation, for the log."""
        return {"std_mean": float(self.log_std.detach().exp().mean())}


class TokenChunkActor(ChunkActor):
    """A choice among bins for every number of the chunk, at a temperature that no gradient changes."""

    def __init__(self, network: PolicyNetwork, config: ActorConfig) -> None:
        """ValueError for a temperature that is not positive, or a network whose head does not choose among bins."""
        if not config.temperature > 0:
            raise ValueError(f"ActorConfig.temperature must be above 0, got {config.temperature}")
        if not isinstance(network, TokenNetwork):
            raise ValueError("noise 'tokens' draws the bins of a head that chooses among them, and this one has none")
        super().__init__(network, config)
        log = torch.tensor(float(config.temperature), device=self.device).log()
        self.log_temperature = nn.Parameter(log, requires_grad=False)
        self.train(False)

    @property
    def spread(self) -> nn.Parameter:
        """Logarithm of the temperature."""
        return self.log_temperature

    def distribution(self, inputs: PolicyInput, proprio_BP: Tensor) -> TokenChunk:
        """Return the distribution over the tokens of B environments."""
        with torch.autocast(device_type=proprio_BP.device.type, enabled=False):
            return self.network.token_chunk(inputs, proprio_BP, self.log_temperature.exp())

    def chunk_of(self, sample: Tensor) -> Tensor:
        """Return the normalised chunk (B, C, A) of tokens: the centres of their bins."""
        return self.network.of_tokens(sample)

    def noise_metrics(self) -> dict[str, float]:
        """Return the temperature, for the log."""
        return {"temperature": float(self.log_temperature.exp())}


class GreedyPolicy:
    """The mean action, which is evaluated and deployed. A `vla.core.types.Policy`."""

    def __init__(self, actor: ChunkActor, spec: ActionSpec, n_action_steps: int) -> None:
        self.actor, self.action_spec = actor, spec
        chunk_size = actor.chunk_size
        self.spec = PolicySpec(spec, chunk_size, min(n_action_steps, chunk_size))

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget: every decision is made from the observation alone."""

    @torch.no_grad()
    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Return the whole chunk (B, C, A) in environment units."""
        return self.actor.to_env(self.choose(*self.actor.encode(obs)), self.action_spec, obs)

    def choose(self, inputs: PolicyInput, proprio_BP: Tensor) -> Tensor:
        """Return the normalised chunk (B, C, A)."""
        return self.actor.mean(inputs, proprio_BP)


class SampledPolicy(GreedyPolicy):
    """The actor with its exploration noise, its width (or the temperature) scaled by `std_scale`."""

    def __init__(
        self,
        actor: ChunkActor,
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
