"""Scenes of LIBERO, made in LIBERO's own environment: what may be asked together, and labels that lie on the things."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from envs.grounding.generate import QUESTIONS_PER_SCENE, generate
from envs.perturb.perturbation import randomisation
from tests.envs.adapters.test_libero_env import needs_libero

SUITE = "libero-object-exchanged"


def test_its_scenes_are_neither_randomised_nor_mixed_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'libero-object-exchanged' cannot be randomised"):
        generate(1, tmp_path / "set", suites=[SUITE], perturb=randomisation(["light"]))
    monkeypatch.setattr("envs.make.interpreter", lambda: Path("python"))  # as if LIBERO were installed
    with pytest.raises(ValueError, match="make a set of these and another of the rest"):
        generate(1, tmp_path / "set", suites=[SUITE, "tabletop-ten"])


@needs_libero
def test_labels_lie_on_the_things(tmp_path: Path) -> None:
    generate(16, tmp_path / "set", suites=[SUITE], num_workers=1, image_size=96, seed=3)
    images, points = np.load(tmp_path / "set" / "images.npy"), np.load(tmp_path / "set" / "points.npy")
    scenes = json.loads((tmp_path / "set" / "questions.json").read_text())
    on, mirrored = [], []
    for scene, (picture, labels) in enumerate(zip(images[:, 0].astype(float).mean(-1), points, strict=True)):
        assert len(scenes[scene]) == QUESTIONS_PER_SCENE
        (told, _), *_, (where, _), (doubt, answer), (_, held), (_, named) = scenes[scene]
        assert told.startswith("pick up the ") and told.endswith(" and place it in the basket")
        things = named.split(" and ")
        assert len(things) == 7 and where.removeprefix("where is ") in things
        assert answer == ("yes" if held in doubt else "no") and held in (*things, "nothing")
        for (said, _), (u, v, seen) in zip(scenes[scene][:4], labels[:4, 0, 3:6], strict=True):
            if seen and "basket" not in said.split(" and ")[0]:
                row, column = int((v + 1) * 48), int((u + 1) * 48)
                on.append(picture[row, column])
                mirrored.append(picture[row, 95 - column])
    # The groceries are darker than the floor around them, and nothing stands on the mirror's other side but the basket.
    assert len(on) > 30 and np.median(on) < 110 < np.median(mirrored)
