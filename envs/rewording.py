"""Instructions in other people's words: rewrites that keep the meaning and use words no phrasing of ours has."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_VERBS = {
    "pick up": ("collect", "get hold of"),
    "lift": ("hoist", "elevate"),
    "grab": ("seize", "snatch"),
    "take": ("fetch", "get"),
    "raise": ("hoist", "elevate"),
    "put": ("set", "deposit"),
    "place": ("lay", "deposit"),
    "move": ("bring", "transfer"),
    "push": ("shove", "nudge"),
    "slide": ("shove", "nudge"),
    "stack": ("pile", "balance"),
    "open": ("pull open", "unclose"),
    "close": ("shut", "push shut"),
    "press": ("hit", "tap"),
}
_COLORS = {
    "red": ("bright red", "scarlet red"),
    "green": ("leaf green", "grass green"),
    "blue": ("deep blue", "navy blue"),
    "yellow": ("lemon yellow", "golden yellow"),
    "purple": ("violet purple", "dark purple"),
}
_ARTICLES = {"the": ("that", "our")}
_OPENINGS = ("could you ", "robot, ", "i would like you to ", "your next job: ")
_ENDINGS = (" for me", ", thank you", " as soon as you can", ", carefully")


def reword(text: str, seed: Sequence[int], severity: float) -> str:
    """`text` in other words. Each of five rewrites is made with probability `severity`; those of a smaller severity are
    among those of a larger one, and equal seeds choose equal words whatever the text."""
    rng = np.random.default_rng(list(seed))
    made = rng.uniform(size=5) < severity
    choice = rng.integers(1 << 16, size=5)
    for number, synonyms in enumerate((_VERBS, _COLORS, _ARTICLES)):
        if made[number]:
            text = _replace(text, synonyms, int(choice[number]))
    if made[3]:
        text = _OPENINGS[choice[3] % len(_OPENINGS)] + text.removeprefix("please ")
    if made[4]:
        text += _ENDINGS[choice[4] % len(_ENDINGS)]
    return text


def _replace(text: str, synonyms: dict[str, tuple[str, ...]], choice: int) -> str:
    """All words at once, so that no synonym is replaced again."""
    found = re.compile(r"\b(" + "|".join(sorted(synonyms, key=len, reverse=True)) + r")\b")
    return found.sub(lambda match: synonyms[match.group()][choice % len(synonyms[match.group()])], text)
