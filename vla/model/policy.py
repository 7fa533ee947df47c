"""A trained VLA as a policy."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vla.core.types import ActionChunk, ActionSpec, Observation, PolicySpec, Prefix
from vla.model.model import VLA
from vla.processing.processor import Processor


class VLAPolicy:
    """A `vla.core.types.Policy` around a VLA. Stateless: each observation decides alone."""

    def __init__(self, vla: VLA, *, n_action_steps: int | None = None) -> None:
        """`n_action_steps`: give only the first n of each chunk to the robot before looking again; None: as many as
        the policy's configuration says."""
        steps = vla.config.n_action_steps or vla.chunk_size if n_action_steps is None else n_action_steps
        if not 1 <= steps <= vla.chunk_size:
            raise ValueError(f"n_action_steps must be in 1..{vla.chunk_size} (the chunk size), got {steps}")
        self.vla, self.n_action_steps = vla, steps

    @property
    def spec(self) -> PolicySpec:
        return self.vla.processor.policy_spec(self.vla.chunk_size, self.n_action_steps)

    @staticmethod
    def load(folder: str | os.PathLike[str], *, n_action_steps: int | None = None) -> VLAPolicy:
        """The policy in a checkpoint folder."""
        return VLAPolicy(VLA.load(folder), n_action_steps=n_action_steps)

    @property
    def processor(self) -> Processor:
        return self.vla.processor

    @property
    def action_spec(self) -> ActionSpec:
        return self.vla.action_spec

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(camera for camera in self.vla.processor.config.cameras if camera)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget."""

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The whole chunk (B, chunk_size, A) in environment units."""
        return self.vla.predict(self.vla.processor.prepare(obs))
