"""Instruction -> the words that a policy reads, and their tokens: one rule for training, serving and LeRobot's tools.

Letter case, spacing and punctuation are how an instruction is written down; signs, numbers and symbols are what it
says. No torch here: exported policies tokenise, too.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

TextRule = Literal["words", "signs"]
"""words: letters and digits only, as all policies read before there was a choice. signs: what means something, too."""

MOST_TOKENS = 512
"""Longest instruction that training makes room for: attention takes memory with the square of it."""

_CHARACTERS_PER_TOKEN = 64
"""More than any word has: a text longer than this times the limit is refused before it is tokenised and kept."""
_SHOWN = 60

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
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", instruction).lower())
    text = "".join(c for c in text if not _invisible(c))
    kept: list[str] = []
    for place, c in enumerate(text):
        kept.append(_kept(text, place, c, after_word=bool(kept) and not kept[-1].endswith(" ")))
    return " ".join("".join(kept).split())


def tokens_of(instruction: Any, tokenizer: Any, *, rule: TextRule, limit: int) -> tuple[int, ...]:
    """Token ids of an instruction, at most `limit` of them. Logs a warning for words the tokenizer has no token for.

    ValueError for what is no text, says nothing, or is longer: it is never cut, half an instruction is another one.
    """
    if not isinstance(instruction, str):
        raise ValueError(f"an instruction must be text, got {type(instruction).__name__}")
    if len(instruction) > limit * _CHARACTERS_PER_TOKEN:
        raise ValueError(_too_long(instruction, f"{len(instruction):,} characters", limit))
    text = plain_text(instruction, rule)
    if not text:
        raise ValueError(f"an instruction must say something, got {shortened(instruction)}: no word, number or symbol")
    tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(tokens) > limit:
        raise ValueError(_too_long(instruction, f"{len(tokens):,} tokens", limit))
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in tokens:
        words = [word for word in dict.fromkeys(text.split()) if unknown in _ids(tokenizer, word)]
        named = ", ".join(f"'{word}'" for word in words) or "some of its symbols"
        _log.warning("the policy's vocabulary lacks %s, in the instruction %s", named, shortened(instruction))
    _warn_of_spelled(text, tokens, tokenizer, instruction)
    return tokens


def _warn_of_spelled(text: str, tokens: tuple[int, ...], tokenizer: Any, instruction: str) -> None:
    """Log the words that the tokenizer only spells: it has no token for them, so no training has shown what they mean.

    Each word once in a process.
    """
    words = [word for word in dict.fromkeys(text.split()) if word not in _spelled_before]
    if len(tokens) <= len(text.split()) or not words:
        return
    spelled = [word for word in words if _is_spelled(word, len(_ids(tokenizer, word)))]
    _spelled_before.update(spelled)
    if spelled:
        named = ", ".join(f"'{word}'" for word in spelled[:_PAIRS_NAMED])
        more = " ..." if len(spelled) > _PAIRS_NAMED else ""
        told = "the backbone has no word for %s%s: it means nothing unless training used it (in the instruction %s)"
        _log.warning(told, named, more, shortened(instruction))


def _is_spelled(word: str, pieces: int) -> bool:
    """True for a word of letters, or of a symbol, in pieces of less than two characters on average. Numbers are
    spelled by many tokenizers."""
    return pieces >= 3 and 2 * pieces > len(word) and not any(c.isdigit() for c in word)


def room_for_text(instructions: Iterable[Any], tokenizer: Any, *, rule: TextRule, least: int) -> int:
    """Tokens that a policy for these instructions must read: the longest one's, or `least` if that is more.

    ValueError for an instruction of more than `MOST_TOKENS` tokens (or than `least`, if that is more).
    """
    limit = max(least, MOST_TOKENS)
    distinct = dict.fromkeys(instructions)
    return max([least, *(len(tokens_of(text, tokenizer, rule=rule, limit=limit)) for text in distinct)])


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
_spelled_before: set[str] = set()
"""Words that were told in this process."""


def _too_long(instruction: str, size: str, limit: int) -> str:
    larger = "" if limit >= MOST_TOKENS else ", or train with a larger max_text_tokens"
    reads = f"this policy reads at most {limit} tokens"
    return f"the instruction {shortened(instruction)} has {size}, {reads}: shorten it{larger}"


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
