"""A VLA as a `PolicyNetwork`: its frozen part, the part that RL trains, and that part's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rl.configs.learning import ActorConfig
from rl.models.actor import ChunkActor, GaussianChunkActor, TokenChunkActor
from rl.models.distribution import FlowChain
from rl.models.tokens import TokenChunk
from vla.backbones.features import Features, Mishearing, mishearing
from vla.core.types import Observation
from vla.model.advantage import refuse_guided
from vla.model.config import check_loads
from vla.model.heads.flow import FlowHead
from vla.model.heads.residual import Latents
from vla.model.heads.tokens import BinHead
from vla.model.model import VLA


class VLANetwork:
    """Presents a VLA to a `ChunkActor`. The backbone is frozen; RL trains a residual on the action (with noise "tokens"
    on the logits), or the head, or bridge and head, as `ActorConfig` says.

    Everything before the trained part is computed once per observation: the backbone's features where the bridge
    learns, else all up to the head.
    """

    def __init__(self, vla: nn.Module, config: ActorConfig, *, seed: int = 0) -> None:
        """`vla` is changed in place; `seed` draws the residual's hidden layers. ValueError for options that exclude
        each other."""
        if getattr(vla, "pool", None) is not None:
            raise ValueError(
                "RL does not train modulators: refine the policy first (`vla rl`), then teach it new tasks with "
                "`vla train --init POLICY --modulators N`"
            )
        if getattr(getattr(vla, "config", None), "memory", None) is not None:
            raise ValueError("online RL does not train a policy that remembers: start from one without --memory")
        refuse_guided(vla)
        if config.noise == "flow" and not isinstance(vla.head, FlowHead):
            raise ValueError(
                "this recipe trains the flow head of a policy, and this one has another head: start from one of "
                "`vla train --head flow`, or choose a recipe for any head (`vla list recipes`)"
            )
        if config.noise == "flow" and config.refiner_width:
            raise ValueError("noise 'flow' trains the flow head itself: leave ActorConfig.refiner_width at 0")
        refines: Literal["actions", "logits"] = "logits" if config.noise == "tokens" else "actions"
        _check_tokens(vla, refines)
        if config.refiner_width and config.trains != "bridge":
            raise ValueError("refiner_width trains the refiner alone: leave ActorConfig.trains at its default")
        self.module, self.chunk_size = vla, vla.chunk_size
        self.reads_latents = bool(config.refiner_width) or config.trains == "head"
        """True if the bridge is frozen as well."""
        vla.backbone.requires_grad_(False)
        if config.refiner_width:
            vla.add_refiner(config.refiner_width, seed=seed, on=refines)
        if self.reads_latents:
            vla.requires_grad_(False)
            (vla.refiner if config.refiner_width else vla.head).requires_grad_(True)

    @torch.no_grad()
    def encode(self, obs: Observation, noise: Mishearing | None = None) -> tuple[Features | Latents, Tensor]:
        """Return features or latents of B observations, and the normalised proprio (B, P)."""
        inp = self.module.processor.prepare(obs)
        with nullcontext() if noise is None else mishearing(self.module.backbone, noise):
            features = self.module.encode(inp)
        proprio_BP = inp.proprio_BP.to(next(self.module.parameters()).device)
        return (self.module.condition(features, proprio_BP) if self.reads_latents else features), proprio_BP

    def mean(self, inputs: Features | Latents, proprio_BP: Tensor) -> Tensor:
        """Return the VLA's noise-free chunk (B, C, A), normalised."""
        return (self.module.act_on if self.reads_latents else self.module.act)(inputs, proprio_BP)

    def flow_chain(self, inputs: Features | Latents, proprio_BP: Tensor, log_std: Tensor) -> FlowChain:
        """Return the flow head's denoising chain with noise of standard deviation exp(log_std) (A,) in all."""
        head = self.module.head
        latent_BCD = inputs.latent_BCD if isinstance(inputs, Latents) else self.module.latent(inputs, proprio_BP)
        start = latent_BCD.new_zeros((*latent_BCD.shape[:2], head.action_dim))
        return FlowChain(
            lambda states, first: head.advance(latent_BCD, states, first), head.sampling_steps, start, log_std
        )

    def token_chunk(self, inputs: Features | Latents, proprio_BP: Tensor, temperature: Tensor) -> TokenChunk:
        """Return the distribution over the bins of a head that chooses among some, with the residual on their logits
        if there is one."""
        vla = self.module
        latents = inputs if isinstance(inputs, Latents) else vla.condition(inputs, proprio_BP)
        logits = vla.head.logits(latents.latent_BCD)
        if vla.refiner is not None:
            logits = vla.refined(logits, latents, proprio_BP)
        return TokenChunk(logits, temperature, vla.head.spans_chunk)

    def of_tokens(self, token_BCA: Tensor) -> Tensor:
        """Return the normalised chunk (B, C, A) of the centres of these bins."""
        return self.module.head.of_tokens(token_BCA)

    def unnormalise_action(
        self, action_BCA: NDArray[np.float32], proprio_BP: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Convert normalised actions to the units of the demonstrations."""
        return self.module.processor.unnormalise_action(action_BCA, proprio_BP)


def _check_tokens(vla: nn.Module, refines: str) -> None:
    """ValueError where noise on the tokens meets a policy without any, or a residual that RL of the other kind made."""
    if refines == "logits" and not isinstance(vla.head, BinHead):
        raise ValueError(
            "this recipe draws the tokens of a policy whose head has some, and this one has another head: start from "
            "one of `vla train --head bins` (or frequencies), or choose a recipe for any head (`vla list recipes`)"
        )
    trained = getattr(getattr(vla, "config", None), "refines", "actions")
    if getattr(vla, "refiner", None) is not None and trained != refines:
        names = {
            "actions": "the actions (such as tabletop-pick)",
            "logits": "the tokens (such as tabletop-pick-tokens)",
        }
        raise ValueError(
            f"RL has refined the {trained} of this policy already: go on with a recipe of {names[trained]}, or start "
            "from the policy before RL"
        )


def make_actor(
    vla: nn.Module, action_names: Sequence[str], config: ActorConfig | None = None, *, seed: int = 0
) -> ChunkActor:
    """Return the stochastic policy of a VLA, which is changed in place."""
    config = config or ActorConfig()
    network = VLANetwork(vla, config, seed=seed)
    if config.noise == "tokens":
        return TokenChunkActor(network, config)
    return GaussianChunkActor(network, action_names, config)


def serve_as_trained(vla: nn.Module, n_action_steps: int | None) -> int | None:
    """Write into a VLA's configuration how many control steps of a chunk are executed (None: as it says), so that it
    is served as it was trained; return that number. ValueError if the VLA could not be loaded again once saved."""
    if not isinstance(vla, VLA):
        return n_action_steps
    n_action_steps = n_action_steps or vla.config.n_action_steps
    vla.config = replace(vla.config, n_action_steps=n_action_steps)
    check_loads(vla)
    return n_action_steps
