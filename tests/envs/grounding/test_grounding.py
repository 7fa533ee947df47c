"""The grounding set's labels agree with what is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from envs.grounding.generate import QUESTIONS_PER_SCENE, generate
from envs.perturb.perturbation import randomisation
from envs.tabletop.scene import COLORS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(24, tmp_path_factory.mktemp("g") / "set", seed=3, num_workers=1)


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scenes from other places."""
    random = randomisation(["camera=1"])
    return generate(24, tmp_path_factory.mktemp("g") / "set", seed=3, num_workers=1, image_size=96, perturb=random)


@pytest.mark.parametrize("name", ["folder", "turned"])
def test_points_lie_on_pixels_of_the_named_colour(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    images, points = np.load(folder / "images.npy"), np.load(folder / "points.npy")
    questions = json.loads((folder / "questions.json").read_text())
    hits = []
    for s, scene in enumerate(questions):
        assert len(scene) == QUESTIONS_PER_SCENE
        for q in range(4):
            u, v, seen = points[s, q, 0, 3:6]  # front camera
            words = scene[q][0].split()
            place_first = words[0] in ("on", "to")
            named = [w for w in words if w in COLORS][-1 if place_first else 0]
            if not seen:
                continue
            row, column = (int((at + 1) / 2 * images.shape[2]) for at in (v, u))
            patch = images[s, 0, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].reshape(-1, 3)
            direction = np.array(COLORS[named]) / np.linalg.norm(COLORS[named])
            cosine = patch @ direction / (np.linalg.norm(patch, axis=1) + 1e-6)
            hits.append(cosine.max() > 0.97)
    assert len(hits) > 50
    assert np.mean(hits) > 0.85  # the gripper may stand in front of some


def test_answers_are_balanced_enough_to_need_eyes(folder: Path) -> None:
    questions = json.loads((folder / "questions.json").read_text())
    answers = [scene[5][1] for scene in questions]
    assert {"yes", "no"} == set(answers) and 0.1 < np.mean([a == "yes" for a in answers]) < 0.9


def test_an_existing_folder_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(ValueError, match="exists"):
        generate(1, folder)


def test_randomised_scenes_are_the_same_scenes_seen_otherwise(folder: Path, turned: Path) -> None:
    images = [np.load(one / "images.npy") for one in (folder, turned)]
    points = [np.load(one / "points.npy") for one in (folder, turned)]
    assert images[0].shape == (24, 2, 84, 84, 3) and images[1].shape == (24, 2, 96, 96, 3)
    named = ~np.isnan(points[0][:, :, 0, 0])
    assert np.allclose(points[0][named][:, 0, :3], points[1][named][:, 0, :3], atol=1e-5)
    assert np.median(np.abs(points[0][named][:, 0, 3:5] - points[1][named][:, 0, 3:5]).max(1)) > 0.05
    assert json.loads((folder / "questions.json").read_text()) == json.loads((turned / "questions.json").read_text())
    with pytest.raises(ValueError, match="motion"):
        generate(4, folder.parent / "c", perturb=randomisation(["strong"]))
