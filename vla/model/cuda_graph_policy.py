"""Inference where the same instructions come again and again: what does not change is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vla.core.types import ActionChunk, Observation
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.processor import ModelInput

_INSTRUCTIONS = 256  # distinct batches of instructions whose tokens are kept
_SHAPES = 16  # of batch and text that have a CUDA graph; others are launched kernel by kernel


class FastPolicy(VLAPolicy):
    """A `VLAPolicy` in inference mode whose text is as long as the longest instruction, tokenised once, on the device.

    Padding changes nothing but rounding (tests hold it below 1e-5). Shapes are fixed as long as batch and instructions
    are; on a GPU each is captured as a CUDA graph, which is replayed without launching its kernels one by one. Images
    and proprio come first in the sequence, so hidden states of the instruction cannot be kept.
    """

    def __init__(
        self, vla: VLA, *, n_action_steps: int | None = None, dtype: Literal["float32", "bfloat16"] | None = None
    ) -> None:
        """Puts `vla` into evaluation mode, and its backbone into `dtype` if one is given: a copy in bfloat16 is read in
        half the time that casting the weights at every call takes."""
        super().__init__(vla.eval(), n_action_steps=n_action_steps)
        if dtype is not None:
            vla.backbone_dtype = getattr(torch, dtype)
            vla.backbone.to(vla.backbone_dtype)
        self._text: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._graphs: dict[tuple[torch.Size, ...], Graph] = {}

    def act(self, obs: Observation) -> ActionChunk:
        """The whole chunk (B, chunk_size, A) in environment units. FloatingPointError if it is not finite."""
        vla = self.vla
        with torch.inference_mode():
            ids, mask = self._tokens(tuple(obs.instruction))
            whole = vla.processor.prepare(obs)
            action = self._run(whole.images_BVHWC, ids, mask, whole.proprio_BP).cpu().numpy()
        if not np.isfinite(action).all():
            raise FloatingPointError("the model's action is not finite: its weights or inputs are damaged")
        return vla.processor.unnormalise_action(action)

    def _run(self, *inputs: Tensor) -> Tensor:
        """Normalised actions (B, C, A) of images, token ids, their mask and proprio."""
        device = self.vla.device
        inputs = tuple(tensor.to(device, non_blocking=True) for tensor in inputs)
        if device.type != "cuda":
            return self._decide(*inputs)
        shape = tuple(tensor.shape for tensor in inputs)
        if shape not in self._graphs:
            if len(self._graphs) >= _SHAPES:
                return self._decide(*inputs)
            self._graphs[shape] = Graph(self._decide, inputs)
        return self._graphs[shape](*inputs)

    def _decide(self, images_BVHWC: Tensor, ids_BT: Tensor, mask_BT: Tensor, proprio_BP: Tensor) -> Tensor:
        inp = ModelInput(images_BVHWC, ids_BT, mask_BT, proprio_BP)
        return self.vla.act(self.vla.encode_as_is(inp), proprio_BP)

    def _tokens(self, instructions: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        if instructions not in self._text:
            if len(self._text) >= _INSTRUCTIONS:
                self._text.clear()
            ids, mask = self.vla.processor.tokenise(instructions)
            if not self.vla.config.language:
                mask = torch.zeros_like(mask)
            length = max(1, int(mask.sum(1).max()))
            device = self.vla.device
            self._text[instructions] = ids[:, :length].to(device), mask[:, :length].to(device)
        return self._text[instructions]


class Graph:
    """A function of tensors on the GPU, recorded once for their shapes: inputs are copied to where it read them."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        # Warm-up on another stream: lazy initialisation (cuBLAS, cuDNN, constants) must not be recorded.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output is overwritten by the next call."""
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        self._graph.replay()
        return self._output
