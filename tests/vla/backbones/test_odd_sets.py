"""Grounding sets of which one file is another set's, or not what it should be."""

import json

import numpy as np
import pytest

from tests.vla.backbones.square_scenes import write_set
from vla.backbones.hub import load
from vla.training.grounding.questions import GroundingSet


@pytest.fixture(scope="module")
def tokenizer():
    return load("tiny").tokenizer


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("images.npy", lambda a: a[:-3], "different numbers of scenes"),
        ("points.npy", lambda a: np.concatenate([a, a[:2]]), "different numbers of scenes"),
        ("images.npy", lambda a: a / np.float32(255), "images.npy does not hold .* uint8"),
        ("points.npy", lambda a: a[..., :-1], "points.npy does not hold"),
        ("grip.npy", lambda a: a * np.nan, "grip.npy does not hold"),
        ("questions.json", lambda scenes: scenes[:-1], "different numbers of scenes"),
        ("questions.json", lambda scenes: [scenes[0][:-1], *scenes[1:]], "as many questions for each scene"),
        ("images.npy", None, "images.npy cannot be read"),
        ("questions.json", None, "questions.json is damaged"),
    ],
)
def test_a_file_that_does_not_belong_is_named(tmp_path, tokenizer, name, change, told):
    file = write_set(tmp_path / "set", 6) / name
    if change is None:
        file.write_bytes(file.read_bytes()[:-40])
    elif name.endswith(".json"):
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    else:
        np.save(file, change(np.load(file)))
    with pytest.raises(ValueError, match=told):
        GroundingSet(tmp_path / "set", tokenizer)
