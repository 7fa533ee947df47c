"""The critic: value of privileged state or of the policy's features."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rl.configs.learning import CriticConfig, Reads
from rl.models.running_norm import RunningNorm
from vla.core.types import Observation


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
