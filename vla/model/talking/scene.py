"""The things of a scene side by side: where each that has a name is seen, as keys and values that the decoder reads.

A question such as "what is left of the red cube" is about several things at once: which are there at all, and in which
order they stand. Each name's token therefore sees all others, and where the instruction points, before the decoder
reads any; and the question finds its own thing among them before its first word is read. (The decoder's layers are few,
and pre-trained to point.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HEADS, LAYERS = 4, 2
_RELATION = 48
_SHARP = 8.0
"""Gain at which a distance in pictures, whose side is 2, is told as a side: a tenth of it is clearly left or right."""


class Scene(nn.Module):
    """Tokens of named things that have seen each other, and what a question finds among them."""

    def __init__(self, seen: int, places: slice, width: int, reads: int) -> None:
        """`seen`: F, numbers that looking tells (`vla.model.talking.things.look_for`), `places` those that are
        coordinates; `width`: D; `reads`: numbers of a token's keys and values in all layers of the decoder."""
        super().__init__()
        self._places = places
        self.thing = nn.Sequential(
            nn.Linear(seen + places.stop - places.start, width), nn.GELU(), nn.Linear(width, width)
        )
        self.told = nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))
        self.asked = nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))
        layer: dict[str, Any] = {
            "nhead": HEADS, "dim_feedforward": 2 * width, "dropout": 0.0, "activation": "gelu", "batch_first": True,
            "norm_first": True,
        }  # fmt: skip
        self.among = nn.ModuleList(nn.TransformerEncoderLayer(width, **layer) for _ in range(LAYERS))
        self.find = nn.ModuleList(nn.TransformerDecoderLayer(width, **layer) for _ in range(LAYERS))
        self.relation = nn.Sequential(nn.Linear(2 * (places.stop - places.start), _RELATION), nn.GELU())
        self.related = nn.Linear(_RELATION, width)
        self.kept = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, reads))
        self.kept_relation = nn.Linear(_RELATION, reads, bias=False)
        self.found = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, names_ND: Tensor, things_BNF: Tensor, told_BF: Tensor, start_BD: Tensor) -> Tensor:
        """Tokens (B, N + 1, D) of the things and of what the instruction names. `names_ND`: the names' words;
        `start_BD`: the state and the instruction's words."""
        apart_BNP = things_BNF[..., self._places] - told_BF[:, None, self._places]
        things_BND = names_ND + self.thing(torch.cat([things_BNF, apart_BNP], -1))
        tokens = torch.cat([things_BND, self.told(told_BF)[:, None]], 1) + start_BD[:, None]
        for layer in self.among:
            tokens = layer(tokens)
        return tokens

    def seek(self, asked_BQF: Tensor, things_BNF: Tensor, told_BF: Tensor, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Find among the things what Q questions about each observation need: (B, Q, D), and keys and values of all
        layers (B, Q, N + 1, K), which tell how far each thing is from what the question names. Questions do not see
        each other."""
        at_BNP = torch.cat([things_BNF, told_BF[:, None]], 1)[..., self._places]
        apart_BQNP = at_BNP[:, None] - asked_BQF[..., None, self._places]
        relation = self.relation(torch.cat([apart_BQNP, (_SHARP * apart_BQNP).tanh()], -1))
        read = self.kept(tokens_BND)[:, None] + self.kept_relation(relation)
        among = (tokens_BND[:, None] + self.related(relation)).flatten(0, 1)
        finds = self.asked(asked_BQF).flatten(0, 1)[:, None]
        for layer in self.find:
            finds = layer(finds, among)
        return self.found(finds)[:, 0].unflatten(0, asked_BQF.shape[:2]), read
