"""Instruction -> the words that a policy reads, and their tokens: one rule for training, serving and LeRobot's tools.

Letter case, spacing and punctuation are how an instruction is written down; signs, numbers and symbols are what it
says. No torch here: exported policies tokenise, too.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from vla.core.invented import words_are_invented

TextRule = Literal["words", "signs"]
"""words: letters and digits only, as all policies read before there was a choice. signs: what means something, too."""

MOST_TOKENS = 512
"""Longest instruction that any policy reads: attention takes memory with the square of it."""

_CHARACTERS_PER_TOKEN = 64
"""More than any word has: a text is cut at this times the limit before it is tokenised."""
_RUN_TOGETHER = 6
"""No word that a tokenizer knows has so many pieces."""
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character: what is left of bytes that are no UTF-8, or of a text cut in the middle of an emoji."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
"""A terminal's colours, copied with the words."""
_SHOWN = 60
_SYMBOLS = "some of its symbols"

_BETWEEN_DIGITS = ".,:/*"
"""Part of the number when a digit stands on both sides: 1.5, 1,000, 12:30, 1/2, 2*3."""
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"
_READ_PUNCTUATION = "%‰"
_SAID_ALOUD = re.compile(r"[.,;:!?'\"“”‘’()\[\]{}…_-]+")


def plain_text(instruction: str, rule: TextRule = "words") -> str:
    """Lower case, single spaces, no punctuation: how instructions are written down does not matter.

    `signs` keeps what tells instructions apart: minus and plus (each a word), decimals, other symbols such as < % ° or
    emoji, and combining marks; text is brought into Unicode's composed form (NFC) first. Plain words come out alike.
    """
    if rule == "words":
        return " ".join(re.sub(r"[^\w\s]|_", " ", instruction.lower()).split())
    instruction = unicodedata.normalize("NFC", _COLOURS.sub(" ", instruction))
    text = unicodedata.normalize("NFC", instruction.lower())
    text = "".join(c for c in text if not _invisible(c))
    kept: list[str] = []
    for place, c in enumerate(text):
        kept.append(_kept(text, place, c, after_word=bool(kept) and not kept[-1].endswith(" ")))
    return " ".join("".join(kept).split())


def tokens_of(instruction: Any, tokenizer: Any, *, rule: TextRule, limit: int) -> tuple[int, ...]:
    """Token ids of an instruction, at most `limit` of them. Logs what `read` remarks: each text that is cut, and each
    word that is only spelled, once in a process.

    ValueError for what is no text or says nothing.
    """
    found = read(instruction, tokenizer, rule=rule, limit=limit)
    if _unheard.get() or words_are_invented():
        return found.tokens
    if found.cut_after is not None:
        warn_of_cut([instruction], limit)
    if found.unknown:
        _log.warning("%s", _lacks(found.unknown, instruction))
    if fresh := [word for word in found.spelled if word not in _told_before]:
        before = len(_told_before)
        _remember(*fresh)
        if before < _MOST_WARNED:
            _log.warning("%s", _spells(fresh, instruction))
            if len(_told_before) >= _MOST_WARNED:  # training that paraphrases makes slips of the pen without end
                _log.warning("more words that the backbone only spells are not told")
    return found.tokens


@contextmanager
def made_up() -> Iterator[None]:
    """Inside, `tokens_of` remarks nothing: these instructions are nobody's words."""
    before = _unheard.set(True)
    try:
        yield
    finally:
        _unheard.reset(before)


@dataclass(frozen=True)
class Reading:
    """An instruction as a policy reads it."""

    tokens: tuple[int, ...]
    cut_after: int | None
    """The number of tokens that are read, where there are more; None for an instruction that is read to its end."""
    unknown: tuple[str, ...]
    """The words for which a tokenizer without bytes has only its token for unknown ones."""
    spelled: tuple[str, ...]
    """The words that the tokenizer only spells: no training has shown what they mean, unless it used them."""


def read(instruction: Any, tokenizer: Any, *, rule: TextRule, limit: int) -> Reading:
    """The first `limit` tokens of an instruction, and what a person should be told about it. ValueError for what is no
    text or says nothing."""
    if not isinstance(instruction, str):
        raise ValueError(f"an instruction must be text, got {type(instruction).__name__}")
    most = limit * _CHARACTERS_PER_TOKEN
    text = plain_text(instruction[:most], rule)
    if not text:
        raise ValueError(f"an instruction must say something, got {shortened(instruction)}: no word, number or symbol")
    if (broken := _SURROGATE.search(instruction)) is not None:
        raise ValueError(
            f"an instruction must be text, {shortened(instruction)} has a broken character ({broken[0]!r}): it was not "
            "read as UTF-8"
        )
    tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    cut = len(tokens) > limit or bool(instruction[most:].strip())
    words = list(dict.fromkeys(text.split()))
    unknown, spelled, nothing = [], [], getattr(tokenizer, "unk_token_id", None)
    if nothing is not None and nothing in tokens:
        unknown = [word for word in words if nothing in _ids(tokenizer, word)] or [_SYMBOLS]
    if len(tokens) > len(text.split()):
        spelled = [word for word in words if _is_spelled(word, len(_ids(tokenizer, word)))]
    return Reading(tokens[:limit], limit if cut else None, tuple(unknown), tuple(spelled))


def remarks(instruction: str, found: Reading) -> tuple[str, ...]:
    """One line for each thing about an instruction that a person should be told: cut, or words without a meaning."""
    lines = []
    if found.cut_after is not None:
        lines.append(_cut([instruction], found.cut_after))
    if found.unknown:
        lines.append(_lacks(found.unknown, instruction))
    if found.spelled:
        lines.append(_spells(found.spelled, instruction))
    return tuple(lines)


