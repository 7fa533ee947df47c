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
PER = HEAD.replace("objects_per_episode = 2", "objects_per_episode = {}")
SEED0 = HEAD.replace("5_000_000", "{}")
TIDY = """
[new_tasks.tidy]
drawer = 1.0
steps = [{ kind = "in", object = "a", fixture = "bowl" }, { kind = "close", fixture = "cabinet" }]
"""
PICK = HEAD.replace('"counter"', '"tabletop"').replace('["tidy", "press"]', '["pick"]')


def one(steps, more=""):
    return HEAD.replace('["tidy", "press"]', '["tidy"]') + f"[new_tasks.tidy]\n{more}\nsteps = [{{ {steps} }}]"


def panel(field, value, *buttons):
    head = HEAD.replace('"counter"', '"panel"').replace("objects_per_episode = 2", "objects_per_episode = 1")
    steps = ", ".join(f'{{ kind = "press", fixture = "{button}" }}' for button in buttons)
    head = head.replace('["tidy", "press"]', '["tidy"]').replace("plates_per_episode = 1", "plates_per_episode = 0")
    return f'{head}[new_tasks.tidy]\n{field} = "{value}"\nsteps = [{steps}]'


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
        (HEAD + "[new_tasks.tidy]\nsteps = []", "must have 1 to 5 steps"),
        (HEAD.replace('"counter"', '"tabletop"') + TIDY, "unknown task of scene 'tabletop' 'tidy'"),
        ("horizon = ", "Invalid value"),
        (HEAD.replace("100", "0") + TIDY, "horizon must be from 1 to 1,000,000, control steps, got 0"),
        (HEAD.replace("100", "-5") + TIDY, "horizon must be from 1 to 1,000,000, control steps, got -5"),
        (HEAD.replace('["tidy", "press"]', "[]") + TIDY, "tasks is empty: name at least one"),
        (HEAD.replace('"press"', '"tidy"') + TIDY, "tasks names 'tidy' twice"),
        (PER.format(0) + TIDY, "objects_per_episode must be from 2 to 4, as scene 'counter' can show, got 0"),
        (PER.format(40) + TIDY, "objects_per_episode must be from 2 to 4, as scene 'counter' can show, got 40"),
        (HEAD.replace("plates_per_episode = 1", "plates_per_episode = 0") + TIDY, "plates_per_episode must be 1, for"),
        (SEED0.format(-3) + TIDY, "eval_seed0 must be from 5,000,000 to"),
        (SEED0.format(0) + TIDY, "since seeds below are those of training and of the choice of checkpoints, got 0"),
        (SEED0.format(3_000_000) + TIDY, "eval_seed0 must be from 5,000,000 to"),
        (HEAD + "num_views = 3\n" + TIDY, "num_views must be 2, the cameras of every scene, got 3"),
        (HEAD + TIDY.replace("1.0", "1.5"), "drawer of task tidy must be from 0 to 1, got 1.5"),
        (HEAD + TIDY + 'kind = "cup"', "unknown kind of object in scene 'counter' for task tidy 'cup'"),
        (HEAD + TIDY + 'relation = "lft"', "unknown relation of task tidy 'lft'; did you mean 'left'"),
        ("new_tasks = [1]" + HEAD, "new_tasks must be a table, got [1]"),
        (HEAD + "[new_tasks]\ntidy = 1", "new_tasks.tidy must be a table, got 1"),
        (HEAD + "[new_tasks.tidy]\nsteps = 1", "new_tasks.tidy.steps must be a list, got 1"),
        (HEAD + '[new_tasks.tidy]\nsteps = ["in"]', "a step of new_tasks.tidy must be a table, got 'in'"),
        ('name = "other"' + HEAD + TIDY, "leave 'name' out"),
        (HEAD + TIDY + TIDY.replace(".tidy", ".tidier"), "new_tasks.tidier is drawn in no episode"),
        (PICK + TIDY.replace("tidy", "pick"), "scene 'tabletop' has tasks of its own only"),
        (one('kind = "lift", object = "a", fixture = "bowl"'), "a step of kind lift takes no 'fixture'"),
        (one('kind = "press", object = "a", fixture = "button"'), "a step of kind press takes no 'object'"),
        (one('kind = "stack", object = "a", base = "a"'), "'a' cannot be stacked on itself"),
        (one('kind = "press", fixture = "cabinet"'), "'cabinet' does not go with a step of kind press, which takes bu"),
        (one('kind = "on", object = "a", fixture = "button"'), "kind on, which takes plate, bowl, zone, cabinet"),
        (one('kind = "lift", object = "a", words = "on"'), "words 'on' do not tell a step of kind lift"),
        (one('kind = "press", fixture = "button", words = "open"'), "words 'open' do not tell a step of kind press"),
        (one('kind = "lift", object = "a", shortest_hold = 9'), "held from shortest_hold to longest_hold"),
        (one('kind = "lift", object = "a" }, { kind = "lift", object = "a"'), "ask to lift the same"),
        (one('kind = "open", fixture = "cabinet"'), "may be open already when it begins: set drawer = 0.0"),
        (one('kind = "close", fixture = "cabinet"', "drawer = 0.0"), "closed already when it begins: set drawer = 1.0"),
        (one('kind = "in", object = "a", fixture = "bowl"', 'inside = "bowl"'), "lies in the bowl already"),
        (one('kind = "press", fixture = "button"', 'kind = "cube"'), "kind is about the object 'a'"),
        (one('kind = "lift", object = "b"', 'relation = "left"'), "relation is about the object 'a'"),
        (one('kind = "stack", object = "a", base = "b"', 'relation = "left"'), "a relation tells 'a' alone"),
        (one('kind = "in", object = "a", fixture = "cabinet"', 'kind = "can"'), "a can does not fit into the drawer"),
        (panel("told", "before-each", "left-button", "right-button"), "about the buttons pressed in the order middle-"),
        (panel("told", "was-lit", "left-button", "right-button"), "flash = 'wanted' goes with told = 'was-lit'"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, complaint):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="suite file") as caught:
        load_suite(path)
    assert complaint in str(caught.value) and path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("press", ['fixture = "button", longest_hold = 20', 'fixture = "middle-button"'])
def test_the_swapped_instruction_of_a_press_of_ones_own_asks_for_something_else(tmp_path, press):
    text = one(f'kind = "press", {press}')
    if "middle" in press:
        text = panel("kind", "", "middle-button")
    suite = load_suite(write(tmp_path, text))
    episode = sample_episode(suite, SCENES[suite.scene], 5_000_000)
    assert [(g.kind, g.joint) for g in episode.swapped_goals] != [(g.kind, g.joint) for g in episode.goals]


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="there is no suite file"):
        load_suite(str(tmp_path / "none.toml"))
