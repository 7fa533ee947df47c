"""New words for a threshold: known to no training text, and put where a sentence has one of the plain ones."""

from __future__ import annotations

import numpy as np

from vla.language.names import ABSENT_THINGS, COLORED, COLORS, THINGS
from vla.language.reserved import RESERVED_COLORS, RESERVED_THINGS, SHARE, with_new_words
from vla.language.words import VOCABULARY

TABLES = (RESERVED_COLORS, RESERVED_THINGS)


def test_no_training_text_has_them():
    trained = set(VOCABULARY)
    for table in (COLORS, COLORED, THINGS):
        trained |= {word for names in table.values() for name in names for word in name.split()}
    trained |= {word for name in ABSENT_THINGS for word in name.split()}
    words = [word for table in TABLES for names in table.values() for word in names]
    assert not trained & set(words)
    assert len(words) == len(set(words)), "a word means one colour or one kind of thing"


def test_a_share_of_the_sentences_has_one_of_them():
    rng = np.random.default_rng(0)
    said = [with_new_words("put the red cube on the blue can", rng) for _ in range(1000)]
    colors = [text for text in said if text.split()[2] in RESERVED_COLORS["red"]]
    things = [text for text in said if text.split()[3] in RESERVED_THINGS["cube"]]
    assert abs(len(colors) / 1000 - SHARE) < 0.04 and abs(len(things) / 1000 - SHARE) < 0.04
    assert not set(colors) & set(things) and all(text.endswith("on the blue can") for text in said)
    assert said.count("put the red cube on the blue can") == 1000 - len(colors) - len(things)
    assert with_new_words("open the drawer", rng) == "open the drawer"
