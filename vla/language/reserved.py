"""Names for colours and things that no training text has: how sure a backbone is of a word that it has not heard.

A confidence is lower for a new word than for a heard one, so a threshold that is set on heard words alone would hold a
robot whenever somebody says it in their own way. `vla.training.grounding.sight` sets it on sentences of which some have
these words. None of them may be in a list that is trained on, nor in the sentences of `vla experiment words`.
"""

from __future__ import annotations

import re

import numpy as np

from vla.language.names import lists
from vla.language.paraphrase import drawn

RESERVED_COLORS: dict[str, tuple[str, ...]] = lists(
    """
    red: carnelian, rufous, sorrel, incarnadine, vermeil, cochineal, titian, geranium, currant, rosehip, cardinals,
        rowan, tomatoes, hibiscus, sriracha
    green: olivine, loden, beryl, juniper, leek, artichoke, bottlegreen, cabbages, laurel, myrtle, arugula, kale
    blue: gentian, woad, zircon, larkspur, azurite, steelblue, periwinkle, delphinium, lobelia, aegean, cerulescent,
        oceanic
    yellow: jonquil, goldenrod, canola, cornsilk, xanthous, gamboge, buttery, quince, bananas, lemony, topazes,
        squash, sulfur
    purple: damson, amaranth, jacaranda, violaceous, tyrian, lupin, gooseberry, blackcurrant, grapes, anemone,
        verbena, foxglove, shiraz, merlot
    """
)
"""Colour -> names for it."""
RESERVED_THINGS: dict[str, tuple[str, ...]] = lists(
    """
    cube: blocks, cubes
    can: vat, hogshead, spool, bobbin, cartridge, silo, cylinders, cans, urn
    brick: paver, joist, rafter, log, girders, bars, bricks, stave, crossbeam, sleeper, plinth
    ball: spherule, puffball, globule, softball, baseball, cannonball, gumball, balls, meatball, spheres, volleyball
    bottle: flacon, ewer, amphora, bottles, flasks, magnum
    mug: demitasse, pint, cups, mugs, teacups
    arch: culvert, rainbow, trestle, aqueduct, footbridge, arches, bridges, cloister
    pyramid: obelisk, spire, steeple, teepee, wedge, ramp, pyramids, stairwell, escalator
    domino: shingle, plaque, coaster, dominoes, tiles, flagstone, paving
    """
)
"""Kind of thing -> names for it."""
SHARE = 0.2
"""Share of the sentences in which the colour's name is new, and the same for the thing's."""

_COLOR = re.compile(rf"\b({'|'.join(RESERVED_COLORS)})\b")
_THING = re.compile(rf"\b({'|'.join(RESERVED_THINGS)})\b")


def with_new_words(text: str, rng: np.random.Generator) -> str:
    """The instruction `text`; in `SHARE` of the draws with a reserved name for its first colour, in as many for its
    first thing, where it names them plainly."""
    draw = rng.random()
    if draw < SHARE:
        return _COLOR.sub(lambda match: drawn(RESERVED_COLORS[match[0]], rng), text, count=1)
    if draw < 2 * SHARE:
        return _THING.sub(lambda match: drawn(RESERVED_THINGS[match[0]], rng), text, count=1)
    return text
