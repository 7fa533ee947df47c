"""The sentences that nobody trains on: what they say about a scene, and that no training text has their words."""

import itertools
import re

import numpy as np
import pytest

from bascule.experiments.unseen import FILE, Scene, load_unseen, words_of
from envs.perturb import rewording
from envs.tabletop import language
from envs.tabletop.scene import COLORS, SCENES
from vla.language.paraphrase import paraphrase
from vla.language.reserved import RESERVED_COLORS, RESERVED_THINGS
from vla.language.words import VOCABULARY

SCENE = Scene(("red", "blue", "green"), ("cube", "can", "brick"), 1)


def texts(value):
    if isinstance(value, str):
        return [value]
    return [text for part in (value.values() if isinstance(value, dict) else value) for text in texts(part)]


@pytest.fixture(scope="module")
def unseen():
    return load_unseen()


@pytest.fixture(scope="module")
def held_out(unseen):
    forms = [table["train"] for table in (*language.TEMPLATES.values(), *language.GOAL_TEMPLATES.values())]
    return unseen.held_out(texts([language.KIND_WORDS, forms]))


def test_there_are_eighty_sentences_and_thirty_about_nothing(unseen):
    assert {name: len(sentences) for name, sentences in unseen.present.items()} == dict.fromkeys(
        ("verbs", "colors", "things", "typos", "order"), 16
    )
    assert sum(map(len, unseen.absent.values())) == 30


def test_every_sentence_can_be_said_of_every_object(unseen):
    pick = SCENES["tabletop"]
    for colors in itertools.permutations(COLORS, 3):
        scene = Scene(colors, tuple(pick.objects)[1:], 2)
        for group in (*unseen.present.values(), *unseen.absent.values()):
            for sentence in group:
                if not unseen.fits(sentence, scene):
                    continue
                said = unseen.fill(sentence, scene, 7)
                assert "{" not in said and said.strip()


def test_a_sentence_names_the_target_or_what_is_not_there(unseen):
    assert unseen.fill("PICK UP THE {COLOR} {THING}!", SCENE, 0) == "PICK UP THE BLUE CAN!"
    assert unseen.fill("the {color_synonym} {thing_synonym}", SCENE, 1) == "the sapphire tube"
    assert [unseen.fill("{absent_color} {thing}", SCENE, draw) for draw in (0, 1)] == ["yellow can", "purple can"]
    assert {unseen.fill("{other_color} {thing}", SCENE, draw) for draw in range(4)} == {"red can", "green can"}
    with pytest.raises(ValueError, match="no words for 'mug'"):
        unseen.fill("the {thing}", Scene(("red",), ("mug",), 0), 0)


def test_a_sentence_is_said_only_where_it_means_one_thing(unseen):
    two_cans = Scene(("red", "blue", "green"), ("can", "can", "brick"), 1)
    for sentence, here in {
        "grab the {thing_synonym}": False,
        "grab the {color} {thing_synonym}": True,
        "grab the {color_synonym} one": True,
        "grab the {thing}, the {color_synonym} one": True,
        "grab the {other_color} {thing}": True,
        "what a day": True,
    }.items():
        assert unseen.fits(sentence, SCENE), "every kind is there once"
        assert unseen.fits(sentence, two_cans) == here
    assert {unseen.fill("{other_color} {thing}", two_cans, draw) for draw in range(4)} == {"green can"}
    assert not unseen.fits("{other_color} {thing}", Scene(("red", "blue"), ("can", "can"), 1)), "the other can is there"


def test_a_synonym_belongs_to_one_colour_or_one_kind_and_is_new(unseen):
    for table in (unseen.color_synonyms, unseen.thing_synonyms):
        rows = texts(table)
        assert len(set(rows)) == len(rows)
        assert not set(rows) & {word for words in language.KIND_WORDS.values() for word in words}


def test_no_training_text_of_the_environments_has_these_words(held_out):
    reworded = [rewording._SYNONYMS, rewording._OPENINGS, rewording._ENDINGS]
    assert not held_out & words_of(texts(reworded))
    assert "crimson" in held_out and "tin" in held_out and "lift" not in held_out and "please" not in held_out


def test_the_training_grammar_has_none_of_these_words(held_out):
    overlap = sorted(held_out & words_of(list(VOCABULARY)))
    print("words to remove from vla/language/words.py:", " ".join(overlap) or "none")
    assert not overlap


def test_a_threshold_is_set_on_none_of_these_words(held_out):
    assert not held_out & words_of(texts([RESERVED_COLORS, RESERVED_THINGS]))


def test_the_training_grammar_never_says_one_of_these_sentences(unseen, held_out):
    sentences = [text for group in unseen.present.values() for text in group]
    scene = Scene(("red", "blue"), ("cube", "can"), 0)
    never = {unseen.fill(text, scene, draw) for text in sentences for draw in range(5)}
    rng = np.random.default_rng(0)
    said = {paraphrase("pick up the red cube", rng, others=("blue",)) for _ in range(20_000)}
    assert len(said) > 100
    assert sorted(said & never) == []


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("lift the {colr} one", "has a slot {colr}; known: color"),
        ("lift the {color one", "cannot be filled: expected '}'"),
        ("lift the {} one", "has a slot {}"),
        ("lift it", "in present.verbs names nothing"),
        (" ", "is empty"),
    ],
)
def test_a_sentence_that_cannot_be_said_is_named_with_its_file(tmp_path, sentence, words):
    text = FILE.read_text()
    (first,) = re.findall(r'^verbs = \[\s*"([^"]*)"', text, re.MULTILINE)[:1]
    (tmp_path / "mine.toml").write_text(text.replace(f'"{first}"', f'"{sentence}"'))
    with pytest.raises(ValueError, match=f"^mine.toml: .*{re.escape(words)}"):
        load_unseen(tmp_path / "mine.toml")
