"""Instructions: a small grammar with training phrasings and held-out ones made of the same words.

A held-out phrasing differs in word order, verb or referring form ("the cube that is red") and never occurs in
demonstrations or in the grounding set, but every one of its words does. The backbone, which learns language and not
actions, hears more than demonstrations say: the place before the thing, with other verbs than held-out phrasings have,
and their referring form, but in questions ("where is the cube that is red") and in no instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from envs.tabletop.shapes import PANEL_Y_M

Phrasings = Literal["train", "heldout", "novel"]
"""Training wording; new wording; training wording about objects in colours that were never their subject."""
Wording = Phrasings | Literal["grounding"]
"""One of the phrasings, or of the questions that a backbone is pre-trained with: "train" and what only it hears."""

KIND_WORDS: dict[str, tuple[str, ...]] = {
    "cube": ("cube", "block"),
    "can": ("can", "cylinder"),
    "brick": ("brick", "bar"),
    "ball": ("ball", "sphere"),
    "bottle": ("bottle", "flask"),
    "mug": ("mug", "cup"),
    "arch": ("arch", "bridge"),
    "pyramid": ("pyramid", "steps"),
    "domino": ("domino", "tile"),
}

# {o}: a reference to the object, {p}: to the plate. Referring forms are chosen separately.
_PICK = {
    "train": (
        "pick up {o}",
        "lift {o}",
        "grab {o}",
        "take {o}",
        "please pick up {o}",
        "raise {o} from the table",
    ),
    "heldout": ("pick {o} up", "please grab {o} from the table", "take {o} and lift it up"),
}
_PLACE = {
    "train": (
        "put {o} on {p}",
        "place {o} on {p}",
        "move {o} to {p}",
        "pick up {o} and put it on {p}",
        "take {o} and place it on {p}",
    ),
    "heldout": ("on {p} put {o}", "lift {o} and move it to {p}", "please place {o} on {p}"),
}
TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {"pick": _PICK, "place": _PLACE}
# Without them a backbone takes the first thing that is named for the one to move (docs/research-log.md,
# 2026-11-22, 06:31).
PLACE_FIRST: dict[str, tuple[str, ...]] = {
    "place": ("on {p} place {o}", "to {p} move {o}"),
    "on": ("on {f} place {o}", "to {f} move {o}"),
    "in": ("in {f} put {o}", "in {f} drop {o}", "into {f} move {o}"),
    "push": ("to {f} push {o}", "to {f} slide {o}", "onto {f} slide {o}"),
    "stack": ("on {b} place {o}", "on {b} stack {o}", "on top of {b} put {o}", "on top of {b} set {o}"),
}
"""Templates, by their keys in TEMPLATES and GOAL_TEMPLATES, that the grounding set has and no demonstration."""
# "that is" is a training form only for plates, and the held-out form for objects: its words are known, its use is new.
_OBJECT_FORMS = {"train": ("the {c} {k}",), "heldout": ("the {c} {k}", "the {k} that is {c}")}
_PLATE_FORMS = {"train": ("the {c} plate", "the plate that is {c}"), "heldout": ("the {c} plate",)}


def holds_nothing_back(suite: str) -> ValueError:
    """The error for "novel" phrasings of a suite without held-out colours."""
    return ValueError(f"suite {suite!r} holds no colours back: phrasings must be train or heldout")


def _template(
    words: str, among: dict[str, dict[str, tuple[str, ...]]], rng: np.random.Generator, wording: Wording
) -> str:
    if wording == "grounding" and words in PLACE_FIRST and rng.random() < 0.5:
        return _draw(PLACE_FIRST[words], rng)
    return _draw(among[words]["heldout" if wording == "heldout" else "train"], rng)


def object_phrase(color: str, kind: str, rng: np.random.Generator, phrasings: Wording = "train") -> str:
    """A referring expression, e.g. "the red cube"."""
    forms = _OBJECT_FORMS["heldout" if phrasings == "heldout" else "train"]
    form = forms[rng.integers(len(forms))]
    words = KIND_WORDS[kind]
    return form.format(c=color, k=words[rng.integers(len(words))])


def plate_phrase(color: str, rng: np.random.Generator, phrasings: Wording = "train") -> str:
    """A referring expression for a plate."""
    form = _draw(_PLATE_FORMS["heldout" if phrasings == "heldout" else "train"], rng)
    return form.format(c=color)


def instruction(
    task: str,
    target: tuple[str, str],
    plate_color: str | None,
    rng: np.random.Generator,
    phrasings: Wording = "train",
) -> tuple[str, str]:
    """(text, template) of one instruction; `target` is (colour, kind)."""
    template = _template(task, TEMPLATES, rng, phrasings)
    return template.format(
        o=object_phrase(*target, rng, phrasings),
        p="" if plate_color is None else plate_phrase(plate_color, rng, phrasings),
    ), template


# ---------------------------------------------------------------------- goals of the tabletop suites
# {o}: the object, {b}: the object underneath, {f}: the place, or the thing that opens or is pressed.
GOAL_TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "lift": {split: tuple(t.replace("{p}", "{f}") for t in _PICK[split]) for split in _PICK},
    "on": {split: tuple(t.replace("{p}", "{f}") for t in _PLACE[split]) for split in _PLACE},
    "in": {
        "train": (
            "put {o} in {f}",
            "place {o} in {f}",
            "drop {o} into {f}",
            "move {o} into {f}",
            "pick up {o} and put it in {f}",
            "take {o} and drop it in {f}",
        ),
        "heldout": ("into {f} drop {o}", "take {o} and put it into {f}"),
    },
    "push": {
        "train": (
            "push {o} to {f}",
            "slide {o} to {f}",
            "push {o} onto {f}",
            "slide {o} onto {f}",
            "move {o} to {f} without lifting it",
        ),
        "heldout": ("onto {f} push {o}", "without lifting it slide {o} onto {f}"),
    },
    "stack": {
        "train": (
            "stack {o} on {b}",
            "put {o} on top of {b}",
            "place {o} on {b}",
            "set {o} on top of {b}",
            "pick up {o} and stack it on {b}",
        ),
        "heldout": ("on top of {b} stack {o}", "pick up {o} and set it on {b}"),
    },
    "open": {
        "train": ("open {f}", "pull {f} open", "pull out {f}", "slide {f} open", "please open {f}"),
        "heldout": ("pull open {f}", "please pull {f} out"),
    },
    "close": {
        "train": ("close {f}", "push {f} shut", "shut {f}", "slide {f} shut", "please close {f}"),
        "heldout": ("push shut {f}", "please shut {f}"),
    },
    "press": {
        "train": ("press {f}", "push {f}", "push down {f}", "press down on {f}", "please press {f}"),
        "heldout": ("press {f} down", "please push down on {f}"),
    },
}
# {f}: the first button, {w}: from which side on the outer ones are pressed.
WHOLE_TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "before-each": {
        "train": (
            "press {f} before each of the others {w}",
            "{w} press {f} before each of the others",
            "push {f} before each of the others {w}",
        ),
        "heldout": ("before each of the others {w} press {f}", "{w} push {f} before each of the others"),
    },
    "twice": {
        "train": (
            "press {f} and the next one twice and then the last one",
            "twice press {f} and the next one and then the last one",
            "push {f} and the next one twice and then the last one",
        ),
        "heldout": ("twice push {f} and the next one and then the last one",),
    },
    "was-lit": {
        "train": (
            "press the button that was green",
            "push the button that was green",
            "wait and press the button that was green",
        ),
        "heldout": ("wait and then push the button that was green",),
    },
    "not-lit": {
        "train": (
            "press the button that was never green",
            "push the button that was never green",
            "wait and press the button that was never green",
        ),
        "heldout": ("wait and then push the button that was never green",),
    },
}
"""Sentences that tell a task on a panel of buttons, of which a sentence for every step would be hard to follow
(`Task.told`). One name in each: of several, a frozen backbone hardly says which comes first (docs/research-log.md)."""
_WAYS = {"left-button": "from left to right", "right-button": "from right to left"}
_JOINS = {
    "train": (("", " then "), ("", " and then "), ("first ", " then ")),
    "heldout": (("first ", " and then "),),
}
_FIXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "plate": ("plate",),
    "bowl": ("bowl", "dish"),
    "box": ("box", "tray"),
    "tray": ("box", "tray"),
    "zone": ("zone", "spot"),
    "cabinet": ("drawer",),
    "button": ("button", "switch"),
    **dict.fromkeys(PANEL_Y_M, ("button", "switch")),
}
_FIXTURE_FORMS = {
    "train": ("the {k}", "the {c} {k}", "the {k} that is {c}"),
    "heldout": ("the {k}", "the {c} {k}"),
}
_PANEL_FORMS = {"train": ("the {c} {k}", "the {k} that is {c}"), "heldout": ("the {c} {k}",)}
# {o}: an object without its article, {p}: the plate, {s}: the bowl.
_RELATION_FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    relation: {"train": (f"the {{o}} {words}", *more), "heldout": (f"the {{o}} that is {words}",)}
    for relation, words, *more in (
        ("left", "left of {p}", "the {o} to the left of {p}"),
        ("right", "right of {p}", "the {o} to the right of {p}"),
        ("front", "in front of {p}"),
        ("behind", "behind {p}"),
        ("nearest", "nearest to {p}", "the {o} closest to {p}"),
        ("farthest", "farthest from {p}"),
        ("between", "between {p} and {s}", "the {o} between {s} and {p}"),
        ("leftmost", "farthest to the left", "the leftmost {o}"),
        ("rightmost", "farthest to the right", "the rightmost {o}"),
    )
}


def _draw(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def fixture_phrase(color: str, kind: str, rng: np.random.Generator, phrasings: Wording = "train") -> str:
    """A referring expression for a thing that stays, e.g. "the bowl that is red". It is the only one of its kind, but
    for the buttons of a panel, which go by their colour."""
    forms = _PANEL_FORMS if kind in PANEL_Y_M else _FIXTURE_FORMS
    form = _draw(forms["heldout" if phrasings == "heldout" else "train"], rng)
    return form.format(c=color, k=_draw(_FIXTURE_WORDS[kind], rng))


def related_phrase(
    relation: str,
    color: str,
    kind: str,
    plate_color: str,
    bowl_color: str,
    rng: np.random.Generator,
    phrasings: Wording = "train",
) -> str:
    """A referring expression that tells an object from its likes, e.g. "the red cube left of the plate"."""
    form = _draw(_RELATION_FORMS[relation]["heldout" if phrasings == "heldout" else "train"], rng)
    word = _draw(KIND_WORDS[kind], rng)
    return form.format(
        o=f"{color} {word}" if rng.random() < 0.5 else word,
        p=fixture_phrase(plate_color, "plate", rng, phrasings),
        s=fixture_phrase(bowl_color, "bowl", rng, phrasings),
    )


def whole_instruction(
    told: str, fixtures: Sequence[str], color: str, rng: np.random.Generator, phrasings: Wording = "train"
) -> tuple[str, str]:
    """(text, template) of a task that one sentence of WHOLE_TASKS tells; `fixtures` are the buttons in the order in
    which they are pressed, `color` that of the first."""
    template = _template(told, WHOLE_TASKS, rng, phrasings)
    way = next((_WAYS[kind] for kind in fixtures if kind in _WAYS), "")
    return template.format(f=fixture_phrase(color, fixtures[0], rng, phrasings), w=way), template


def goal_instruction(
    steps: Sequence[tuple[str, dict[str, str]]], rng: np.random.Generator, phrasings: Wording = "train"
) -> tuple[str, str]:
    """(text, template) for goals in order; each is its key in GOAL_TEMPLATES and what its template is filled with. The
    template of a sequence is how its parts are joined."""
    split = "heldout" if phrasings == "heldout" else "train"
    templates = [_template(words, GOAL_TEMPLATES, rng, phrasings) for words, _ in steps]
    texts = [template.format(**names) for template, (_, names) in zip(templates, steps, strict=True)]
    if len(steps) == 1:
        return texts[0], templates[0]
    first, join = _JOINS[split][rng.integers(len(_JOINS[split]))]
    return first + join.join(texts), first + join.join("..." for _ in steps)
