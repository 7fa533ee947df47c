"""The critic: value of the simulator's state, proprioception and elapsed time."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rl.configs.learning import CriticConfig
from rl.models.policy_inputs import PolicyInput, summary
from rl.models.running_norm import RunningNorm
from vla.core.types import Observation


class Critic(nn.Module):
    """State value (B,) of `critic_state` or `seen_state` (B, S), which is normalised by running statistics."""

    def __init__(self, privileged_dim: int, proprio_dim: int, config: CriticConfig | None = None) -> None:
        """Widths of the simulator's state and of the proprio; or of `seen_state` without the clock, and 0."""
        super().__init__()
        config = config or CriticConfig()
        self.state_dim = privileged_dim + proprio_dim + 1
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
        """Return the values (B,)."""
        return self.net(self.norm(state_BS)).squeeze(-1)


def privileged_state(obs: Observation) -> Tensor:
    """Return (B, S) float32: the simulator's state, then proprioception without the noise of sensors.

    ValueError when the environment offers no simulator state.
    """
    if obs.privileged is None:
        raise ValueError(
            "the critic and the teacher read Observation.privileged, which this environment does not give: choose one "
            "that does, a critic of the policy's latents (CriticConfig.reads), or a method without a critic (GRPO, "
            "filtered imitation)"
        )
    proprio = obs.proprio if obs.exact_proprio is None else obs.exact_proprio
    return torch.from_numpy(np.concatenate((obs.privileged, proprio), axis=1, dtype=np.float32))


def critic_state(obs: Observation, elapsed_fraction: NDArray[np.float32]) -> Tensor:
    """Return (B, S + 1) float32: `privileged_state`, then the elapsed fraction (B,) of the horizon.

    Elapsed time is an input because the same state is worth less when the time limit is near.
    """
    return torch.cat([privileged_state(obs), torch.from_numpy(elapsed_fraction)[:, None]], 1)


def seen_state(inputs: PolicyInput, proprio_BP: Tensor, elapsed_fraction: NDArray[np.float32]) -> Tensor:
    """Return (B, S + 1) float32: `summary` of what the policy sees, without a gradient to it, then the elapsed fraction
    (B,) of the horizon."""
    return torch.cat([summary(inputs, proprio_BP), torch.from_numpy(elapsed_fraction)[:, None].to(proprio_BP)], 1)
