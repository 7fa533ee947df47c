"""Tokenizer and word vectors of the backbone `small`, from SmolLM2-135M (the extra `smollm`).

How a word is used is in the model's own embedding table, what it means rather in its states: a linear classifier that
was trained on other words finds the colour of 39% of new colour words by the table, and of 51% by the states after 24
layers, asked for a synonym; what verbs do it finds by the table (74%, 66%), and both together are best
(docs/research-log.md). So a third of a vector is the table's, and two thirds are the states'; each reduced to its
principal components. Pieces of words have no states of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vla.backbones.smollm import load_decoder

ASK = "a synonym of {}: the word"
LAYER = 24
_BATCH = 48
PAD, END = "<|endoftext|>", "<|im_end|>"


def as_ours(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with padding as token 0, and the first word of a text spelled like any other."""
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    core.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END)


def whole_words(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Token ids that are a word of lower-case letters, with the word."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return {k: n[1:] for k, n in enumerate(names) if n.startswith("Ġ") and n[1:].isalpha() and n[1:].islower()}


@torch.no_grad()
def word_vectors(
    width: int,
    *,
    on_word: Callable[[int, int], None] | None = None,
    only: Collection[str] | None = None,
) -> tuple[Tensor, PreTrainedTokenizerFast]:
    """A table (V, width) of unit variance for every token, and the tokenizer. Takes minutes: the model runs once for
    every whole word, or for those of `only`. ValueError naming the extra when the model is missing."""
    decoder, tokenizer = load_decoder()
    words = {token: word for token, word in whole_words(tokenizer).items() if only is None or word in only}
    decoder.model.layers = decoder.model.layers[: LAYER + 1]  # the last layer's states would come out normalised
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for token, word in words.items():
        ids = tokenizer(ASK.format(word), add_special_tokens=False)["input_ids"]
        by_length.setdefault(len(ids), []).append((token, ids))
    found: dict[int, Tensor] = {}
    for same in by_length.values():
        for start in range(0, len(same), _BATCH):
            part = same[start : start + _BATCH]
            asked = torch.tensor([ids for _, ids in part])
            states = decoder.model(asked, output_hidden_states=True).hidden_states[LAYER][:, -1]
            states = torch.nn.functional.rms_norm(states.float(), states.shape[-1:])
            found |= dict(zip((token for token, _ in part), states, strict=True))
            if on_word:
                on_word(len(found), len(words))
    rows = decoder.get_input_embeddings().weight.float()
    used = width // 3
    table = torch.zeros(len(rows), width)
    table[:, :used] = _reduced(rows, used)
    if found:
        table[torch.tensor(list(found)), used:] = _reduced(torch.stack(list(found.values())), width - used)
    return table, as_ours(tokenizer)


def _reduced(vectors: Tensor, width: int) -> Tensor:
    """The first principal components (n, width), halfway to equal variance, of unit variance together."""
    centred = vectors - vectors.mean(0)
    found = min(width, *centred.shape)
    _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
    kept = (centred @ axes[:found].T) / spread[:found].clamp(min=1e-6).sqrt()
    return torch.nn.functional.pad(kept / kept.square().mean().sqrt(), (0, width - found))
