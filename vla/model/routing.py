"""Which modulator each environment's policy acts with, from its first decision on (`vla.model.modulators`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.core.types import Observation
from vla.model.modulators import IDENTITY, Pool, frozen
from vla.processing.batch import ModelInput

if TYPE_CHECKING:
    from vla.model.model import VLA

Rule = Callable[[Pool, Tensor], Tensor]
"""(the pool, queries (B, K)) -> the number of each one's modulator (B,)."""


class Routing:
    """The choices of B environments. One is made at the first decision of an episode and kept until `reset`: half of a
    task done in one modulator's way and half in another's is what neither has learnt, and in the middle of an episode
    the picture tells less of the task than at its beginning. A new instruction makes a new choice, too, where episodes
    follow one another without a reset."""

    def __init__(self, rule: Rule = Pool.match) -> None:
        """`rule`: how to choose. Experiments choose by an oracle or at random."""
        self.rule = rule
        self._kept: dict[int, tuple[str, int]] = {}
        self._batch = 0
        """Size of the last batch that did not say of which environments it is."""

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """New episodes begin in these environments, or in all."""
        for env in list(self._kept) if env_ids is None else env_ids:
            self._kept.pop(int(env), None)

    def choose(self, vla: VLA, obs: Observation, read: Callable[[Observation], ModelInput]) -> Tensor | None:
        """The numbers (B,) for `applied`; None for a policy without modulators. `read` makes the model's input."""
        if vla.pool is None:
            return None
        batch = obs.batch_size
        if obs.env_ids is None and batch != self._batch:
            self._kept, self._batch = {}, batch
        words, kept = obs.instruction, self._kept
        envs = obs.environments.tolist()
        live = range(batch) if obs.live is None else obs.live.nonzero()[0].tolist()
        new = [row for row in live if envs[row] not in kept or kept[envs[row]][0] != words[row]]
        if new:
            with torch.no_grad(), frozen(vla, len(new)):
                query_BK = query(vla, read(obs).select(torch.tensor(new)))
                numbers = self.rule(vla.pool, query_BK).tolist()
            for row, number in zip(new, numbers, strict=True):
                kept[envs[row]] = (words[row], number)
        return torch.tensor([kept[env][1] if env in kept else IDENTITY for env in envs])


def query(vla: VLA, inp: ModelInput) -> Tensor:
    """The queries of observations (B, K), K twice the backbone's width: the instruction's mean word, and the mean state
    of the action queries after the last layer, which is what it means in this picture. A backbone that does not tell
    its words gives the queries' state after the first layer instead, which is nearly the instruction's."""
    inp = inp.to(vla.device)
    states_BLD = vla.encode(inp).queries_BLQD.float().mean(2)
    first_BD, last_BD = states_BLD[:, 0], states_BLD[:, -1]
    if hasattr(vla.backbone, "hear"):
        said_BT1 = (inp.token_mask_BT.bool() & vla.config.language)[..., None]
        first_BD = (vla.backbone.hear(inp.token_ids_BT).float() * said_BT1).sum(1) / said_BT1.sum(1).clamp(min=1)
    return torch.cat([F.layer_norm(half, half.shape[-1:]) for half in (first_BD, last_BD)], -1)
