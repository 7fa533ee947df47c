"""Reworded instructions: the same meaning in words that no training phrasing has."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

# Short words: a tokenizer that has never seen them spells them letter by letter, and small policies read few tokens.
_VERBS = {
    "pick up": ("get", "fetch"),
    "lift": ("heave", "hoist"),
    "grab": ("grip", "seize"),
    "take": ("get", "fetch"),
    "raise": ("heave", "hoist"),
    "put": ("set", "lay"),
    "place": ("set", "lay"),
    "move": ("bring", "carry"),
    "drop": ("let fall", "dump"),
    "push": ("shove", "nudge"),
    "slide": ("shove", "nudge"),
    "stack": ("pile", "set"),
    "pull": ("tug", "draw"),
    "open": ("unshut", "undo"),
    "close": ("shut", "seal"),
    "press": ("hit", "tap"),
}
_COLORS = {color: (f"bright {color}", f"light {color}") for color in ("red", "green", "blue", "yellow", "purple")}
_ARTICLES = {"the": ("that", "this")}
_SYNONYMS = {**_VERBS, **_COLORS, **_ARTICLES}
_WORDS = sorted(_SYNONYMS, key=len, reverse=True)
_PATTERN = re.compile(r"\b(" + "|".join(_WORDS) + r")\b")
_OPENINGS = ("now ", "ok ", "hey, ", "go ")
_ENDINGS = (" now", " today", " again", ", ok?")
MAX_REWRITES = 3


def reword(text: str, seed: Sequence[int], severity: float) -> str:
    """`text` with round(3 * severity) of its words and its frame rewritten, or all there are if fewer. Equal seeds make
    equal choices, so a smaller severity's rewrites are among those of a larger one."""
    rng = np.random.default_rng(list(seed))
    order, choice = rng.uniform(size=len(_WORDS) + 2), int(rng.integers(1 << 16))
    # The first occurrence of every word that has synonyms, then the opening and the ending.
    places = {_WORDS.index(match.group()): match for match in reversed([*_PATTERN.finditer(text)])}
    opening, ending = len(_WORDS), len(_WORDS) + 1
    chosen = sorted([*places, opening, ending], key=lambda k: order[k])[: round(MAX_REWRITES * severity)]
    for match in sorted((places[k] for k in chosen if k in places), key=lambda match: match.start(), reverse=True):
        synonyms = _SYNONYMS[match.group()]
        text = text[: match.start()] + synonyms[choice % len(synonyms)] + text[match.end() :]
    if opening in chosen:
        text = _OPENINGS[choice % len(_OPENINGS)] + text
    if ending in chosen:
        text += _ENDINGS[choice % len(_ENDINGS)]
    return text
