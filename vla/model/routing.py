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
    the picture tells less of the task than at its beginning. A new instruction makes a new choice, too: where episodes
    follow one another without a reset, and for a server's clients, whose observations share batches in any order."""

    def __init__(self, rule: Rule = Pool.match) -> None:
        """`rule`: how to choose. Experiments choose by an oracle or at random."""
        self.rule = rule
        self._kept: list[tuple[str, int] | None] = []

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """New episodes begin in these environments, or in all."""
        for env in range(len(self._kept)) if env_ids is None else env_ids:
            if env < len(self._kept):
                self._kept[env] = None

    def choose(self, vla: VLA, obs: Observation, read: Callable[[Observation], ModelInput]) -> Tensor | None:
        """The numbers (B,) for `applied`; None for a policy without modulators. `read` makes the model's input."""
        if vla.pool is None:
            return None
        batch = obs.batch_size
        if len(self._kept) != batch:
            self._kept = [None] * batch
        words, kept = obs.instruction, self._kept
        live = range(batch) if obs.live is None else obs.live.nonzero()[0].tolist()
        new = [env for env in live if kept[env] is None or kept[env][0] != words[env]]
        if new:
            with torch.no_grad(), frozen(vla, len(new)):
                query_BK = query(vla, read(obs).select(torch.tensor(new)))
                numbers = self.rule(vla.pool, query_BK).tolist()
            for env, number in zip(new, numbers, strict=True):
                kept[env] = (words[env], number)
        return torch.tensor([IDENTITY if one is None else one[1] for one in kept])


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
