"""Tokenizer of the backbone `small`: SmolLM2's, without what no instruction has, and with more whole words.

Instructions are read in lower case (`vla.processing.text`), so tokens with capitals, of program code and of layout go.
In come words of the physical world that SmolLM2 spells in pieces (`words.txt`; source: the weights' NOTICE.md):
things, stuffs, shapes, colours and other qualities, and what hands do. A word of one token has one vector for its
meaning.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<|endoftext|>", "<|im_end|>"
_SPECIAL = 3
"""SmolLM2's first tokens, which are no text."""
_START = "Ġ"
"""A space in front, as byte-level tokenizers write it."""


def more_words() -> list[str]:
    """Words that get a token of their own, sorted."""
    return Path(__file__).with_name("words.txt").read_text().split()


def lower_case(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedTokenizerFast, list[list[int]]]:
    """A tokenizer of lower-case text with padding as token 0, and for each of its tokens those of SmolLM2's tokenizer
    that spell it: one, or for the added words their pieces."""
    spelled = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spelled["model"]
    by_id = sorted(model["vocab"], key=model["vocab"].get)
    kept = [t for k, t in enumerate(by_id) if k < _SPECIAL or _of_instructions(t)]
    known = set(kept)
    added = [_START + word for word in more_words() if _START + word not in known]
    old = [[model["vocab"][token]] for token in kept]
    old += [tokenizer(token.replace(_START, " "), add_special_tokens=False)["input_ids"] for token in added]
    model["vocab"] = {token: k for k, token in enumerate(kept + added)}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= known]
    model["ignore_merges"] = True  # a word of the vocabulary is one token, however it could be spelled
    spelled["added_tokens"] = [token for token in spelled["added_tokens"] if token["id"] < _SPECIAL]
    core = Tokenizer.from_str(json.dumps(spelled))
    # The first word of a text is spelled like any other.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    core.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END), old


def whole_words(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Token ids that are a word of the letters a to z, with the word."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return {k: n[1:] for k, n in enumerate(names) if n.startswith(_START) and re.fullmatch("[a-z]+", n[1:])}


_DECODER = decoders.ByteLevel()


def _of_instructions(token: str) -> bool:
    """Words and parts of words in lower case, single characters, and bytes of others."""
    text = _DECODER.decode([token]).removeprefix(" ")
    return len(text) <= 1 or "\ufffd" in text or (text.isalpha() and text.islower())
