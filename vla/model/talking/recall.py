"""The part of a frozen decoder's work on an observation that talking reads, to be kept while it learns to talk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from vla.model.talking.talker import Heard


def kept(heard: Heard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep of one observation, without padding: things (N, F), what the instruction names (F,), the mean of the
    instruction's words (D,), and keys and values (T, L, 2, H, d) of instruction and queries. All are float16."""
    assert heard.things_BNF is not None and heard.told_BF is not None
    layers = [torch.stack([layer.keys[0], layer.values[0]], 1) for layer in heard.cache.layers]  # (H, 2, T, d) each
    read = torch.stack(layers).permute(3, 0, 2, 1, 4)
    parts = (heard.things_BNF[0], heard.told_BF[0], heard.said_BD[0], read)
    return tuple(part.half() for part in parts)  # type: ignore[return-value]


def recalled(backbone: Any, rows: Sequence[tuple[Tensor, ...]], proprio_BP: Tensor) -> Heard:
    """The prefill of B observations of which each row was `kept`; sequences are padded on the left."""
    longest, device = max(len(row[3]) for row in rows), proprio_BP.device
    reads = [F.pad(row[3].float(), (0, 0, 0, 0, 0, 0, 0, 0, longest - len(row[3]), 0)) for row in rows]
    read_LKBHTd = torch.stack(reads).permute(2, 3, 0, 4, 1, 5).to(device)
    cache = DynamicCache()
    for number, (keys, values) in enumerate(read_LKBHTd):
        cache.update(keys.contiguous(), values.contiguous(), number)
    lengths = torch.tensor([len(row[3]) for row in rows], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    things, told, said = (torch.stack([row[part].float() for row in rows]).to(device) for part in range(3))
    last = backbone._next_position - 1 + lengths
    return Heard(cache, mask, last, proprio_BP, said, things_BNF=things, told_BF=told)
