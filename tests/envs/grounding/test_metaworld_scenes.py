"""Scenes of Meta-World: every task's words name something, labels lie on it, what is held is between the fingers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from envs.adapters.metaworld_suites import phrasings_of, task_names
from envs.grounding.expert_scenes import PlayedSampler
from envs.grounding.generate import QUESTIONS_PER_SCENE, generate
from envs.grounding.metaworld_scenes import NAMED, MetaworldSampler
from envs.perturb.perturbation import Perturbation, randomisation
from envs.registry import load_suite
from tests.envs.adapters.test_metaworld_env import needs_metaworld
from tests.envs.grounding.test_borrowed_looks import LOOKS, alone_here, compare  # noqa: F401 (fixture)


@contextmanager
def sampler(task: str, perturb: Perturbation | None = None) -> Iterator[MetaworldSampler]:
    one = MetaworldSampler(load_suite(f"metaworld-{task}"), 96, perturb)
    try:
        yield one
    finally:
        one.worlds.close()


def test_every_task_names_a_thing_and_where_it_goes() -> None:
    assert set(NAMED) == set(task_names())
    for named in NAMED.values():
        assert named.thing.startswith("the ") and (not named.place or named.place.startswith("the "))
        assert not (named.place and named.at == named.to)


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envs.adapters.adapter_worlds.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"needs metaworld: `\./run setup metaworld`"):
        generate(1, tmp_path / "set", suites=["metaworld-push"])


@needs_metaworld
def test_labels_stay_on_the_puck_under_every_camera_and_no_scene_changes() -> None:
    with sampler("push") as plain, sampler("push", LOOKS) as turned:
        gaps, moved = compare(plain, turned, "objGeom", 10)
    assert (np.isfinite(gaps).sum(1) > 2).all() and (np.nanmedian(gaps, axis=1) < 3).all()
    assert (np.median(moved, axis=1) > [0.02, 0.01]).all()  # the hand's camera turns by less


@needs_metaworld
def test_what_is_held_is_between_closed_fingers() -> None:
    held, free, lifted = [], [], []
    with sampler("pick-place") as one:
        for k in range(30):
            questions = one.scene(np.random.default_rng([2, k]))
            assert len(questions) == QUESTIONS_PER_SCENE
            assert {q.prompt for q in questions[:4]} <= set(phrasings_of("pick-place")["train"])
            assert (questions[5].answer, questions[6].answer) in (("yes", "the puck"), ("no", "nothing"))
            yes, gap = questions[5].answer == "yes", float(np.linalg.norm(questions[0].object - one.grip()))
            (held if yes else free).append((gap, one.worlds.proprio()[0, 3]))
            if questions[0].object[2] > 0.06:
                lifted.append(yes)
    assert len(held) > 3 and len(free) > 3
    assert max(gap for gap, _ in held) < 0.04 and max(opening for _, opening in held) < 0.9
    assert max(gap for gap, _ in free) > 0.06 and max(opening for _, opening in free) > 0.9
    assert len(lifted) > 1 and np.mean(lifted) > 0.7


@needs_metaworld
def test_a_set_depends_on_its_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone_here: list[PlayedSampler],  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr("envs.grounding.generate._SCENES_PER_TASK", 4)
    strong = randomisation(["strong", "motion=0"])
    suites = ("metaworld-push", "metaworld-drawer-open")
    sets = [generate(8, tmp_path / str(k), suites=suites, seed=3, num_workers=1 + k, perturb=strong) for k in range(2)]
    assert len(alone_here) == 2, "of both suites, for the first set"
    images = [np.load(folder / "images.npy") for folder in sets]
    assert images[0].shape == (8, 2, 84, 84, 3)
    np.testing.assert_array_equal(images[0], images[1])
    points, told = np.load(sets[0] / "points.npy"), json.loads((sets[0] / "questions.json").read_text())
    assert np.isfinite(points[::2, :4, 1]).all() and not np.isfinite(points[1::2, :4, 1]).any()  # a drawer has no place
    assert told[0][7] == ["describe the table", "the puck and the goal"] and told[1][4] == ["where is the handle", ""]
