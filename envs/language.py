"""Instructions: a small grammar with training phrasings and held-out ones made of the same words.

A held-out phrasing differs in word order, verb or referring form ("the cube that is red") and never occurs in
demonstrations or in the grounding set, but every one of its words does.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Phrasings = Literal["train", "heldout"]

KIND_WORDS: dict[str, tuple[str, ...]] = {
    "cube": ("cube", "block"),
    "can": ("can", "cylinder"),
    "brick": ("brick", "bar"),
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
# "that is" is a training form only for plates, and the held-out form for objects: its words are known, its use is new.
_OBJECT_FORMS = {"train": ("the {c} {k}",), "heldout": ("the {c} {k}", "the {k} that is {c}")}
_PLATE_FORMS = {"train": ("the {c} plate", "the plate that is {c}"), "heldout": ("the {c} plate",)}


def object_phrase(color: str, kind: str, rng: np.random.Generator, phrasings: Phrasings = "train") -> str:
    """A referring expression, e.g. "the red cube"."""
    form = _OBJECT_FORMS[phrasings][rng.integers(len(_OBJECT_FORMS[phrasings]))]
    words = KIND_WORDS[kind]
    return form.format(c=color, k=words[rng.integers(len(words))])


def plate_phrase(color: str, rng: np.random.Generator, phrasings: Phrasings = "train") -> str:
    """A referring expression for a plate."""
    form = _PLATE_FORMS[phrasings][rng.integers(len(_PLATE_FORMS[phrasings]))]
    return form.format(c=color)


def instruction(
    task: str,
    target: tuple[str, str],
    plate_color: str | None,
    rng: np.random.Generator,
    phrasings: Phrasings = "train",
) -> tuple[str, str]:
    """(text, template) of one instruction; `target` is (colour, kind)."""
    templates = TEMPLATES[task][phrasings]
    template = templates[rng.integers(len(templates))]
    return template.format(
        o=object_phrase(*target, rng, phrasings),
        p="" if plate_color is None else plate_phrase(plate_color, rng, phrasings),
    ), template
