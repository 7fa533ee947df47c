"""Modulators: small matrices that teach a frozen policy new tasks, chosen by what the observation is like. L2M.

Schmied, Hofmarcher, Paischer, Pascanu and Hochreiter 2023, "Learning to Modulate pre-trained Models in RL" (arXiv
2306.14884). A pool holds M modulators, each a LoRA on the same layers of the policy, with a learnable key each. An
observation asks by a query, a summary of the frozen backbone's features; the modulator with the most similar key is
added, and nothing else of the policy ever changes. What was known before has keys of its own, which stand for no
modulator at all: there the policy computes what it always did, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.model.config import ModulatorConfig

IDENTITY = -1
"""The number of no modulator: the policy as it was."""
VARYING, RIDGE = 64, 0.3
"""Directions in which the words of what is known are whitened, and the variance, as a share of the mean direction's,
above which one is."""
_NO_DIFFERENCE = 1e-3
"""A difference this short is rounding, as that of one sentence from the mean of all, where all are the same: it is not
drawn out to unit length."""
_ROUNDS = 50
_UNTOLD = (
    "this policy has modulators, and nothing has chosen among them: let it act as a policy "
    "(vla.model.policy.VLAPolicy), which chooses at the first decision of an episode"
)


class Pool(nn.Module):
    """M modulators with their keys, and the keys of what was known before. The only part of a modulated policy that
    learns."""

    known_IK: Tensor
    centre_K: Tensor
    varying_RD: Tensor
    shrink_R: Tensor
    counts_M: Tensor
    before_M: Tensor
    turn: Tensor

    def __init__(self, config: ModulatorConfig, layers: Mapping[str, nn.Linear], *, key_width: int) -> None:
        """A pool without effect on `layers`, by name. Their outputs are changed from now on, wherever they are called:
        within `applied`, whose numbers say which observation gets which modulator."""
        super().__init__()
        count, rank = config.count, config.rank
        self.config, self.scale = config, config.alpha / config.rank
        # Directions as of uniform(-1, 1), as published, but of a length that a few dozen steps can turn.
        self.keys_MK = nn.Parameter(torch.empty(count, key_width).uniform_(-1, 1) * key_width**-0.5)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in layers.items():
            place = name.replace(".", "-")
            bound = math.sqrt(1 / layer.in_features)  # as a linear layer begins, and as peft's adapters do
            self.down[place] = nn.Parameter(torch.empty(count, rank, layer.in_features).uniform_(-bound, bound))
            self.up[place] = nn.Parameter(torch.zeros(count, layer.out_features, rank))
            layer.register_forward_hook(partial(self._modulate, place))
        self.register_buffer("known_IK", torch.zeros(config.known_keys, key_width))
        self.register_buffer("centre_K", torch.zeros(key_width))
        varying = min(VARYING, key_width // 2)
        self.register_buffer("varying_RD", torch.zeros(varying, key_width // 2))
        self.register_buffer("shrink_R", torch.zeros(varying))
        self.register_buffer("counts_M", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("before_M", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("turn", torch.tensor(IDENTITY))
        self.chosen_B: Tensor | None = None

    def asked(self, query_BK: Tensor) -> Tensor:
        """Return what keys are compared with (B, K): both halves of the queries as they differ from the mean of what
        was known, each of unit length, so that neither drowns the other.

        Of the words that difference is nearly whitened first: names of objects and places change from one instruction
        of a task to the next, and would hide its verb.
        """
        words_BD, states_BD = (query_BK - self.centre_K).chunk(2, dim=-1)
        words_BD = words_BD - (words_BD @ self.varying_RD.T * self.shrink_R) @ self.varying_RD
        return torch.cat([F.normalize(half, dim=-1, eps=_NO_DIFFERENCE) for half in (words_BD, states_BD)], -1)

    def similarity(self, query_BK: Tensor, keys_NK: Tensor) -> Tensor:
        """Cosines (B, N) of what the queries ask with keys."""
        return F.normalize(self.asked(query_BK), dim=-1) @ F.normalize(keys_NK, dim=-1).T

    def match(self, query_BK: Tensor) -> Tensor:
        """The numbers (B,) of the modulators to act with: the most similar key of all that was learnt, `IDENTITY` where
        that is one of what was known before. Nobody has to say which task it is."""
        own = self.similarity(query_BK, self.keys_MK).masked_fill(self.counts_M == 0, -math.inf)
        known = self.similarity(query_BK, self.known_IK)
        best_B = torch.cat([known, own], 1).argmax(1)
        return torch.where(best_B < known.shape[1], IDENTITY, best_B - known.shape[1])

    def choose(self, query_BK: Tensor) -> Tensor:
        """The numbers (B,) of the modulators that observations would learn with: (cosine + 1) / 2, divided by how often
        a modulator was used for the datasets before this one, is largest. So what was learnt from those is left alone
        as long as there are modulators that nothing has learnt yet."""
        usage_M = self.before_M.clamp(min=1)
        return ((self.similarity(query_BK, self.keys_MK) + 1) / 2 / usage_M).argmax(1)

    def begin_dataset(self, query_EK: Tensor) -> None:
        """A new dataset, whose E episodes ask this, begins: what was used so far counts as used by earlier ones.

        With `assign` "dataset" the modulator that most episodes choose learns all of it. Left to themselves, the
        episodes of one task divide among the keys that happen to lie around them, and each modulator learns a part of
        too few demonstrations (docs/research-log.md).
        """
        self.before_M.copy_(self.counts_M)
        if self.config.assign == "dataset":
            self.turn.copy_(torch.bincount(self.choose(query_EK.to(self.keys_MK.device))).argmax())

    def learn(self, query_BK: Tensor) -> Tensor:
        """The numbers (B,) of the modulators that learn from these observations; they count as used."""
        if self.config.assign == "dataset":
            chosen_B = self.turn.expand(len(query_BK))
        else:
            chosen_B = self.choose(query_BK)
        self.counts_M += torch.bincount(chosen_B, minlength=len(self.counts_M))
        return chosen_B

    def pull(self, query_BK: Tensor, chosen_B: Tensor) -> Tensor:
        """The mean cosine between queries and the keys chosen for them, to be made larger."""
        asked_BK = F.normalize(self.asked(query_BK), dim=-1)
        return (asked_BK * F.normalize(self.keys_MK[chosen_B], dim=-1)).sum(-1).mean()

    @torch.no_grad()
    def know(self, query_NK: Tensor) -> None:
        """Fit the keys of what is known already to the queries of N observations of it: their mean, from which queries
        are measured; the directions in which their words vary; and the centres of spherical k-means (Dhillon and Modha
        2001), begun farthest first."""
        self.centre_K.copy_(query_NK.mean(0))
        self._whiten((query_NK - self.centre_K).chunk(2, dim=-1)[0])
        if not len(self.known_IK):
            return
        points_NK = F.normalize(self.asked(query_NK), dim=-1)
        centres = [points_NK[0]]
        while len(centres) < len(self.known_IK):
            centres.append(points_NK[(points_NK @ torch.stack(centres).T).amax(1).argmin()])
        centres_IK = torch.stack(centres)
        for _ in range(_ROUNDS):
            nearest_N = (points_NK @ centres_IK.T).argmax(1)
            sums_IK = torch.zeros_like(centres_IK).index_add_(0, nearest_N, points_NK)
            # A centre with no point of its own stays where it is.
            centres_IK = torch.where(sums_IK.norm(dim=1, keepdim=True) > 0, F.normalize(sums_IK, dim=1), centres_IK)
        self.known_IK.copy_(centres_IK)

    def _whiten(self, words_ND: Tensor) -> None:
        """Fit the whitening to what is known: in the directions that vary most, sqrt(ridge / (ridge + variance)) of the
        difference is left."""
        _, singular_R, varying_RD = torch.linalg.svd(words_ND.float(), full_matrices=False)
        variance_R = singular_R.square()[: len(self.shrink_R)] / len(words_ND)
        ridge = RIDGE * words_ND.square().sum(1).mean() / words_ND.shape[1]
        left_R = torch.where(variance_R > 0, (ridge / (ridge + variance_R)).sqrt(), 1.0)  # 0 / 0 for a single sentence
        self.varying_RD[: len(left_R)] = varying_RD[: len(left_R)]
        self.shrink_R[: len(left_R)] = 1 - left_R

    @contextmanager
    def applied(self, chosen_B: Tensor) -> Iterator[None]:
        """Within this, row b of every batch is computed with modulator `chosen_B[b]`, or with none (`IDENTITY`)."""
        before, self.chosen_B = self.chosen_B, chosen_B.to(self.keys_MK.device)
        try:
            yield
        finally:
            self.chosen_B = before

    def _modulate(self, place: str, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """The layer's output (B, ..., O) with what its modulators add; a row of `IDENTITY` gets exact zeros."""
        chosen_B = self.chosen_B
        if chosen_B is None:
            raise ValueError(_UNTOLD)
        number_B = chosen_B.clamp(min=0)
        down_BRI = self.down[place][number_B]
        up_BOR = self.up[place][number_B] * (self.scale * (chosen_B != IDENTITY)).to(out.dtype)[:, None, None]
        x_BTI = inputs[0].reshape(len(chosen_B), -1, inputs[0].shape[-1])
        added_BTO = torch.bmm(torch.bmm(x_BTI, down_BRI.mT), up_BOR.mT)
        return out + added_BTO.to(out.dtype).reshape(out.shape)


def modulated_layers(vla: Any, config: ModulatorConfig) -> dict[str, nn.Linear]:
    """The layers that get modulators, by name: all linear ones of bridge and head, and the attention and feed-forward
    of the backbone's language model if the configuration says so. ValueError where that has none."""
    found = {
        f"{part}.{name}": layer
        for part, module in (("bridge", vla.bridge), ("head", vla.head))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    if config.decoder:
        from vla.backbones.lora import LoRAConfig, lora_targets

        inside = [name for name in lora_targets(vla.backbone, LoRAConfig()) if "layers." in name]
        if not inside:
            raise ValueError("this backbone has no decoder layer for a modulator: leave the modulators in the bridge")
        found |= {f"backbone.{name}": vla.backbone.get_submodule(name) for name in inside}
    return found


def applied(vla: Any, chosen_B: Tensor | None) -> Any:
    """`Pool.applied` for a policy that may have no modulators: then there is nothing to choose, and nothing happens."""
    return nullcontext() if chosen_B is None else vla.pool.applied(chosen_B)


def frozen(vla: Any, batch_size: int) -> Any:
    """Within this, a policy computes what it did before it got modulators."""
    return applied(vla, None if vla.pool is None else torch.full((batch_size,), IDENTITY))
