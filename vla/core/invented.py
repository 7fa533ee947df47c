"""Instructions that an environment makes up: paraphrases with slips of the pen, which are nobody's words."""

from typing import Any
from weakref import WeakSet

_inventors: WeakSet[Any] = WeakSet()


def invents_words(source: Any) -> None:
    """Remember that `source`, as an environment whose instructions are reworded at random, makes up words. While it
    lives nobody is told which of them a backbone only spells."""
    _inventors.add(source)


def words_are_invented() -> bool:
    """True while something in this process makes up words."""
    return bool(_inventors)
