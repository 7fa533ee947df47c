"""Paraphrases of instructions, for whatever learns from what people say: the same meaning in other words.

`paraphrase` takes a plain instruction apart into what is to be done, with what, and where, and says it anew: another
verb, another order, other words for colours and things, a polite frame, a slip of the pen. A sentence that it cannot
take apart gets a frame and a slip at most, so that it may be given tasks of any dataset.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vla.language.names import ABSENT_THINGS, CHAT, CHAT_ABOUT, COLORED, COLORS, NEUTRAL_LOOKS, NEUTRAL_THINGS, THINGS
from vla.language.words import (
    AFTER,
    BEFORE,
    CLOSE,
    DROP_VERBS,
    JOINS,
    KEPT_FOR_TESTS,
    OPEN,
    PICK,
    PLACE_VERBS,
    PLACES,
    PRESS,
    PUSH_VERBS,
    SIZES,
    STACK_VERBS,
    TAKE_VERBS,
)

PLAIN = 0.3
"""Share of the sentences that stay as they were."""
_SYNONYM, _FRAME, _AFTER, _TYPO = 0.4, 0.4, 0.2, 0.12
_KIND_ALONE, _COLOR_ALONE = 0.45, 0.1
"""Share in which a thing is told by its kind alone, or by its colour alone, where that is enough. Shapes are harder to
see than colours, and asked for in both words, a thing is found by its colour in most scenes."""
_TRIES = 6

_COLOR, _THING = "|".join(COLORS), "|".join(sorted(THINGS, key=len, reverse=True))
_NAMED = re.compile(rf"\b(?:the |a |an )?(?:(?P<c>{_COLOR}) )?(?P<k>{_THING})\b(?: that is (?P<d>{_COLOR})\b)?")
_PLACE = r"(?P<f>(?:the|a|an) (?:[\w-]+ ){0,2}[\w-]+(?: that is \w+)?)"
_WHERE = r"(?P<w>on top of|onto|on|into|in|to|over)"
_MOVE = r"(?:put|place|move|drop|set|fit)"
_CLAUSES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(form + "$"))
    for name, form in (
        ("stack", rf"(?:pick up|take|lift|grab) (?P<o>.+) and (?:stack|set) it {_WHERE} {_PLACE}"),
        ("place", rf"(?:pick up|take|lift|grab) (?P<o>.+) and {_MOVE} it {_WHERE} {_PLACE}"),
        ("slide", rf"move (?P<o>.+) {_WHERE} {_PLACE} without lifting it"),
        ("slide", rf"(?:push|slide) (?P<o>.+) {_WHERE} {_PLACE}"),
        ("slide", rf"{_WHERE} {_PLACE} (?:push|slide) (?P<o>.+)"),
        ("stack", rf"stack (?P<o>.+) {_WHERE} {_PLACE}"),
        ("stack", rf"(?P<w>on top of) {_PLACE} (?:put|set|stack) (?P<o>.+)"),
        ("stack", rf"(?:put|set) (?P<o>.+) (?P<w>on top of) {_PLACE}"),
        ("place", rf"{_MOVE} (?P<o>.+) {_WHERE} {_PLACE}"),
        ("place", rf"{_WHERE} {_PLACE} {_MOVE} (?P<o>.+)"),
        ("open", r"(?:open|pull out|slide out) (?P<f>.+)"),
        ("open", r"(?:pull|slide) (?P<f>.+) open"),
        ("close", r"(?:close|shut) (?P<f>.+)"),
        ("close", r"(?:push|slide) (?P<f>.+) shut"),
        ("press", r"(?:press down on|press|push down|push) (?P<f>.+)"),
        ("pick", r"(?:pick up|lift|grab|take|raise) (?P<o>.+?)(?: from the table)?"),
    )
)


def paraphrase(text: str, rng: np.random.Generator, *, others: Sequence[str] = ()) -> str:
    """The instruction `text`, or a question about things, in other words drawn from `rng`; as it is in `PLAIN` of the
    draws.

    `others`: names of everything else in sight, if known, "the blue can"; then a thing may be called by its colour or
    its kind alone.
    """
    if rng.random() < PLAIN:
        return text
    for _ in range(_TRIES):
        said = _said(text, rng, others)
        if not KEPT_FOR_TESTS.search(said):
            return said
    return text


def others_than_named(text: str, things: Sequence[str]) -> list[str]:
    """Names of all things but the one that `text` names, each like "the red cube"; empty unless it names exactly one of
    them by its colour."""
    named = [name for name in things if len(name.split()) > 2 and name.split()[1] in text.split()]
    return [name for name in things if name != named[0]] if len(named) == 1 else []


def about_nothing(text: str, rng: np.random.Generator, *, things: Sequence[str]) -> str:
    """An instruction like `text` about something that is not there. `things`: names of all that is, "the red cube".

    Mostly another colour or another thing of the same words; at times one that is in none of our scenes, small talk, or
    words that nobody knows.
    """
    if (draw := rng.random()) < 0.06:
        return drawn(CHAT, rng) if rng.random() < 0.4 else drawn(CHAT_ABOUT, rng).format(drawn(ABSENT_THINGS, rng))
    if draw < 0.12:
        made_up = [_made_up(rng) for _ in range(rng.integers(1, 6))]
        return " ".join(made_up) if rng.random() < 0.5 else drawn(PICK, rng).format(o="the " + made_up[0])
    match = _NAMED.search(text)
    if match is None:
        return drawn(PICK, rng).format(o="the " + _absent(text, things, rng))
    there = sorted({_alike(name) for name in things})
    new = "the " + _absent(text, things, rng)
    if draw < 0.65:
        # Mostly both words are in sight, on two things: who heeds only one of the words takes one of these.
        mixed = rng.random() < 0.7
        colors = [color for color, _ in there if color] if mixed else []
        kinds = [kind for _, kind in there] if mixed else []
        for _ in range(_TRIES):
            color = drawn(colors or ("red", "green", "blue", "yellow", "purple"), rng)
            named = f"the {color} {drawn(kinds or (match['k'], *_TOLD), rng)}"
            if _alike(named) not in there:
                new = named
                break
    elif draw < 0.82:
        # A colour that is in sight, half of the time: the thing alone tells that it is not meant.
        colors = [color for color, _ in there if color] if rng.random() < 0.5 else []
        new = f"the {_other_color(drawn(colors or tuple(COLORS), rng), rng)} {_absent(text, things, rng)}"
    return text[: match.start()] + new + text[match.end() :]


def _absent(text: str, things: Sequence[str], rng: np.random.Generator) -> str:
    """A thing that neither the scene nor the instruction has."""
    there = set(" ".join([text, *things]).split())
    while there & set((name := drawn(ABSENT_THINGS, rng)).split()):
        pass
    return name


def _made_up(rng: np.random.Generator) -> str:
    """A word that no language has, very likely: one to three syllables."""
    syllables = (drawn(_OPENING, rng) + drawn("aeiou", rng) + drawn(_ENDING, rng) for _ in range(rng.integers(1, 4)))
    return "".join(syllables)


_OPENING = ("b", "bl", "d", "dr", "f", "fl", "g", "gr", "k", "kl", "m", "n", "p", "pl", "qu", "r", "s", "sn", "t", "v",
            "w", "z")  # fmt: skip
_ENDING = ("", "", "", "b", "ck", "g", "l", "m", "n", "p", "r", "rf", "x", "zz")
_TOLD = ("cube", "can", "brick", "ball", "bottle", "mug", "arch", "pyramid", "domino")
_SAME = {"block": "cube", "cylinder": "can", "bar": "brick", "sphere": "ball", "flask": "bottle", "cup": "mug",
         "bridge": "arch", "steps": "pyramid", "tile": "domino"}  # fmt: skip


def same_kind(name: str) -> str:
    """The kind that a suite's name for a thing means: a "bar" is a "brick"."""
    return _SAME.get(name, name)


