"""Word vectors of the backbone `small`, from SmolLM2-135M (the extra `smollm`).

How a word is used is in the model's own embedding table, what it means rather in its states: a linear classifier that
was trained on other words finds the colour of 43% of new colour words by the table and of 54% by the states after 28
layers, asked what a synonym is and what such a thing looks like; the kind of thing of 41% and 60%
(docs/research-log.md). So a third of a vector is the table's, and two thirds are the states'; each reduced to its
principal components. Pieces of words have no states of their own. Behind these are the scores of `word_meaning`, if
the dictionaries are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from vla.backbones.small.vocabulary import lower_case, whole_words
from vla.backbones.small.word_meaning import word_meaning
from vla.backbones.smollm import load_decoder

ASK = ("a synonym of {} is", "an object that looks like a {} is a")
LAYER = 28
_BATCH = 48


@torch.no_grad()
def word_vectors(
    width: int,
    *,
    on_word: Callable[[int, int], None] | None = None,
    only: Collection[str] | None = None,
    dictionaries: Path | None = None,
) -> tuple[Tensor, PreTrainedTokenizerFast]:
    """A table (V, width) of unit variance for every token, and the tokenizer. Takes minutes: the model runs for every
    whole word, or for those of `only`. With `dictionaries`, a folder with WordNet's folder `dict` and Moby's
    `words.txt`, the table is wider by the scores of every word's meaning. ValueError naming the extra when the model is
    missing, and the package of a dictionary that is."""
    decoder, theirs = load_decoder()
    tokenizer, spelled = lower_case(theirs)
    words = {token: word for token, word in whole_words(tokenizer).items() if only is None or word in only}
    decoder.model.layers = decoder.model.layers[: LAYER + 1]  # the last layer's states would come out normalised
    rows = decoder.get_input_embeddings().weight.float()
    rows = torch.stack([rows[torch.tensor(ids)].mean(0) for ids in spelled])
    used = width // 3
    table = torch.zeros(len(rows), width)
    table[:, :used] = _reduced(rows, used)
    meant = torch.zeros(len(words), rows.shape[1])
    for k, ask in enumerate(ASK):
        told = (lambda n, k=k: on_word(k * len(words) + n, len(ASK) * len(words))) if on_word else None
        states = _last_states(decoder, theirs, [ask.format(word) for word in words.values()], told)
        states -= states.mean(0)
        meant += states / states.square().mean().sqrt().clamp(min=1e-6)
    at = torch.tensor(list(words), dtype=torch.int64)
    table[at, used:] = _reduced(meant, width - used)
    if dictionaries is not None:
        scores = word_meaning(list(words.values()), rows[at], meant, dictionaries / "dict", dictionaries / "words.txt")
        table = torch.nn.functional.pad(table, (0, scores.shape[1]))
        table[at, width:] = scores
    return table, tokenizer


def _last_states(
    decoder: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    on_text: Callable[[int], None] | None,
) -> Tensor:
    """States (n, D) after `LAYER` layers at the last token of each text, each of unit variance."""
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for k, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []):
        by_length.setdefault(len(ids), []).append((k, ids))
    found, done = torch.zeros(len(texts), decoder.config.hidden_size), 0
    for same in by_length.values():
        for start in range(0, len(same), _BATCH):
            part = same[start : start + _BATCH]
            asked = torch.tensor([ids for _, ids in part])
            states = decoder.model(asked, output_hidden_states=True).hidden_states[LAYER][:, -1].float()
            found[torch.tensor([k for k, _ in part])] = torch.nn.functional.rms_norm(states, states.shape[-1:])
            done += len(part)
            if on_text:
                on_text(done)
    return found


def _reduced(vectors: Tensor, width: int) -> Tensor:
    """The first principal components (n, width), halfway to equal variance, of unit variance together."""
    centred = vectors - vectors.mean(0)
    found = min(width, *centred.shape)
    _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
    kept = (centred @ axes[:found].T) / spread[:found].clamp(min=1e-6).sqrt()
    return torch.nn.functional.pad(kept / kept.square().mean().sqrt(), (0, width - found))
