"""Scenes of the suites with goals: what the words name is where the label says, and nothing held back is said."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from envs.grounding.generate import QUESTIONS_PER_SCENE, generate
from envs.grounding.goal_scenes import GoalSampler
from envs.registry import load_suite
from envs.tabletop import language
from envs.tabletop.episodes import sample_episode
from envs.tabletop.goals import GoalKind
from envs.tabletop.language import KIND_WORDS
from envs.tabletop.scene import COLORS, SCENES
from envs.tabletop.tasks import novel_color

SUITES = ("tabletop-ten", "tabletop-object", "tabletop-spatial")
PLACES = {"plate": "plate", "bowl": "bowl|dish", "zone": "zone|spot"}
LIFT = r"(?:please )?(?:pick up|lift|grab|take|raise) the (\w+) (\w+)(?: from the table)?"
PLACE_FIRST = re.compile(r"(?:on|onto|in|into|to) ")
KIND_OF = {word: kind for kind, words in KIND_WORDS.items() for word in words}


@cache
def sampler(suite: str) -> GoalSampler:
    return GoalSampler(load_suite(suite))


def scenes(suite: str, count: int = 24):
    for k in range(count):
        yield sampler(suite).scene(np.random.default_rng([7, k]))


@pytest.mark.parametrize("suite", SUITES)
def test_points_lie_on_pixels_of_the_named_colour(suite: str) -> None:
    hits, kinds = [], set()
    for questions in scenes(suite):
        assert len(questions) == QUESTIONS_PER_SCENE
        for question in questions[:4]:
            named = [*re.finditer(rf"the ({'|'.join(COLORS)}) ({'|'.join(KIND_OF)})\b", question.prompt)]
            if not named:  # "open the drawer", "lift the cube left of the plate"
                continue
            found = named[-1 if PLACE_FIRST.match(question.prompt) else 0]  # "on the red cube stack the blue can"
            u, v, seen = sampler(suite).project(question.object)[0]
            if not seen:
                continue
            kinds.add(KIND_OF[found[2]])
            row, column = int((v + 1) / 2 * 84), int((u + 1) / 2 * 84)
            image = sampler(suite).worlds.images[0, 0]
            patch = image[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].reshape(-1, 3)
            direction = np.array(COLORS[found[1]]) / np.linalg.norm(COLORS[found[1]])
            hits.append((patch @ direction / (np.linalg.norm(patch, axis=1) + 1e-6)).max() > 0.97)
    assert len(hits) > 12 and np.mean(hits) > 0.75  # the arm may stand in front of some, or a thing lie in a drawer
    assert kinds >= {"tabletop-ten": {"cube", "brick", "can"}, "tabletop-object": {"ball", "mug", "arch"}}.get(
        suite, set()
    )


def test_subject_and_destination_are_those_of_the_first_goal() -> None:
    seen = set()
    for questions in scenes("tabletop-ten", 60):
        state, index = sampler("tabletop-ten").worlds.state, sampler("tabletop-ten")
        for question in questions[:4]:
            words = question.prompt
            place = next((name for name, said in PLACES.items() if re.search(rf"\b({said})\b", words)), None)
            if re.search(r"\b(button|switch)\b", words):
                seen.add("button")
                np.testing.assert_array_equal(question.object, state.handles[0, index.joints.index("button")])
                assert question.place is None
            elif re.search(r"\b(open|pull|close|shut)\b", words):
                seen.add("drawer")
                np.testing.assert_array_equal(question.object, state.handles[0, index.joints.index("cabinet")])
                assert question.place is None
            elif place:
                seen.add(place)
                np.testing.assert_array_equal(question.place, state.places[0, index.places.index(place)])
            elif "drawer" in words:
                seen.add("in drawer")
                np.testing.assert_array_equal(question.place, state.places[0, index.places.index("cabinet")])
            elif re.search(r"stack|on top of|^on |place .* on the \w+ \w+$", words):
                seen.add("stack")
                distance = np.linalg.norm(state.objects[0] - question.place, axis=1).min()
                assert distance < 0.04 and not np.allclose(question.place, question.object)
            else:
                seen.add("lift")
                assert question.place is None
    assert seen == {"button", "drawer", "plate", "bowl", "zone", "in drawer", "stack", "lift"}


def test_the_place_is_named_first_to_the_backbone_alone_and_not_as_evaluations_name_it() -> None:
    asked = [question for questions in scenes("tabletop-ten", 60) for question in questions[:4]]
    assert {"on", "onto", "in", "into", "to"} == {q.prompt.split()[0] for q in asked if PLACE_FIRST.match(q.prompt)}
    for words, templates in language.PLACE_FIRST.items():
        among = (language.GOAL_TEMPLATES | language.TEMPLATES)[words]
        assert not set(templates) & {*among["train"], *among["heldout"]}
        assert not any(PLACE_FIRST.match(template) for template in among["train"])
    suite = load_suite("tabletop-ten")
    told = [sample_episode(suite, SCENES[suite.scene], seed).instruction for seed in range(300)]
    assert not any(PLACE_FIRST.match(text) for text in told)


def test_what_is_carried_is_between_the_fingers_and_moments_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envs.grounding.goal_scenes._PLAYED", 0.0)
    held, openings, closed = 0, [], 0
    for questions in scenes("tabletop-ten", 120):
        world = sampler("tabletop-ten").worlds
        openings.append(world.state.joints[0, 0])
        closed += world.state.finger_opening[0] < 0.05
        answer = next((q.answer for q in questions if q.prompt == "what is in the gripper"), None)
        if answer not in (None, "nothing"):
            held += 1
            slots = list(world.episodes[0].slots)
            assert np.linalg.norm(world.state.objects[0, slots] - world.state.grip[0], axis=1).min() < 0.02
    assert held >= 4 and closed >= 2
    assert 0.1 < np.mean([0.1 < opening < 0.9 for opening in openings]) < 0.6


@pytest.mark.parametrize("suite", ("tabletop-ten", "tabletop-object"))
def test_nothing_that_evaluation_holds_back_is_said(suite: str) -> None:
    subjects = 0
    for questions in scenes(suite, 40):
        for question in questions[:4]:
            assert not re.search(rf"the ({'|'.join(KIND_OF)}) that is", question.prompt)
            lifted = re.fullmatch(LIFT, question.prompt)
            if lifted:
                subjects += 1
                assert lifted[1] != novel_color(KIND_OF[lifted[2]], "lift ")
    assert subjects > 5


def test_a_folder_of_several_suites_and_suites_that_have_no_goals(tmp_path: Path) -> None:
    folder = generate(2, tmp_path / "set", suites=("tabletop-ten", "tabletop-object"), seed=1, num_workers=1)
    assert np.isfinite(np.load(folder / "points.npy")[:, :5, 0]).all()
    assert not np.isfinite(np.load(folder / "points.npy")[:, 7]).any()
    with pytest.raises(ValueError, match="tabletop-pick"):
        generate(1, tmp_path / "other", suites=("tabletop-pick",))
    assert GoalKind.OPEN > GoalKind.STACK  # what `GoalSampler` tells articulated things by


def test_played_scenes_show_what_physics_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envs.grounding.goal_scenes._PLAYED", 1.0)
    moved, knocked, carried, answers = 0, 0, 0, []
    for questions in scenes("tabletop-ten", 40):
        world = sampler("tabletop-ten").worlds
        state, episode = world.state, world.episodes[0]
        slots = list(episode.slots)
        went = np.linalg.norm(state.objects[0, slots, :2] - np.array(episode.poses)[:, :2], axis=1)
        moved += bool(world.elapsed[0])
        knocked += int((went > 0.02).any())
        raised = state.objects[0, slots, 2] - state.rest_height[slots] > 0.02
        near = np.linalg.norm(state.objects[0, slots] - state.grip[0], axis=1) < 0.05
        between = bool((raised & near).any()) and state.finger_opening[0] < 0.9
        carried += between
        said = next((q.answer for q in questions if q.prompt == "what is in the gripper"), None)
        if said is not None:
            answers.append((said != "nothing") == between)
    assert moved > 30 and knocked > 5 and carried > 3
    assert len(answers) > 10 and np.mean(answers) > 0.9
    assert world.render_images