def warn_of_cut(instructions: Sequence[str], limit: int) -> None:
    """Log in one line which instructions have more than `limit` tokens, of which the first are read; each once in a
    process."""
    if fresh := [text for text in instructions if text not in _told_before]:
        _remember(*fresh)
        _log.warning("%s", _cut(fresh, limit))


def _remember(*texts: str) -> None:
    """A server may be sent any number of texts."""
    if len(_told_before) > _MOST_TOLD:
        _told_before.clear()
    _told_before.update(texts)


def _cut(instructions: Sequence[str], limit: int) -> str:
    named = ", ".join(shortened(text) for text in instructions[:_PAIRS_NAMED])
    more = f" and {len(instructions) - _PAIRS_NAMED} more" if len(instructions) > _PAIRS_NAMED else ""
    which = "the instruction" if len(instructions) == 1 else "the instructions"
    return f"{which} {named}{more} cut after {limit} tokens, all that the policy reads: say it in fewer words"


def _lacks(words: Sequence[str], instruction: str) -> str:
    named = ", ".join(word if word == _SYMBOLS else shortened(word) for word in words)
    return f"the policy's vocabulary lacks {named}, in the instruction {shortened(instruction)}"


def _spells(words: Sequence[str], instruction: str) -> str:
    named = ", ".join(map(shortened, words[:_PAIRS_NAMED])) + (" ..." if len(words) > _PAIRS_NAMED else "")
    means = "it means nothing unless training used it"
    return f"the backbone has no word for {named}: {means} (in the instruction {shortened(instruction)})"


def _is_spelled(word: str, pieces: int) -> bool:
    """True for a word of letters, or of a symbol, in pieces of less than two characters on average, or in so many that
    several words must have run together. Numbers are spelled by many tokenizers, and short words in two."""
    if any(c.isdigit() for c in word):
        return False
    symbol = not (word.isascii() or word[0].isalnum())  # an emoji, whose pieces are bytes
    return pieces >= _RUN_TOGETHER or (pieces >= (2 if symbol else 3) and 2 * pieces > len(word))


def room_for_text(
    instructions: Iterable[Any], tokenizer: Any, *, rule: TextRule, least: int, most: int = MOST_TOKENS
) -> int:
    """Tokens that a policy for these instructions must read: the longest one's, or `least` if that is more.

    Instructions are cut at `most` tokens (or at `least`, if that is more), and one warning says which.
    """
    limit, room, cut = max(least, most), least, []
    for text in dict.fromkeys(instructions):
        found = read(text, tokenizer, rule=rule, limit=limit)
        room = max(room, len(found.tokens))
        if found.cut_after is not None:
            cut.append(text)
    warn_of_cut(cut, limit)
    return room


def read_alike(instructions: Iterable[str], tokens: Callable[[str], Sequence[int]]) -> list[str]:
    """A line for every two different instructions that have the same tokens: the policy cannot tell them apart.

    Differences of letter case, spaces and sentence punctuation are no differences.
    """
    first: dict[tuple[int, ...], str] = {}
    lines = []
    for text in sorted(set(instructions)):
        other = first.setdefault(tuple(tokens(text)), text)
        if plain_text(other, "signs") != plain_text(text, "signs") or _spoken(other) != _spoken(text):
            lines.append(
                f"the policy cannot tell the instructions {shortened(other)} and {shortened(text)} apart: they have "
                "the same tokens; write the difference in words"
            )
    return lines


def warn_of_lookalikes(instructions: Iterable[str], tokens: Callable[[str], Sequence[int]]) -> None:
    """Log what `read_alike` finds: the first few pairs, and how many there are."""
    lines = read_alike(instructions, tokens)
    for line in lines[:_PAIRS_NAMED]:
        _log.warning("%s", line)
    if len(lines) > _PAIRS_NAMED:
        _log.warning("and %d more pairs of instructions with the same tokens", len(lines) - _PAIRS_NAMED)


def shortened(instruction: str) -> str:
    """The instruction in quotes, cut after its first words: for messages."""
    return repr(instruction if len(instruction) <= _SHOWN else instruction[:_SHOWN] + "...")


_log = logging.getLogger(__name__)
_PAIRS_NAMED = 5
_MOST_TOLD = 4096
_MOST_WARNED = 12
_unheard: ContextVar[bool] = ContextVar("unheard", default=False)
_told_before: set[str] = set()
"""Words and instructions of which this process has been told."""


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _spoken(text: str) -> str:
    """Without what may differ between two ways to write the same sentence."""
    return " ".join(_SAID_ALOUD.sub(" ", unicodedata.normalize("NFC", text).lower()).split())


def _invisible(c: str) -> bool:
    """Format characters (joiners, byte order marks, soft hyphens, directions) and variation selectors.

    A zero-width space is none of them: it separates words.
    """
    return c != "\u200b" and (unicodedata.category(c) == "Cf" or "\ufe00" <= c <= "\ufe0f")


def _kept(text: str, place: int, c: str, *, after_word: bool) -> str:
    """The replacement of one character: itself, itself as a separate word, or a space."""
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    if c in _BETWEEN_DIGITS and after.isdigit() and (before.isdigit() or (c == "." and not before.isalnum())):
        return c
    if c in _DASHES:
        # A sign stands before a number; after a letter the dash belongs to a compound (block-2).
        return " - " if text[place + 1 :].lstrip(" .")[:1].isdigit() and not before.isalpha() else " "
    category = unicodedata.category(c)
    if category[0] == "M":
        return c if after_word else " "
    if category in ("Sm", "Sc", "So") or c in _READ_PUNCTUATION:
        return f" {c} "
    return c if c.isalnum() else " "
