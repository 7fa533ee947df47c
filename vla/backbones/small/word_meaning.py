"""Scores of a word's meaning: how much it is like the names of each colour and of each kind of thing.

A word that training has not heard has no place in a network's memory, but its neighbours have. A linear classifier
(ridge regression with a kernel) learns from the words of `vla.language` what the names of a colour, of a kind, of
things that are never there, and of nothing in particular have in common: in the language model's table and states, in
WordNet's definitions and in Moby's lists of synonyms. Its scores for every word are columns of the word table.

The scores of the words that it learnt from come from classifiers that did not learn them: what reads the table finds
them just as uncertain as those of a new word, and trusts them as far as they are right (stacked generalisation, Wolpert
1992).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.backbones.small.dictionaries import WordNet, read_moby, read_wordnet
from vla.language.names import ABSENT_THINGS, COLORED, COLORS, NEUTRAL_LOOKS, NEUTRAL_THINGS, THINGS
from vla.language.paraphrase import same_kind
from vla.language.words import VOCABULARY

FOLDS, RIDGE = 10, 0.3
_NEARLY = {"dish": "bowl", "tray": "box", "bin": "box", "spot": "zone", "switch": "button"}
"""Kinds that share most of their names with another one's."""
Floats = NDArray[np.float64]


def classes() -> dict[str, tuple[str, ...]]:
    """Class -> its names, of one word each: colours, kinds of things, and three more. A word may be in several."""
    found: dict[str, list[str]] = {}
    for color, names in COLORS.items():
        found[color] = [color, *names, *COLORED.get(color, ())]
    for thing, names in THINGS.items():
        kind = same_kind(thing)
        found.setdefault("a " + _NEARLY.get(kind, kind), []).extend((thing, *names))
    found["absent"] = list(ABSENT_THINGS)
    found["neutral"] = [*NEUTRAL_THINGS, *NEUTRAL_LOOKS]
    told = {word for names in found.values() for word in names}
    found["frame"] = sorted(VOCABULARY - told)
    return {name: tuple(dict.fromkeys(w for w in names if re.fullmatch("[a-z]+", w))) for name, names in found.items()}


def word_meaning(words: Sequence[str], table: Tensor, states: Tensor, wordnet: Path, moby: Path) -> Tensor:
    """(words, classes) scores of unit variance over the words of `classes`.

    `table` (words, D) and `states` (words, D) of the language model; `wordnet` and `moby`: the dictionaries' folder and
    file. ValueError where one is missing.
    """
    row = {word: k for k, word in enumerate(words)}
    known = {name: [row[word] for word in names if word in row] for name, names in classes().items()}
    taught = sorted({k for rows in known.values() for k in rows})
    dictionary = read_wordnet(wordnet)
    kernel = np.zeros((len(words), len(taught)))
    for part in (table, states, _definitions(words, table, dictionary)):
        kernel += _alike(_standard(part.double().numpy(), taught), taught)
    kernel += _synonyms(words, row, taught, dictionary, moby)
    kernel /= kernel[taught, range(len(taught))].mean()
    at = {k: place for place, k in enumerate(taught)}
    target = np.zeros((len(taught), len(known)))
    for column, rows in enumerate(known.values()):
        target[[at[k] for k in rows], column] = 1
    scores = torch.from_numpy(_scores(kernel, taught, target))
    return (scores / scores[taught].square().mean().sqrt()).float()


def _scores(kernel: Floats, taught: Sequence[int], target: Floats) -> Floats:
    """Scores of all words; those of the taught ones by a classifier that did not learn them."""
    size = target.sum(0).clip(min=1)
    weight = (target / size).sum(1) / (target > 0).sum(1)  # a small class counts as much as a large one
    weight /= weight.mean()
    centred = target - target.mean(0)
    own = kernel[taught]

    def fitted(rows: NDArray[np.int64]) -> Floats:
        return np.linalg.solve(own[np.ix_(rows, rows)] + RIDGE * np.diag(1 / weight[rows]), centred[rows])

    every = np.arange(len(taught))
    found = kernel @ fitted(every)
    fold = np.random.default_rng(0).permutation(every) % FOLDS
    for k in range(FOLDS):
        rest = every[fold != k]
        mine = every[fold == k]
        found[np.array(taught)[mine]] = own[np.ix_(mine, rest)] @ fitted(rest)
    return found


def _standard(values: Floats, taught: Sequence[int]) -> Floats:
    """Centred on the taught words, which have a mean square of 1."""
    values = values - values[taught].mean(0)
    return values / np.sqrt((values[taught] ** 2).mean()).clip(1e-6)


def _alike(values: Floats, taught: Sequence[int]) -> Floats:
    """Likeness (words, taught), the mean product of the numbers of two rows of `values` (words, D)."""
    return values @ values[taught].T / values.shape[1]


def _definitions(words: Sequence[str], table: Tensor, dictionary: WordNet) -> Tensor:
    """(words, D) mean vector of the words that a dictionary explains each word with, the rare ones first; 0 without."""
    often, total = dictionary.frequencies(), len(dictionary.definitions)
    row = {word: k for k, word in enumerate(words)}
    centred = table.double() - table.double().mean(0)
    found = torch.zeros_like(centred)
    for k, word in enumerate(words):
        known = {term: weight for term, weight in dictionary.told(word).items() if term in row}
        told = {row[term]: weight * np.log(total / (1 + often[term])) for term, weight in known.items()}
        if told:
            found[k] = torch.tensor(list(told.values())).double() @ centred[list(told)]
            found[k] /= found[k].norm().clamp(min=1e-6)
    return found


def _synonyms(
    words: Sequence[str], row: Mapping[str, int], taught: Sequence[int], dictionary: WordNet, moby: Path
) -> Floats:
    """Likeness (words, taught), without unit and of mean 1 for a taught word with itself, of the lists of synonyms that
    words are in. A word that is in no list is looked up without its ending."""
    lists = read_moby(moby, row)
    has = set(lists.indices()[0].tolist())
    base = [k if k in has else row.get(dictionary.base(word) or word, k) for k, word in enumerate(words)]
    lists = lists.index_select(0, torch.tensor(base))
    known = lists.index_select(0, torch.tensor(taught)).to_dense()
    mean = known.mean(0)
    both, along = (torch.sparse.mm(lists, other).numpy() for other in (known.T, mean[:, None]))
    kernel = both - along - along[taught].T + float(mean @ mean)
    return kernel / kernel[taught, range(len(taught))].mean()
