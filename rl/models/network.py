"""The contract between a deterministic policy network and the stochastic policy that RL makes of it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rl.models.distribution import FlowChain
from rl.models.policy_inputs import PolicyInput
from rl.models.tokens import TokenChunk
from vla.core.types import Observation


class PolicyNetwork(Protocol):
    """A network that maps observations to action chunks: a frozen part (`encode`), then a trained part (`mean`).

    Implemented by `rl.models.vla_network.VLANetwork`, by the privileged teacher (`rl.teacher.teacher_ppo`) and by the
    MLP of gymnasium's control tasks.
    """

    chunk_size: int
    """Control steps C of a chunk."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters with `requires_grad` RL trains."""
        ...

    def encode(self, obs: Observation) -> tuple[PolicyInput, Tensor]:
        """Return the inputs of the trained part for B observations, and the normalised proprio (B, P)."""
        ...

    def mean(self, inputs: PolicyInput, proprio_BP: Tensor) -> Tensor:
        """Return the deterministic action chunk (B, C, A), normalised."""
        ...

    def unnormalise_action(
        self, action_BCA: NDArray[np.float32], proprio_BP: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Convert normalised actions to the environment's units, of chunks that begin in these raw states."""
        ...


@runtime_checkable
class FlowNetwork(Protocol):
    """A policy network whose head denoises the chunk step by step, so that every step may have its own noise."""

    def flow_chain(self, inputs: PolicyInput, proprio_BP: Tensor, log_std: Tensor) -> FlowChain:
        """Return the distribution over denoising chains with standard deviation exp(log_std) (A,) in all."""
        ...


@runtime_checkable
class TokenNetwork(Protocol):
    """A policy network whose head chooses among bins."""

    def token_chunk(self, inputs: PolicyInput, proprio_BP: Tensor, temperature: Tensor) -> TokenChunk:
        """Return the distribution over chunks of tokens at a temperature (a scalar)."""
        ...

    def of_tokens(self, token_BCA: Tensor) -> Tensor:
        """Return the normalised chunk (B, C, A) that tokens stand for."""
        ...
