"""Where what words name is to be seen: a backbone that is told them points, as it does when it is told what to do.

Asked are the things that a policy has names for, and the question itself: "where is the red cube" points at the red
cube. Attention is causal and pictures come first, so that the decoder has read them once for all words. For each it
reads these and the queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from vla.backbones.families import Prompt, decoder_of
from vla.processing.text import plain_text

_FREQUENCIES = (0.5, 1.0, 2.0)


def seen_width(backbone: Any) -> int:
    """F: numbers that `look_for` tells."""
    looks = 0 if backbone.sharp is None else backbone.num_views * backbone.family.fine_channels
    return 2 * backbone.width + places_width(backbone) * (3 + 4 * len(_FREQUENCIES)) // 2 + looks


def places_width(backbone: Any) -> int:
    """Numbers of those that are coordinates in pictures: x and y for each naming query and view."""
    return 0 if backbone.pointer is None else len(backbone.naming) * backbone.num_views * 2


def text_tokens(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (N, T) of names or questions, padded with 0 on the left. ValueError for one without words."""
    rows = [tokenizer(plain_text(text, "signs"), add_special_tokens=False)["input_ids"] for text in texts]
    if empty := [text for text, row in zip(texts, rows, strict=True) if not row]:
        raise ValueError(f"names and questions must be words, got {empty[0]!r}")
    return padded(rows)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids (N, T) of texts, padded with 0 on the left."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[len(row) - len(tokens) :] = tokens
    return torch.from_numpy(ids)


@dataclass
class Looked:
    """The decoder's view of the pictures of B observations, kept to be asked about."""

    hidden_BSD: Tensor
    """Last states of everything in front of the instruction."""
    fine: Tensor
    """Features of all pictures (B, V, C, h, w), for `vla.backbones.pointer.SharpPointer`; empty without one."""
    after_AD: Tensor
    """Embeddings of the tokens between words and queries."""
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values (B, H, S, d) of everything in front of the instruction, by layer."""

    @staticmethod
    def at(backbone: Any, prompt: Prompt, hidden_BSD: Tensor, cache: DynamicCache) -> Looked:
        """Keep of a prefill, its input, last states, keys and values, what `look_for` reads."""
        front, end = backbone._prefix, -backbone.num_queries
        fine = prompt.fine
        if backbone.sharp is None or fine is None:
            fine = hidden_BSD.new_zeros(len(hidden_BSD) * backbone.num_views, 0)
        after = prompt.embeds_BSD[0, end - len(backbone.layout.after) : end]
        layers = [(layer.keys[:, :, :front], layer.values[:, :, :front]) for layer in cache.layers]
        return Looked(hidden_BSD[:, :front], fine.unflatten(0, (-1, backbone.num_views)), after, layers)

    def select(self, index: Tensor) -> Looked:
        """The observations in `index`."""
        layers = [(keys[index], values[index]) for keys, values in self.layers]
        return Looked(self.hidden_BSD[index], self.fine[index], self.after_AD, layers)


@torch.no_grad()
def look_for(backbone: Any, looked: Looked, ids_BNT: Tensor) -> Tensor:
    """Tell where N texts about each of B observations point, (B, N, F) float32 (`told`). `ids_BNT` are padded with 0 on
    the left."""
    (b, n, length), front, q = ids_BNT.shape, looked.hidden_BSD.shape[1], backbone.num_queries
    cache = DynamicCache()
    for number, layer in enumerate(looked.layers):
        keys, values = (part.repeat_interleave(n, 0) for part in layer)
        cache.update(keys, values, number)
    ids_RT = ids_BNT.flatten(0, 1)
    said_RT = ids_RT > 0
    words_RTD = backbone.hear(ids_RT)
    after = looked.after_AD.to(words_RTD.dtype).expand(b * n, -1, -1)
    embeds = torch.cat([words_RTD, after, backbone.ask(words_RTD, said_RT)], 1)
    heard = F.pad(said_RT, (0, embeds.shape[1] - length), value=True)
    states = decoder_of(backbone.vlm, backbone.family)(
        inputs_embeds=embeds,
        attention_mask=F.pad(heard, (front, 0), value=True).long(),
        position_ids=backbone._next_position - 1 + heard.long().cumsum(1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -q:]
    return told(backbone, looked, states).unflatten(0, (b, n))


@torch.no_grad()
def told(backbone: Any, looked: Looked, states_RQD: Tensor) -> Tensor:
    """Tell what the queries have found (R, F), float32, from their states after the last layer, of equally many texts
    about each observation.

    That is the state of the query that names a thing, the mean of all queries' states, for each naming query and view
    where it points, how well that is to be seen, and waves of the place; and what is to be seen where the first of them
    points. (Told a name that nothing has, a backbone points at what is like it: what stands there is in the picture.)
    """
    naming, times = list(backbone.naming), len(states_RQD) // len(looked.hidden_BSD)
    summary = torch.stack([states_RQD[:, naming[0]], states_RQD.mean(1)], 1).float()
    parts = [F.layer_norm(summary, summary.shape[-1:])]
    if backbone.pointer is not None:
        image = looked.hidden_BSD.repeat_interleave(times, 0)
        points, coarse = backbone.point(image, states_RQD)
        if backbone.sharp is not None:
            points, _ = backbone.sharpen(looked.fine.flatten(0, 1), image, states_RQD, points, coarse)
        points = points[:, naming].float()
        xy = points[..., :2]
        waves = [wave(k * math.pi * xy) for k in _FREQUENCIES for wave in (torch.sin, torch.cos)]
        parts += [xy, points[..., 2:].sigmoid(), *waves]
        if backbone.sharp is not None:
            parts.append(_seen_at(looked.fine, xy[:, 0]))
    return torch.cat([part.flatten(1) for part in parts], 1)


def _seen_at(fine_BVChw: Tensor, xy_RV2: Tensor) -> Tensor:
    """The pictures' features (R, V, C), normalised, at places of equally many texts about each observation."""
    b, v = fine_BVChw.shape[:2]
    at_BVT2 = xy_RV2.unflatten(0, (b, -1)).transpose(1, 2)
    found = F.grid_sample(fine_BVChw.flatten(0, 1).float(), at_BVT2.flatten(0, 1)[:, :, None], align_corners=False)
    found_RVC = found[..., 0].unflatten(0, (b, v)).permute(0, 3, 1, 2).flatten(0, 1)
    return F.layer_norm(found_RVC, found_RVC.shape[-1:])
