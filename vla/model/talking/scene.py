"""The things of a scene side by side: where each that has a name is seen, as keys and values that the decoder reads.

A question such as "what is left of the red cube" is about several things at once: which are there at all, and in which
order they stand. Each name's token therefore sees all others, and where the instruction points, before the decoder
reads any. For each question they are then compared with what it names, and with each other once more, and tell whether
the answer names them, and as which in turn: that is learnt from the answers, beside the words. The decoder reads what
comes of it. (Its layers are few, and pre-trained to point: it copies, but does not sort.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, LAYERS = 4, 2
TURNS = 4
"""The turns in which an answer may name a thing: not at all, first, second, later."""
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
        self.answering = nn.ModuleList(nn.TransformerEncoderLayer(width, **layer) for _ in range(LAYERS))
        self.relation = nn.Sequential(nn.Linear(2 * (places.stop - places.start), _RELATION), nn.GELU())
        self.related = nn.Linear(_RELATION, width)
        self.words = nn.Linear(width, width)
        self.turn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, TURNS))
        self.told_turn = nn.Linear(TURNS, width, bias=False)
        self.kept = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, reads))
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

    def seek(
        self, asked_BQF: Tensor, words_BQD: Tensor, things_BNF: Tensor, told_BF: Tensor, tokens_BND: Tensor
    ) -> Sought:
        """Find among the things what Q questions about each observation need. `words_BQD`: the mean of each question's
        words. Questions do not see each other."""
        at_BNP = torch.cat([things_BNF, told_BF[:, None]], 1)[..., self._places]
        apart_BQNP = at_BNP[:, None] - asked_BQF[..., None, self._places]
        relation = self.relation(torch.cat([apart_BQNP, (_SHARP * apart_BQNP).tanh()], -1))
        question = self.asked(asked_BQF) + self.words(words_BQD)
        among = tokens_BND[:, None] + self.related(relation) + question[:, :, None]
        compared = torch.cat([question[:, :, None], among], 2).flatten(0, 1)
        for layer in self.answering:
            compared = layer(compared)
        compared = compared.unflatten(0, question.shape[:2])
        turn_BQNR = self.turn(compared[:, :, 1:-1])
        among = compared[:, :, 1:] + F.pad(self.told_turn(turn_BQNR.softmax(-1)), (0, 0, 0, 1))
        return Sought(self.found(compared[:, :, 0]), self.kept(among), turn_BQNR)


@dataclass
class Sought:
    """The finds for Q questions about each of B observations."""

    found_BQD: Tensor
    read_BQNK: Tensor
    """Keys and values of all layers for the N things that have names, and for what the instruction names."""
    turn_BQNR: Tensor
    """Logits of `TURNS` for each of the N things."""
