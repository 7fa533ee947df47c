"""Real-time chunking: a policy whose next chunk begins where the one being played is.

Black, Galliker and Levine 2025, "Real-Time Execution of Action Chunking Flow Policies". A flow head is led to agree
with the actions that will have been played (`vla.model.flow_head.FlowHead`). No other head has a way to take them into
account: our controller joins its chunks by blending and making up for late displacements
(`policies.control.playback`), measured to be far better than what `continue_chunk` does for LeRobot's tools, averaging
by the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from policies.chunking.merge import Prefix, prefix_weights
from vla.core.types import ActionChunk, ActionSpec, Observation
from vla.model.flow_head import FlowHead
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.processor import ModelInput, Processor


def continue_chunk(vla: VLA, inp: ModelInput, prefix: Prefix) -> ActionChunk:
    """(B, C, A), environment units, as `VLA.predict`, but going on from `prefix`."""
    old = np.zeros((len(prefix.left), vla.chunk_size, vla.action_spec.dim), np.float32)
    shared = min(vla.chunk_size, prefix.actions.shape[1])
    old[:, :shared] = prefix.actions[:, :shared]
    weight = prefix_weights(prefix.delay, prefix.left, vla.chunk_size)
    if not isinstance(vla.head, FlowHead):
        return (1 - weight[..., None]) * vla.predict(inp) + weight[..., None] * old
    with torch.no_grad():
        proprio = inp.proprio_BP.to(vla.device)
        latents = vla.condition(vla.encode(inp), proprio)
        target = torch.from_numpy(vla.processor.normalise_action(old)).to(vla.device)
        action = vla.head(latents.latent_BCD, prefix=(target, torch.from_numpy(weight).to(vla.device)))
        if vla.refiner is not None:
            action = action + vla.refiner(latents, proprio)
        chunk = action.cpu().numpy()
    if not np.isfinite(chunk).all():
        raise FloatingPointError("the model's action is not finite: its weights or inputs are damaged")
    return vla.processor.unnormalise_action(chunk)


class RealTimePolicy:
    """A `vla.core.types.Policy` that gives whole chunks. One with a flow head has `act_after`, too, which goes on from
    what the robot still has to play."""

    def __init__(self, vla: VLA) -> None:
        self.vla = vla.eval()
        self.n_action_steps = VLAPolicy(vla).n_action_steps
        """After how many actions to ask again, when answers take no time."""
        if isinstance(vla.head, FlowHead):
            self.act_after = self._act_after

    @property
    def chunk_size(self) -> int:
        return self.vla.chunk_size

    @property
    def processor(self) -> Processor:
        return self.vla.processor

    @property
    def action_spec(self) -> ActionSpec:
        return self.vla.action_spec

    @property
    def cameras(self) -> tuple[str, ...]:
        return VLAPolicy(self.vla).cameras

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget."""

    def act(self, obs: Observation) -> ActionChunk:
        """(B, chunk_size, A) in environment units."""
        return self.vla.predict(self.vla.processor.prepare(obs))

    def _act_after(self, obs: Observation, prefix: Prefix) -> ActionChunk:
        return continue_chunk(self.vla, self.vla.processor.prepare(obs), prefix)
