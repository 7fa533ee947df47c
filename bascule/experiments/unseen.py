"""Sentences that no training grammar contains (`benchmarks/words/unseen_sentences.toml`), filled for a scene."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from vla.core.config import decode
from vla.core.paths import ROOT

FILE = ROOT / "benchmarks" / "words" / "unseen_sentences.toml"
_SLOT = re.compile(r"\{\w+\}")
_SLOTS = (
    "color", "thing", "COLOR", "THING", "color_synonym", "thing_synonym", "color_typo", "thing_typo", "absent_color",
    "other_color",
)  # fmt: skip
_WORD = re.compile(r"[a-z]+")
Words = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Scene:
    """The words for what stands on the table: colours and kinds of the objects, and which of them is the target."""

    colors: tuple[str, ...]
    kinds: tuple[str, ...]
    target: int

    @property
    def others_colors(self) -> tuple[str, ...]:
        """Colours of the objects of other kinds, in which the target's kind does not stand there."""
        kind = self.kinds[self.target]
        own = {color for color, other in zip(self.colors, self.kinds, strict=True) if other == kind}
        return tuple(dict.fromkeys(color for color in self.colors if color not in own))


@dataclass(frozen=True)
class Unseen:
    """The file's sentences and tables, by the names that they have there."""

    common: tuple[str, ...]
    """Words that training may have, too."""
    color_synonyms: Words
    thing_synonyms: Words
    color_typos: Words
    thing_typos: Words
    present: Words
    """Group -> sentences that name an object of the scene."""
    absent: Words
    """Group -> sentences that name nothing in the scene."""

    def fits(self, sentence: str, scene: Scene) -> bool:
        """True if the sentence means the scene's target and nothing else: without a colour the target must be the only
        one of its kind, and another thing's colour must be that of no thing of the target's kind."""
        alone = scene.kinds.count(scene.kinds[scene.target]) == 1
        slots = set(_SLOT.findall(sentence))
        named = slots & {"{thing}", "{THING}", "{thing_synonym}", "{thing_typo}"}
        if "{other_color}" in slots:
            return not named or bool(scene.others_colors)
        return alone or not named or any("color" in slot.lower() for slot in slots)

    def fill(self, sentence: str, scene: Scene, draw: int) -> str:
        """The sentence for the scene's target; `draw` chooses among the synonyms and among the absent colours.
        ValueError for a colour or kind without words."""
        color, kind = scene.colors[scene.target], scene.kinds[scene.target]
        for word, table in ((color, self.color_synonyms), (kind, self.thing_synonyms)):
            if word not in table:
                raise ValueError(f"the unseen sentences have no words for {word!r}, only for {', '.join(table)}")
        nowhere = [name for name in self.color_synonyms if name not in scene.colors]
        words = {"color": (color,), "thing": (kind,), "COLOR": (color.upper(),), "THING": (kind.upper(),)}
        words |= {"color_synonym": self.color_synonyms[color], "thing_synonym": self.thing_synonyms[kind]}
        words |= {"color_typo": self.color_typos[color], "thing_typo": self.thing_typos[kind]}
        words |= {"absent_color": tuple(nowhere), "other_color": scene.others_colors}
        return sentence.format(**{name: options[draw % len(options)] for name, options in words.items() if options})

    def held_out(self, trained: Sequence[str]) -> frozenset[str]:
        """The words that no training grammar may have: all of this file, but for the common ones, those of the texts
        `trained`, and the slips of the pen, which chance may make as well."""
        groups = {**self.present, **self.absent}
        texts = [text for name, sentences in groups.items() if name != "typos" for text in sentences]
        for table in (self.color_synonyms, self.thing_synonyms):
            texts += [text for row in table.values() for text in row]
        return words_of(texts) - words_of(trained) - set(self.common)


def words_of(texts: Sequence[str]) -> frozenset[str]:
    """The words of the texts in small letters, slots left out."""
    return frozenset(word for text in texts for word in _WORD.findall(_SLOT.sub(" ", text).lower()))


def load_unseen(file: Path = FILE) -> Unseen:
    """The sentences in a file. ValueError where there is none, or something in it is missing, unknown or empty."""
    if not file.is_file():
        raise ValueError(f"there is no {file}: the word check needs a checkout of Bascule")
    try:
        found = decode(Unseen, tomllib.loads(file.read_text(encoding="utf-8")))
        for problem in _problems(found):
            raise ValueError(problem)
    except ValueError as problem:  # tomllib's errors are ValueErrors, too
        raise ValueError(f"{file.name}: {problem}") from None
    return found


def _unfit(sentence: str) -> str:
    """Why a sentence cannot be filled; "" where it can."""
    try:
        slots = [name for _, name, *_ in Formatter().parse(sentence) if name is not None]
    except ValueError as problem:
        return f"cannot be filled: {problem}"
    foreign = [name for name in slots if name not in _SLOTS]
    if foreign:
        return f"has a slot {{{foreign[0]}}}; known: {', '.join(_SLOTS)}"
    return "" if sentence.strip() else "is empty"


def _problems(unseen: Unseen) -> Iterator[str]:
    tables: Mapping[str, Any] = vars(unseen)
    for name, table in tables.items():
        if name != "common":
            yield from (f"{name}.{row} is empty" for row, texts in table.items() if not texts)
    for part, twin in (("color_typos", "color_synonyms"), ("thing_typos", "thing_synonyms")):
        if tables[part].keys() != tables[twin].keys():
            yield f"{part} and {twin} must have the same rows"
    sentences = [text for part in (unseen.present, unseen.absent) for group in part.values() for text in group]
    for text in sentences:
        if problem := _unfit(text):
            yield f"{text!r} {problem}"
    for group, texts in unseen.present.items():
        yield from (f"{text!r} in present.{group} names nothing" for text in texts if not _SLOT.search(text))
    yield from (f"{text!r} is there twice" for text in sorted(set(sentences)) if sentences.count(text) > 1)
