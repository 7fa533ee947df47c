"""Questions about episodes: the answers are those of the simulator's state, and only what is clear is asked."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from envs.backends.cpu_worlds import TabletopWorlds
from envs.grounding.episode_questions import KINDS, TEMPLATES, Moment, askable
from envs.grounding.talk_data import MOMENTS, check_askable, generate_talk
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from envs.tabletop.goals import write_goals


@pytest.fixture(scope="module")
def pick():
    return TabletopWorlds(load_suite("tabletop-pick"), 1, render=RenderOptions(32))


@pytest.fixture(scope="module")
def counter():
    return TabletopWorlds(load_suite("tabletop-ten"), 1, render=RenderOptions(32))


def begin(worlds, seed=0, task=None):
    worlds.render_images = False
    worlds.reset(seeds=[seed], tasks=[task] if task else None)
    return worlds.episodes[0]


def moment(worlds, episode=None):
    return Moment(worlds, 0, episode or worlds.episodes[0])


def hold(worlds, slot, height=0.1):
    """The fingers around an object, `height` above the table, m."""
    state = worlds.state
    state.objects[0, slot] = [0.5, 0.0, height]
    state.grip[0], state.finger_opening[0], worlds._gripper[0] = state.objects[0, slot], 0.5, -1.0


def test_left_is_smaller_y_and_only_what_is_clear_is_asked(pick):
    episode = begin(pick)
    a, b, c = (f"the {color} {kind}" for color, kind in zip(
        episode.colors, (pick.scene.objects[s] for s in episode.slots), strict=True))  # fmt: skip
    for slot, y in zip(episode.slots, (-0.12, 0.0, 0.10), strict=True):
        pick.state.objects[0, slot, 1] = y
    now = moment(pick)
    assert [now.where(name) for name in (a, b, c)] == ["on the left", "in the middle", "on the right"]
    assert now.beside(b, "left") == a and now.beside(b, "right") == c
    assert now.beside(a, "left") == "nothing" and now.beside(a, "right") == f"{b} and {c}"
    pick.state.objects[0, episode.slots[1], 1] = -0.105  # 15 mm from a: nobody would say which is left
    now = moment(pick)
    assert now.beside(a, "right") is None and now.beside(b, "left") is None
    assert now.beside(c, "left") is None and now.beside(c, "right") == "nothing"  # both are left of it: in which order?
    pick.state.objects[0, episode.slots[2], 1] = 0.06  # at the border of middle and right
    assert moment(pick).where(c) is None


def test_what_it_does_follows_the_hand(pick):
    episode = begin(pick)
    target = moment(pick).names[episode.target]
    other = next(slot for slot in episode.slots if slot != episode.target)
    assert moment(pick).doing() == f"reaching for {target}" and not moment(pick).done()
    hold(pick, episode.target, 0.05)
    now = moment(pick)
    assert now.held == episode.target and now.doing() == f"lifting {target}" and now.where(target) == "in the gripper"
    hold(pick, episode.target, 0.15)
    assert moment(pick).done() and moment(pick).doing() == "it is done"
    begin(pick)
    hold(pick, other)
    now = moment(pick)
    assert now.doing() == f"holding {now.names[other]}" and now.object_named() == target and not now.done()
    pick.state.finger_opening[0] = 0.95  # as around a brick
    assert moment(pick).held == other
    pick.state.finger_opening[0] = 0.05  # closed on nothing
    assert moment(pick).held == -1
    pick.state.finger_opening[0], pick._gripper[0] = 0.5, 1.0
    assert moment(pick).held == -1


def test_of_one_that_strays_nobody_says_what_it_is_after(pick):
    begin(pick)
    kinds = [one.kind for one in moment(pick).ask(np.random.default_rng(0), strays=True)]
    assert "doing" not in kinds and "object" in kinds


def test_things_lie_in_the_bowl_and_on_the_plate(counter):
    episode = begin(counter, task="bowl")
    now = moment(counter)
    slot, bowl = episode.goals[0].object, episode.goals[0].place
    assert now.places[bowl] == "the bowl" and now.object_named() == now.names[slot]
    hold(counter, slot)
    assert moment(counter).doing() == f"carrying {now.names[slot]} to the bowl"
    begin(counter, task="bowl")
    counter.state.objects[0, slot] = counter.state.places[0, bowl] + [0, 0, 0.01]
    now = moment(counter)
    assert now.where(now.names[slot]) == "in the bowl" and now.done()
    plate = next(k for k, name in now.places.items() if name == "the plate")
    counter.state.objects[0, slot] = counter.state.places[0, plate] + [0, 0, 0.02]
    assert moment(counter).where(now.names[slot]) == "on the plate" and not moment(counter).done()


@pytest.mark.parametrize(("task", "account"), [("open", "opening the drawer"), ("press", "pressing the button")])
def test_what_opens_and_is_pressed_has_a_name(counter, task, account):
    begin(counter, task=task)
    now = moment(counter)
    assert now.doing() == account and now.object_named() == account.split(" ", 1)[1]
    counter.state.joints[0] = 1.0
    assert moment(counter).done()


def test_a_sequence_is_done_with_its_last_goal(counter):
    suite = load_suite("tabletop-long")
    worlds = TabletopWorlds(suite, 1, render=RenderOptions(32))
    episode = begin(worlds, task="open-drawer")
    worlds.state.joints[0] = 1.0
    assert not moment(worlds).done() and moment(worlds).doing() == "opening the drawer"
    worlds.state.stage[0] = 1
    now = moment(worlds)
    assert now.object_named() == now.names[episode.goals[1].object] and now.doing().startswith("reaching for")


def test_wordings_of_tests_are_none_of_training():
    for kind in KINDS:
        assert not set(TEMPLATES[kind]["train"]) & set(TEMPLATES[kind]["heldout"])


def test_moments_of_episodes_are_what_the_state_was(tmp_path):
    folder = generate_talk(("tabletop-pick", "tabletop-ten"), 4, tmp_path / "a", num_workers=0, image_size=32)
    again = generate_talk(("tabletop-pick", "tabletop-ten"), 4, tmp_path / "b", num_workers=0, image_size=32)
    about = json.loads((folder / "talk.json").read_text())
    assert about == json.loads((again / "talk.json").read_text())
    images, proprio = np.load(folder / "images.npy"), np.load(folder / "proprio.npy")
    assert images.shape == (4 * MOMENTS, 2, 32, 32, 3) and proprio.shape == (4 * MOMENTS, 8)
    np.testing.assert_array_equal(images, np.load(again / "images.npy"))
    assert [frame["seed"] for frame in about["frames"]] == [seed for seed in range(4) for _ in range(MOMENTS)]
    assert len({image.tobytes() for image in images}) > 8
    for frame, state in zip(about["frames"], proprio, strict=True):
        told = {kind: answer for kind, _, answer in frame["asked"]}
        if told.get("held", "nothing") != "nothing":
            assert state[6] > 0.2 and state[7] == -1  # told to close, the fingers are around something
        if told.get("done") == "yes" and frame["suite"] == "tabletop-pick":
            assert state[2] > 0.08 and told.get("doing", "it is done") == "it is done"


def test_strays_are_asked_about_what_was_said(pick):
    """The same goals count, whatever the hand is after."""
    episode = begin(pick)
    pick.place(0, replace(episode, goals=episode.swapped_goals))
    write_goals(pick.state, 0, episode.goals, episode.slots)
    hold(pick, episode.swapped_goals[0].object, 0.2)
    now = moment(pick, episode)
    assert not now.done() and now.object_named() == now.names[episode.target]


@pytest.mark.parametrize("suite", ["tabletop-spatial", "libero-goal"])
def test_suites_whose_things_have_no_names_are_refused(suite):
    with pytest.raises(ValueError, match=f"suite '{suite}'"):
        check_askable([suite])
    assert askable(load_suite("tabletop-place")) is None


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="exists: give another --out"):
        generate_talk(["tabletop-pick"], 1, tmp_path, num_workers=0)
