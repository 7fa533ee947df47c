"""The embedded default backbone: a real (and really small) vision-language model made of `transformers` classes.

A LLaVA (Liu et al. 2023): SigLIP vision tower, two-layer projector, Llama decoder, with its own tokenizer. It trains
from scratch on a laptop (`vla pretrain`) and loads through the same auto classes as its big relatives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from vla.backbones.light_import import light_import

with light_import():
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
        SiglipVisionConfig,
    )
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PAD, END, IMAGE = "<pad>", "<end>", "<image>"
IMAGE_SIZE, PATCH_SIZE = 84, 12


def train_tokenizer(corpus: Iterable[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `corpus`: every frequent word is one token, and any other text is still spelled in bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return _finished(tokenizer)


def add_words(tokenizer: PreTrainedTokenizerFast, words: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer with byte pairs added until each of `words` is one token.

    They come after all others, so that what the old pairs joined to one token stays that token.
    """
    for word in words:
        pieces = tokenizer.tokenize(word)
        if len(pieces) == 1:
            continue
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        vocab, merges = state["model"]["vocab"], state["model"]["merges"]
        while len(pieces) > 1:
            merges.append(pieces[:2])
            pieces = ["".join(pieces[:2]), *pieces[2:]]
            vocab.setdefault(pieces[0], len(vocab))
        tokenizer = _finished(Tokenizer.from_str(json.dumps(state)))
    return tokenizer


@torch.no_grad()
def learn_words(backbone: Any, words: Iterable[str]) -> None:
    """Make one token of every word that a backbone of ours spells in pieces so far. Nothing changes for the others.

    A new word's embedding starts in the direction of the mean of its pieces, with the length of those already learnt.
    """
    before, after = backbone.tokenizer, add_words(backbone.tokenizer, words)
    if len(after) == len(before):
        return
    old = backbone.vlm.model.get_input_embeddings().weight.clone()
    backbone.vlm.resize_token_embeddings(len(after), mean_resizing=False)
    rows = backbone.vlm.model.get_input_embeddings().weight
    # Pieces that were never used keep their large random start: only a median tells how long the words are.
    names = before.convert_ids_to_tokens(list(range(len(before))))
    length = old[[i for i, name in enumerate(names) if name.startswith("Ġ") and len(name) > 3]].norm(dim=1).median()
    for i in range(len(before), len(after)):
        mean = old[before(after.decode([i]).strip(), add_special_tokens=False)["input_ids"]].mean(0)
        rows[i] = mean * (length / mean.norm())
    backbone.tokenizer = after


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def tiny_config(vocab_size: int) -> LlavaConfig:
    """Shapes chosen for two CPU cores: 49 patches a view, 3 + 4 layers, 2.0 M
    parameters; explicit attention, because the CPU's fused attention is slow backward."""
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )
    text = LlamaConfig(
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        attn_implementation="bascule_lean",
    )


def build_tiny(vocab_size: int, seed: int = 0) -> LlavaForConditionalGeneration:
    """A randomly initialised tiny VLM."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return use_linear_patches(LlavaForConditionalGeneration(tiny_config(vocab_size)))


class _LinearPatches(nn.Conv2d):
    """A patch embedding (kernel = stride) computed as one matrix product, with the same parameters."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Image (B, C, H, W) -> patch embeddings (B, D, rows, columns). Pixels beyond whole patches are dropped."""
        b, c, h, w = image_BCHW.shape
        kh, kw = self.kernel_size
        rows, columns = h // kh, w // kw
        patches = image_BCHW[:, :, : rows * kh, : columns * kw].reshape(b, c, rows, kh, columns, kw)
        flat = patches.permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * kh * kw)
        out = F.linear(flat, self.weight.reshape(self.out_channels, -1), self.bias)
        return out.transpose(1, 2).reshape(b, self.out_channels, rows, columns)


def use_linear_patches(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Swap a vision tower's patch convolution for `_LinearPatches`, keeping its parameters."""
    for module in model.modules():
        conv = getattr(module, "patch_embedding", None)
        if type(conv) is nn.Conv2d and conv.kernel_size == conv.stride and conv.padding in ("valid", (0, 0)):
            conv.__class__ = _LinearPatches
    return model


def lean_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Explicit softmax(q k^T) v for `transformers`' attention interface, in the inputs' own precision.

    The library's eager version turns every score into float32 and back, which on a CPU costs more than the products.
    """
    with torch.autocast(query.device.type, enabled=False):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # Under autocast the rotation may have promoted q and k; v tells the precision that was asked for.
        query, key = query.to(value.dtype), key.to(value.dtype)
        scores = torch.matmul(query * scale, key.transpose(-1, -2))
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[-2]].to(scores.dtype)
        out = torch.matmul(scores.softmax(-1), value)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("bascule_lean", lean_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("bascule_lean", eager_mask)
