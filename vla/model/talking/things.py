"""Where the things that a policy has words for are to be seen: its backbone is told each of their names in turn, and
its queries point.

Attention is causal and pictures come first, so that the decoder has read them once for all names. For each it reads a
word or three and the queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from vla.backbones.families import Prompt, decoder_of
from vla.processing.text import plain_text

_FREQUENCIES = (0.5, 1.0, 2.0)


def things_width(backbone: Any) -> int:
    """F: numbers that `look_for` tells of each name."""
    places = len(backbone.naming) * backbone.num_views * (3 + 4 * len(_FREQUENCIES))
    return 2 * backbone.width + (0 if backbone.pointer is None else places)


def name_tokens(tokenizer: Any, names: Sequence[str]) -> Tensor:
    """The names' token ids (N, T), padded with 0 on the left. ValueError for one without words."""
    rows = [tokenizer(plain_text(name, "signs"), add_special_tokens=False)["input_ids"] for name in names]
    if empty := [name for name, row in zip(names, rows, strict=True) if not row]:
        raise ValueError(f"talk.names must be words, got {empty[0]!r}")
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[len(row) - len(tokens) :] = tokens
    return torch.from_numpy(ids)


@torch.no_grad()
def look_for(backbone: Any, prompt: Prompt, read: DynamicCache, hidden_BSD: Tensor, ids_NT: Tensor) -> Tensor:
    """Tell what the backbone makes of each name in each of B observations, (B, N, F) float32.

    That is the state of the query that names a thing, the mean of all queries' states, and for each naming query and
    view where it points, how well that is to be seen, and waves of the place.
    `prompt`, `read` and `hidden_BSD` are of the prefill: its input, keys and values, and last states.
    """
    b, n, front, q = len(prompt.mask_BS), len(ids_NT), backbone._prefix, backbone.num_queries
    cache = DynamicCache()
    for number, layer in enumerate(read.layers):
        keys, values = (part[:, :, :front].repeat_interleave(n, 0) for part in (layer.keys, layer.values))
        cache.update(keys, values, number)
    said_NT = ids_NT > 0
    words_NTD = backbone.hear(ids_NT)
    after = prompt.embeds_BSD[:1, -q - len(backbone.layout.after) : -q].expand(n, -1, -1)
    embeds = torch.cat([words_NTD, after.to(words_NTD.dtype), backbone.ask(words_NTD, said_NT)], 1).repeat(b, 1, 1)
    seen = torch.ones(b * n, front, dtype=torch.bool, device=ids_NT.device)
    told = F.pad(said_NT, (0, embeds.shape[1] - ids_NT.shape[1]), value=True).repeat(b, 1)
    states = decoder_of(backbone.vlm, backbone.family)(
        inputs_embeds=embeds,
        attention_mask=torch.cat([seen, told], 1).long(),
        position_ids=backbone._next_position - 1 + told.long().cumsum(1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -q:]
    naming = list(backbone.naming)
    summary = torch.stack([states[:, naming[0]], states.mean(1)], 1).float()
    parts = [F.layer_norm(summary, summary.shape[-1:]).flatten(1)]
    if backbone.pointer is not None:
        image = hidden_BSD[:, :front].repeat_interleave(n, 0)
        points, coarse = backbone.point(image, states)
        if backbone.sharp is not None:
            points, _ = backbone.sharpen(prompt.fine, image, states, points, coarse)
        points = points[:, naming].float()
        xy = points[..., :2]
        waves = [wave(k * math.pi * xy) for k in _FREQUENCIES for wave in (torch.sin, torch.cos)]
        parts.append(torch.cat([xy, points[..., 2:].sigmoid(), *waves], -1).flatten(1))
    return torch.cat(parts, 1).unflatten(0, (b, n))
