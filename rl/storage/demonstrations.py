"""Demonstrations beside online RL: decisions of an imitation data set, as the policy being refined reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl.models.actor import GaussianChunkActor
from rl.models.policy_inputs import Conditions, Seen, summary
from rl.models.state_std import StateScale, fit_scale
from rl.storage.rollout_buffer import DemoBatch

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet


@dataclass(frozen=True, eq=False)
class DemoRows:
    """Demonstrated decisions, features computed once (if what computes them is frozen)."""

    conditions: Conditions
    proprio_BP: Tensor
    action_BCA: Tensor
    """Normalised."""
    mask_BC: Tensor
    """1 where the episode went on."""

    def __len__(self) -> int:
        return len(self.proprio_BP)

    @staticmethod
    @torch.no_grad()
    def of(actor: GaussianChunkActor, demos: DemoSet, *, limit: int = 4096, seed: int = 0) -> DemoRows:
        """At most `limit` decisions, drawn without replacement. ValueError if the data set does not fit the policy."""
        from vla.data.batches import LiveDemos

        source = LiveDemos(actor.model.processor, demos, actor.model.chunk_size)
        (frames,) = source.sizes
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(frames, generator=generator)[:limit].sort().values
        room: Conditions | None = None
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(chosen), 128):
            batch = source.take(chosen[start : start + 128])
            conditions, proprio = actor.conditions_of(batch.seen)
            if room is None:
                room = conditions.empty_like(len(chosen), dtype=torch.float16)
            room.write(start, conditions)
            parts.append((proprio, batch.action_BCA.to(actor.device), batch.mask.to(actor.device)))
        assert room is not None, "an empty data set"
        return DemoRows(room, *(torch.cat(column) for column in zip(*parts, strict=True)))

    def draw(self, count: int, generator: torch.Generator) -> DemoBatch:
        """`count` random decisions."""
        rows = torch.randint(len(self), (count,), generator=generator).to(self.proprio_BP.device)
        return DemoBatch(
            self.conditions.select(rows).float(), self.proprio_BP[rows], self.action_BCA[rows], self.mask_BC[rows]
        )

    @torch.no_grad()
    def fit_scale(self, actor: GaussianChunkActor, *, seed: int = 0) -> StateScale:
        """Where demonstrations scatter around the policy, and where they do not."""
        states, errors = [], []
        for start in range(0, len(self), 256):
            rows = slice(start, start + 256)
            conditions, proprio = self.conditions.select(rows).float(), self.proprio_BP[rows]
            if isinstance(conditions, Seen):
                raise ValueError("state_std reads frozen features: it does not go with a learning backbone")
            states.append(summary(conditions, proprio))
            errors.append(self.action_BCA[rows] - actor.mean(conditions, proprio))
        with torch.enable_grad():
            return fit_scale(torch.cat(states), torch.cat(errors), self.mask_BC, seed=seed)