def _alike(name: str) -> tuple[str, str]:
    """Colour, if it is named with one, and kind that a name means."""
    words = name.removeprefix("the ").split()
    return (words[0] if words[0] in COLORS else ""), same_kind(words[-1])


def _said(text: str, rng: np.random.Generator, others: Sequence[str]) -> str:
    asked = text.startswith(("where ", "is ", "what ", "describe "))
    if asked:
        return _reworded(text, rng, others)
    parts = re.split(r"(?:,? and)? then ", text.removeprefix("please ").removeprefix("first "))
    said = drawn(JOINS, rng).join(_clause(part, rng, others) for part in parts)
    if len(parts) > 1 and rng.random() < 0.3:
        said = "first " + said
    before = drawn(BEFORE, rng) if rng.random() < _FRAME else ""
    after = drawn(AFTER, rng) if rng.random() < _AFTER else ""
    said = before + said + after
    return _slipped(said, rng) if rng.random() < _TYPO else said


def _clause(text: str, rng: np.random.Generator, others: Sequence[str]) -> str:
    """One thing to do, said anew."""
    for name, form in _CLAUSES:
        match = form.match(text)
        if match is None or (name == "pick" and " and " in match["o"]):
            continue
        found = match.groupdict()
        thing, place = (_reworded(found.get(key) or "", rng, others if key == "o" else ()) for key in "of")
        if name == "pick":
            return drawn(PICK, rng).format(o=thing)
        if name in ("open", "close", "press"):
            return drawn({"open": OPEN, "close": CLOSE, "press": PRESS}[name], rng).format(f=place)
        where = drawn(PLACES[found["w"]], rng)
        if name == "slide":
            return _moved(thing, where, place, PUSH_VERBS, rng, whole=False)
        verbs = STACK_VERBS if name == "stack" else DROP_VERBS if found["w"] in ("in", "into") else PLACE_VERBS
        return _moved(thing, where, place, verbs, rng, whole=True)
    return _reworded(text, rng, ())


