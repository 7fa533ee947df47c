"""A suite from a user's TOML file, and tasks that it describes."""

from __future__ import annotations

import pickle

import pytest

from envs.registry import load_suite
from envs.tabletop.episodes import sample_episode
from envs.tabletop.goals import Goal, GoalKind
from envs.tabletop.scene import SCENES, place_names
from envs.tabletop.suites import suite_names
from envs.tabletop.tasks import TASKS, Step

HEAD = """
description = "d"
scene = "counter"
tasks = ["tidy", "press"]
objects_per_episode = 2
plates_per_episode = 1
horizon = 100
eval_seed0 = 5_000_000
"""
TIDY = """
[new_tasks.tidy]
drawer = 1.0
steps = [{ kind = "in", object = "a", fixture = "bowl" }, { kind = "close", fixture = "cabinet" }]
"""


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_file_becomes_a_suite_with_tasks_of_its_own(tmp_path):
    suite = load_suite(write(tmp_path, HEAD + TIDY))
    assert (suite.name, suite.tasks, suite.horizon) == ("mine", ("tidy", "press"), 100)
    tidy = suite.task("tidy")
    assert tidy.steps == (
        Step(GoalKind.IN, "in", "a", fixture="bowl"),
        Step(GoalKind.CLOSE, "close", fixture="cabinet"),
    )
    assert tidy.drawer == 1.0 and suite.task("press") is TASKS["press"]
    assert pickle.loads(pickle.dumps(suite)) == suite  # it travels to the processes that simulate


def test_episodes_of_such_a_task_have_its_goals_and_say_them(tmp_path):
    suite = load_suite(write(tmp_path, HEAD + TIDY))
    scene = SCENES["counter"]
    bowl = [kind for _, kind in place_names(scene)].index("bowl")
    episode = sample_episode(suite, scene, 5_000_000, task="tidy")
    assert episode.goals == (
        Goal(GoalKind.IN, object=episode.slots[0], place=bowl),
        Goal(GoalKind.CLOSE, joint=0),
    )
    assert "then" in episode.instruction and episode.openings[0] == 1.0


def test_the_shipped_suites_read_as_before():
    for name in suite_names():
        assert load_suite(name).name == name and load_suite(name).new_tasks == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (HEAD, "unknown task 'tidy'"),
        (HEAD.replace('"counter"', '"countre"') + TIDY, "did you mean 'counter'"),
        (HEAD + TIDY.replace('"in"', '"inn"'), "unknown kind of goal in task tidy 'inn'; did you mean 'in'"),
        (HEAD + TIDY.replace('"bowl"', '"box"'), "unknown fixture in scene 'counter' for task tidy 'box'"),
        (HEAD + TIDY.replace('object = "a", ', ""), "needs 'object'"),
        (HEAD + TIDY.replace('"a"', '"c"'), "role is a or b"),
        (HEAD.replace("horizon = 100", "horizons = 100") + TIDY, "did you mean 'horizon'"),
        (HEAD.replace("horizon = 100", "") + TIDY, "lacks the field 'horizon'"),
        (HEAD + "[new_tasks.tidy]\nsteps = []", "must have 1 to 3 steps"),
        (HEAD.replace('"counter"', '"tabletop"') + TIDY, "unknown task of scene 'tabletop' 'tidy'"),
        ("horizon = ", "Invalid value"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, complaint):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="suite file") as caught:
        load_suite(path)
    assert complaint in str(caught.value) and path in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="there is no suite file"):
        load_suite(str(tmp_path / "none.toml"))
