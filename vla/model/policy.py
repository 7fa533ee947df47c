"""A trained VLA as a policy: the one way in which a loaded VLA acts, in evaluation, serving, control and RL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.backbones.features import Features
from vla.core.types import ActionChunk, Observation, PolicySpec, Prefix
from vla.language.talking import CANNOT, Said
from vla.model.cuda_graph import Graph
from vla.model.heads.flow import FlowHead, prefix_weights
from vla.model.memory.recall import EpisodeMemory
from vla.model.memory.tokens import remembering
from vla.model.model import VLA, evaluating
from vla.model.modulators import applied
from vla.model.routing import Routing
from vla.processing.batch import ModelInput, trimmed_text
from vla.processing.cameras.camera_map import CameraMap
from vla.processing.processor import Processor
from vla.runtime.devices import bfloat16_is_fast

if TYPE_CHECKING:
    from vla.model.talking.speech import Speech

_INSTRUCTIONS = 256
"""Batches of instructions whose tokens are kept on the device."""
_SHAPES = 16
"""Shapes of batch and text that have a CUDA graph; others are launched kernel by kernel."""


class VLAPolicy:
    """A `vla.core.types.Policy` around a VLA. Stateless but for the choice of a modulator (`routing`), unless the VLA
    remembers: then it keeps the memory of the episode in each environment. `reset` clears both.

    It runs in inference mode with a text as long as the longest instruction, tokenised once and kept on the device.
    Padding changes nothing but rounding (tests hold it below 1e-5). Shapes are fixed as long as batch and instructions
    are; on a GPU each is captured as a CUDA graph. Images and proprio come first in the sequence, so that hidden states
    of the instruction cannot be kept.
    """

    def __init__(
        self, vla: VLA, *, n_action_steps: int | None = None, dtype: Literal["float32", "bfloat16"] | None = None
    ) -> None:
        """`n_action_steps`: execute only the first n actions of each chunk; None: as the policy's configuration says.

        `dtype` casts the backbone for good: a copy in bfloat16 is read in half the time that casting the weights at
        every call takes.
        """
        steps = vla.config.n_action_steps or vla.chunk_size if n_action_steps is None else n_action_steps
        if not 1 <= steps <= vla.chunk_size:
            raise ValueError(f"n_action_steps must be in 1..{vla.chunk_size} (the chunk size), got {steps}")
        if dtype is not None:
            vla.backbone_dtype = getattr(torch, dtype)
            vla.backbone.to(vla.backbone_dtype)
        self.memory = None
        if vla.config.memory is not None:
            learnt = vla.config.n_action_steps or vla.chunk_size
            if steps != learnt:
                raise ValueError(
                    f"this policy remembers decisions {learnt} steps apart: keep n_action_steps at {learnt}"
                )
            self.memory = EpisodeMemory(vla.config.memory, learnt)
        self.vla, self._steps = vla, steps
        self._text: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._graphs: dict[tuple[torch.Size, ...], Graph] = {}
        self._kept_for: tuple[object, ...] = ()
        self.routing = Routing()
        self.confidence: NDArray[np.float32] | None = None
        """How surely each environment's last decision saw what its instruction names (B,), NaN where it decided
        nothing. None where the spec tells no `grounding_threshold`."""

    @staticmethod
    def load(folder: str | os.PathLike[str], *, n_action_steps: int | None = None) -> VLAPolicy:
        """The policy in a checkpoint folder."""
        return VLAPolicy(VLA.load(folder), n_action_steps=n_action_steps)

    @property
    def spec(self) -> PolicySpec:
        """With a flow head it takes a prefix."""
        vla = self.vla
        spec = vla.processor.policy_spec(vla.chunk_size, self._steps, takes_prefix=isinstance(vla.head, FlowHead))
        talks, memory = vla.talker is not None, vla.config.memory
        return replace(
            spec,
            grounding_threshold=vla.grounding_threshold,
            talks=talks,
            memory_frames=None if memory is None else memory.frames,
            routes=vla.pool is not None,
        )

    @property
    def processor(self) -> Processor:
        """The model's processor, between observations and tensors."""
        return self.vla.processor

    def look_through(self, cameras: CameraMap) -> None:
        """See `vla.processing.preprocess.Preprocessor.look_through`."""
        self.processor.look_through(cameras)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Forget the episodes in these environments (all when None), and choose anew among modulators."""
        self.routing.reset(env_ids)
        if self.memory is not None:
            self.memory.reset(env_ids)

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The whole chunk (B, chunk_size, A) in environment units. FloatingPointError if it is not finite.

        On a CPU, environments that are not live are left out: their actions are 0. A GPU keeps its fixed shapes.
        """
        vla = self.vla
        if (parts := (vla.processor, vla.device, vla.refiner)) != self._kept_for:  # one of them was replaced
            self._text.clear()
            self._graphs.clear()
            self._kept_for = parts
        chosen = self.routing.choose(vla, obs, self._input)
        with evaluating(vla), applied(vla, chosen):
            if prefix is not None:  # the guidance of a flow head takes gradients
                inp = self._input(obs)
                with torch.no_grad():
                    features = vla.encode_as_is(inp, acting_dtype(vla))
                    self._tell(vla.confidence(features))
                    if self.memory is not None:
                        features, row, key = remembering(vla, features, inp, self._recalled(obs.environments))
                        self.memory.add(obs.environments, row.cpu().numpy(), key.cpu().numpy())
                return continue_chunk(vla, inp, prefix, obs.proprio, features)
            with torch.inference_mode():
                inp, live = self._input(obs), obs.live
                if live is None or live.all() or vla.device.type != "cpu":
                    action, confidence = self._normalised(inp, obs.environments, live)
                    self._tell(confidence)
                    return vla.to_actions(action, obs.proprio)
                chunk = np.zeros((obs.batch_size, vla.chunk_size, len(vla.action_spec.names)), np.float32)
                told = None if vla.grounding_threshold is None else np.full(obs.batch_size, np.nan, np.float32)
                if live.any():  # with a text as long as before: another length rounds otherwise
                    rows = torch.from_numpy(live)
                    with applied(vla, None if chosen is None else chosen[rows]):
                        action, confidence = self._normalised(inp.select(rows), obs.environments[live])
                    chunk[live] = vla.to_actions(action, obs.proprio[live])
                    if told is not None and confidence is not None:
                        told[live] = confidence.numpy()
                self.confidence = told
                return chunk

    def answer(self, obs: Observation, questions: Sequence[str]) -> list[Said]:
        """Answers to one question about each of B observations. It computes apart from `act`, which it leaves as it is,
        to the bit. ValueError for a policy that cannot talk (`spec.talks`)."""
        return self.speech(obs, questions).whole()

    def speech(self, obs: Observation, questions: Sequence[str]) -> Speech:
        """The same answers, to be told a token at a time (`vla.language.talking.Speech`)."""
        vla = self.vla
        if vla.talker is None:
            raise ValueError(CANNOT)
        from vla.model.talking.speech import Speech

        inp = self._input(obs)
        hear = partial(vla.talker.prefill, vla.backbone, inp, mask_words=not vla.config.language)
        return Speech(vla.talker, vla.backbone, hear, questions, acting_dtype(self.vla))

    def _tell(self, confidence: Tensor | None) -> None:
        self.confidence = None if confidence is None else confidence.cpu().numpy()

    def _input(self, obs: Observation) -> ModelInput:
        """On the device, its text as long as the longest instruction."""
        device, processor = self.vla.device, self.vla.processor
        ids, mask = self._tokens(tuple(obs.instruction))
        images = torch.from_numpy(processor.images(obs))
        proprio = processor.normalise_proprio(obs.proprio, batch_size=obs.batch_size)
        views = [torch.from_numpy(array).to(device, non_blocking=True) for array in processor.depth_arrays(obs)]
        return ModelInput(
            images.to(device, non_blocking=True), ids, mask, proprio.to(device, non_blocking=True), *views
        )

    def _normalised(
        self, inp: ModelInput, envs: NDArray[np.int64], live: NDArray[np.bool_] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Actions (B, C, A) as the model gives them, and confidences (B,) where it tells them. What is decided in the
        `live` ones of these environments is remembered."""
        if self.memory is None:
            return self._computed(inp.arrays)
        action, confidence, row, key = self._computed((*inp.arrays, self._recalled(envs)))
        kept = np.ones(len(envs), bool) if live is None else live
        self.memory.add(envs[kept], row.cpu().numpy()[kept], key.cpu().numpy()[kept])
        return action, confidence

    def _recalled(self, envs: NDArray[np.int64]) -> Tensor:
        assert self.memory is not None
        rows = self.memory.read(envs.tolist(), self.vla.bridge.memory.row_width)
        return torch.from_numpy(rows).to(self.vla.device)

    def _computed(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The results of `_decide`, on a GPU by a graph of it."""
        if inputs[0].device.type != "cuda" or self.vla.pool is not None:  # no graph holds a choice
            return self._decide(*inputs)
        shape = tuple(tensor.shape for tensor in inputs)
        if shape not in self._graphs:
            if len(self._graphs) >= _SHAPES:
                return self._decide(*inputs)
            self._graphs[shape] = Graph(self._decide, inputs)
        return self._graphs[shape](*inputs)

    def _decide(self, *arrays: Tensor) -> tuple[Any, ...]:
        """(actions, confidences), and of a policy that remembers what to keep of these decisions."""
        inputs, memory = (arrays, None) if self.memory is None else (arrays[:-1], arrays[-1])
        inp = ModelInput(*inputs)
        features = self.vla.encode_as_is(inp, acting_dtype(self.vla))
        if memory is None:
            return self.vla.act(features, inp.proprio_BP), self.vla.confidence(features)
        features, row, key = remembering(self.vla, features, inp, memory)
        return self.vla.act(features, inp.proprio_BP), self.vla.confidence(features), row, key

    def _tokens(self, instructions: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        if instructions not in self._text:
            if len(self._text) >= _INSTRUCTIONS:
                self._text.clear()
            ids, mask = trimmed_text(*self.vla.processor.tokenise(instructions))
            self._text[instructions] = ids.to(self.vla.device), mask.to(self.vla.device)
        return self._text[instructions]


def acting_dtype(vla: VLA) -> torch.dtype:
    """Precision in which the backbone acts, whoever asks it: its own, or float32 on a processor that multiplies
    bfloat16 no faster, unless the weights were cast for good."""
    weights = next(vla.backbone.parameters()).dtype
    slow = weights == torch.float32 and not bfloat16_is_fast(vla.device)
    return torch.float32 if slow else vla.backbone_dtype


def continue_chunk(
    vla: VLA, inp: ModelInput, prefix: Prefix, state_BP: NDArray[np.floating], features: Features | None = None
) -> ActionChunk:
    """Real-time chunking: the chunk (B, C, A) in environment units that goes on from `prefix`. `state_BP`: the raw
    states; `features`: what the backbone makes of `inp`, where that is known already.

    Black, Galliker and Levine 2025, "Real-Time Execution of Action Chunking Flow Policies". A flow head is guided to
    agree with the actions that will have been executed (`vla.model.heads.flow.FlowHead`). No other head can take them
    into account: LeRobot's tools get an average by the same weights; our controller blends instead
    (`policies.control.playback`), which was measured to be far better, and gives such a policy no prefix.
    """
    old = np.zeros((len(prefix.left), vla.chunk_size, vla.action_spec.dim), np.float32)
    shared = min(vla.chunk_size, prefix.actions.shape[1])
    old[:, :shared] = prefix.actions[:, :shared]
    weight = prefix_weights(prefix.delay, prefix.left, vla.chunk_size)
    with torch.no_grad(), evaluating(vla):
        proprio = inp.proprio_BP.to(vla.device)
        if features is None:
            features = vla.encode_as_is(inp.to(vla.device).without_padding(), acting_dtype(vla))
        if not isinstance(vla.head, FlowHead):
            fresh = vla.to_actions(vla.act(features, proprio), state_BP)
            return (1 - weight[..., None]) * fresh + weight[..., None] * old
        latents = vla.condition(features, proprio)
        target = torch.from_numpy(vla.processor.normalise_action(old, state_BP)).to(vla.device)
        action = vla.head(latents.latent_BCD, prefix=(target, torch.from_numpy(weight).to(vla.device)))
        if vla.refiner is not None:
            action = vla.refined(action, latents, proprio)
    return vla.to_actions(action, state_BP)