def _moved(thing: str, where: str, place: str, verbs: Sequence[str], rng: np.random.Generator, *, whole: bool) -> str:
    """A thing is brought to a place: in one of several orders."""
    verb, order = drawn(verbs, rng), rng.random()
    if order < 0.45:
        return f"{verb} {thing} {where} {place}"
    if order < 0.7:
        return f"{where} {place} {verb} {thing}"
    if order < 0.85 and whole:
        return f"{drawn(TAKE_VERBS, rng)} {thing} and {verb} it {where} {place}"
    if order < 0.92:
        return f"{thing} should go {where} {place}" if whole else f"{verb} {thing} until it is {where} {place}"
    return f"{thing}: {verb} it {where} {place}"


def _reworded(text: str, rng: np.random.Generator, others: Sequence[str]) -> str:
    """Things under other names."""
    return _NAMED.sub(lambda match: _named(match, rng, others), text)


def _named(match: re.Match[str], rng: np.random.Generator, others: Sequence[str]) -> str:
    color, thing = match["c"] or match["d"] or "", match["k"]
    around = [_alike(name) for name in others]
    only_color = bool(around and color) and color not in {other for other, _ in around}
    only_kind = bool(around) and same_kind(thing) not in {kind for _, kind in around}
    article = drawn(("the ", "the ", "the ", "the ", "a ", "", "my "), rng)
    if not match.group().startswith(("the ", "a ", "an ")):
        article = ""
    told = rng.random()
    if only_kind and told < _KIND_ALONE:
        color = ""
    elif only_color and told > 1 - _COLOR_ALONE:
        thing = drawn(NEUTRAL_THINGS, rng)
    color = _other_color(color, rng)
    if thing in THINGS and rng.random() < _SYNONYM:
        thing = drawn(THINGS[thing], rng)
    look = rng.random()
    look = drawn(SIZES if look < 0.05 else NEUTRAL_LOOKS, rng) + " " if look < 0.15 else ""
    if not color:
        return f"{article}{look}{thing}"
    if rng.random() < 0.12:
        return f"{article}{look}{thing} {drawn(('which is', 'in', 'of colour', 'with the colour'), rng)} {color}"
    return f"{article}{look}{color} {thing}"


def _other_color(color: str, rng: np.random.Generator) -> str:
    """A colour's name, or in `_SYNONYM` of the draws another one for it: a word of its own, or what looks like that."""
    if not color or rng.random() >= _SYNONYM:
        return color
    if color not in COLORED or rng.random() < 0.6:
        return drawn(COLORS[color], rng)
    return f"{drawn(COLORED[color], rng)} {drawn((color, 'coloured', 'colored'), rng)}"


def _slipped(text: str, rng: np.random.Generator) -> str:
    """One letter is missing, doubled, or in its neighbour's place; of a word of four letters or more."""
    words = text.split(" ")
    long = [k for k, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not long:
        return text
    k = long[rng.integers(len(long))]
    word, at = words[k], int(rng.integers(len(words[k]) - 1))
    slips = (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[: at + 1] + word[at + 2 :],
        word[: at + 1] + word[at:],
    )
    words[k] = slips[rng.integers(len(slips))]
    return " ".join(words)


def drawn(options: Sequence[str], rng: np.random.Generator) -> str:
    """One of the options, each as likely."""
    return options[rng.integers(len(options))]
