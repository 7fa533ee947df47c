"""Inference where the same instructions come again and again: what does not change is computed once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vla.model import VLA, VLAPolicy
from vla.processor import ModelInput
from vla.types import ActionChunk, Observation

_INSTRUCTIONS = 256  # distinct batches of instructions whose tokens are kept


class FastPolicy(VLAPolicy):
    """A `VLAPolicy` in inference mode whose text is as long as the longest instruction, tokenised once, on the device.

    Padding changes nothing but rounding (tests hold it below 1e-5). Shapes are fixed as long as batch and instructions
    are. Images and proprio come first in the sequence, so hidden states of the instruction cannot be kept.
    """

    def __init__(self, vla: VLA, *, n_action_steps: int | None = None) -> None:
        """Puts `vla` into evaluation mode."""
        super().__init__(vla.eval(), n_action_steps=n_action_steps)
        self._text: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def act(self, obs: Observation) -> ActionChunk:
        """(B, n_action_steps, A) in environment units."""
        vla = self.vla
        with torch.inference_mode():
            ids, mask = self._tokens(tuple(obs.instruction))
            whole = vla.processor.prepare(obs)
            chunk = vla.predict(ModelInput(whole.images_BVHWC, ids, mask, whole.proprio_BP))
        return np.ascontiguousarray(chunk[:, : self.n_action_steps])

    def _tokens(self, instructions: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        if instructions not in self._text:
            if len(self._text) >= _INSTRUCTIONS:
                self._text.clear()
            ids, mask = self.vla.processor.tokenise(instructions)
            length = max(1, int(mask.sum(1).max()))
            device = self.vla.device
            self._text[instructions] = ids[:, :length].to(device), mask[:, :length].to(device)
        return self._text[instructions]
