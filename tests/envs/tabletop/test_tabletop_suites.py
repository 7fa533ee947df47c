"""The suites with goals: what their seeds mean, what their rules count, that their expert solves every task."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from envs import make_vec
from envs.backends.cpu_worlds import TabletopWorlds
from envs.evaluation.evaluate import evaluate
from envs.evaluation.reset_checks import check_resets
from envs.experts.goals import GoalExpert
from envs.experts.registry import make_expert
from envs.registry import all_suite_names, load_suite
from envs.seeds import FIRST_EVALUATION_SEED, RL_TRAIN_SEEDS, SCENE_RANGES, chosen_by
from envs.tabletop import goals as rules
from envs.tabletop.episodes import Episode, sample_episode
from envs.tabletop.goals import Goal, GoalKind
from envs.tabletop.language import GOAL_TEMPLATES
from envs.tabletop.scene import SCENES, joint_names
from envs.tabletop.tasks import TASKS, novel_color

SUITES = ("tabletop-spatial", "tabletop-object", "tabletop-goal", "tabletop-long")


def build(suite: str, n: int) -> TabletopWorlds:
    worlds = TabletopWorlds(load_suite(suite), n)
    worlds.render_images = False
    return worlds


def sample(suite: str, seeds: range, **how: str) -> list[Episode]:
    spec = load_suite(suite)
    return [sample_episode(spec, SCENES[spec.scene], seed, **how) for seed in seeds]


def test_there_are_enough_tasks_kinds_and_articulated_things() -> None:
    specs = [load_suite(suite) for suite in SUITES]
    tasks = [task for spec in specs for task in spec.tasks]
    assert len(tasks) == len(set(tasks)) >= 30 and set(tasks) <= set(TASKS)
    lifted = {
        SCENES[spec.scene].objects[goal.object]
        for suite, spec in zip(SUITES, specs, strict=True)
        for episode in sample(suite, range(60))
        for goal in episode.goals
        if goal.kind <= GoalKind.STACK
    }
    assert len(lifted) >= 8
    assert len({kind for spec in specs for _, kind in joint_names(SCENES[spec.scene])}) >= 2
    assert {len(TASKS[task].steps) for task in load_suite("tabletop-long").tasks} == {2, 3}
    assert all(spec.eval_seed0 == 5_000_000 for spec in specs)


@pytest.mark.parametrize("suite", SUITES)
def test_a_seed_is_an_episode_and_words_do_not_change_it(suite: str) -> None:
    words = ("instruction", "template", "swapped_instruction")
    for first, again, other in zip(
        sample(suite, range(40)), sample(suite, range(40)), sample(suite, range(40), phrasings="heldout"), strict=True
    ):
        assert first == again and first.instruction != other.instruction
        blank = dict.fromkeys(words, "")
        assert dataclasses.replace(first, **blank) == dataclasses.replace(other, **blank)
        assert first.instruction != first.swapped_instruction and first.goals != first.swapped_goals
    task = load_suite(suite).tasks[-1]
    assert {episode.task for episode in sample(suite, range(10), task=task)} == {task}
    assert {episode.task for episode in sample(suite, range(300))} == set(load_suite(suite).tasks)


@pytest.mark.parametrize("suite", [*SUITES, "tabletop-ten"])
def test_heldout_phrasings_are_new_sentences_of_known_words(suite: str) -> None:
    train = [episode.instruction for episode in sample(suite, range(1500))]
    heldout = [episode.instruction for episode in sample(suite, range(400), phrasings="heldout")]
    assert not set(train) & set(heldout)
    assert {w for text in heldout for w in text.split()} <= {w for text in train for w in text.split()}


def test_every_goal_has_five_phrasings_and_held_out_ones() -> None:
    for texts in GOAL_TEMPLATES.values():
        assert len(set(texts["train"])) >= 5 and texts["heldout"] and not set(texts["train"]) & set(texts["heldout"])


def subjects(episode: Episode, suite: str) -> list[tuple[str, str, str]]:
    """(kind, goal words, colour) of everything the goals of an episode name first."""
    scene, plan, out = SCENES[load_suite(suite).scene], TASKS[episode.task], []
    for step, goal in zip(plan.steps, episode.goals, strict=True):
        if step.object:
            kind, color = scene.objects[goal.object], episode.colors[episode.slots.index(goal.object)]
        else:
            kind, color = step.fixture, episode.fixture_colors[scene.fixtures.index(step.fixture)]
        out.append((kind, f"{step.words} {plan.relation or step.fixture}", color))
    return out


@pytest.mark.parametrize("suite", SUITES)
def test_novel_combinations_occur_in_novel_episodes_and_nowhere_else(suite: str) -> None:
    for phrasings in ("train", "heldout"):
        for episode in sample(suite, range(200), phrasings=phrasings):
            assert all(color != novel_color(kind, words) for kind, words, color in subjects(episode, suite))
    for episode, usual in zip(sample(suite, range(100), phrasings="novel"), sample(suite, range(100)), strict=True):
        kind, words, color = subjects(episode, suite)[0]
        assert color == novel_color(kind, words)
        assert (episode.poses, episode.goals) == (usual.poses, usual.goals)


def test_suites_without_held_out_colours_say_so() -> None:
    with pytest.raises(ValueError, match="holds no colours back"):
        sample("tabletop-pick", range(1), phrasings="novel")


def test_relations_are_true_and_mean_one_cube_only() -> None:
    for episode in sample("tabletop-spatial", range(400)):
        at = np.array([pose[:2] for pose in episode.poses])
        plate, bowl = np.array(episode.plate_xy[0]), np.array(episode.fixtures[0][:2])
        assert episode.goals[0].object == episode.slots[0]
        ahead, right = (at - plate).T  # +x is toward the front camera, +y to the right of its picture
        far = np.linalg.norm(at - plate, axis=1)
        beside = np.linalg.norm(at - plate, axis=1) + np.linalg.norm(at - bowl, axis=1)
        value = {
            "left": -right, "right": right, "front": ahead, "behind": -ahead, "nearest": -far, "farthest": far,
            "between": -beside, "leftmost": -at[:, 1], "rightmost": at[:, 1],
        }[TASKS[episode.task].relation]  # fmt: skip
        if TASKS[episode.task].relation in ("left", "right", "front", "behind"):
            across = np.abs(ahead if TASKS[episode.task].relation in ("left", "right") else right)
            inside = (value > 0.02) & (across < value)
            assert inside[0] and not inside[1:].any()
        else:
            assert value.argmax() == 0


@pytest.mark.parametrize("suite", [*SUITES, "tabletop-ten"])
def test_the_expert_solves_every_task(suite: str) -> None:
    tasks = load_suite(suite).tasks
    worlds, expert = build(suite, len(tasks)), make_expert(suite, len(tasks))
    worlds.reset(seeds=range(300, 300 + len(tasks)), tasks=tasks)
    success = np.zeros(len(tasks), bool)
    while not worlds.over.all():
        success |= worlds.step_chunk(expert.act(worlds.observation())).info["success"]
    assert success.sum() >= len(tasks) - 1, [task for task, ok in zip(tasks, success, strict=True) if not ok]


@pytest.mark.parametrize("suite", ["tabletop-goal", "tabletop-object"])
def test_doing_what_the_swapped_instruction_says_fails(suite: str) -> None:
    tasks = load_suite(suite).tasks[:9]
    worlds, expert = build(suite, len(tasks)), GoalExpert(len(tasks))
    worlds.reset(seeds=range(400, 400 + len(tasks)), tasks=tasks)
    told = rules.empty_state(
        len(tasks), worlds.state.rest_height, worlds.index.place_radius, len(worlds.index.joint_qpos)
    )
    for i, episode in enumerate(worlds.episodes):
        rules.write_goals(told, i, episode.swapped_goals, episode.slots)
    obeyed, success = np.zeros(len(tasks), bool), np.zeros(len(tasks), bool)
    while not worlds.over.all():
        for name in ("objects", "places", "joints", "handles", "grip", "finger_opening"):
            setattr(told, name, getattr(worlds.state, name))
        obs = worlds.observation()
        obs.privileged[:] = rules.privileged(told, worlds._gripper, worlds._command, np, full=True)
        success |= worlds.step_chunk(expert.act(obs)).info["success"]
        obeyed |= rules.advance(told)
    assert not success.any()
    # Lifting what is not named ends the episode at 5 cm, before it counts as lifted.
    assert obeyed.sum() + worlds._wrong.sum() >= len(tasks) - 1


def placed(goals: tuple[Goal, ...]) -> rules.WorldState:
    """One world, two objects of 2 cm rest height at (0.5, 0) and (0.6, 0), one place of 5 cm around the first, one
    joint, the hand far away and open."""
    state = rules.empty_state(1, np.array([0.02, 0.02]), np.array([0.05]), 1)
    rules.write_goals(state, 0, goals, (0, 1))
    state.objects[0] = [[0.5, 0.0, 0.02], [0.6, 0.0, 0.02]]
    state.places[0, 0] = [0.5, 0.0, 0.0]
    state.grip[0] = [0.4, 0.2, 0.2]
    return state


def held_for(state: rules.WorldState, steps: int) -> bool:
    return any([bool(rules.advance(state)[0]) for _ in range(steps)])


def test_goals_count_in_order_and_what_was_placed_must_stay() -> None:
    state = placed((Goal(GoalKind.PRESS), Goal(GoalKind.ON, 0)))
    assert not held_for(state, 20) and state.stage[0] == 0  # placed, but not yet pressed
    state.joints[0] = 1.0
    assert not held_for(state, rules.HOLD_STEPS) and state.stage[0] == 1
    assert not held_for(state, rules.HOLD_STEPS - 1) and held_for(state, 1)

    state = placed((Goal(GoalKind.ON, 0), Goal(GoalKind.PRESS)))
    assert not held_for(state, rules.HOLD_STEPS) and state.stage[0] == 1
    state.joints[0] = 1.0
    state.objects[0, 0, 0] = 0.7  # knocked off again
    assert not held_for(state, 20)
    state.objects[0, 0, 0] = 0.5
    state.finger_opening[0] = 0.0  # a hand that does something else may be closed
    assert held_for(state, rules.HOLD_STEPS)


def test_each_kind_of_goal() -> None:
    held = placed((Goal(GoalKind.ON, 0),))
    held.grip[0] = [0.5, 0.0, 0.03]
    assert not rules.holds(held)[0, 0]  # still in the hand
    tipped = placed((Goal(GoalKind.ON, 0),))
    tipped.objects[0, 0, 2] = 0.005
    assert not rules.holds(tipped)[0, 0]
    tipped.goal_kind[:] = GoalKind.IN  # within a container it may lie
    assert rules.holds(tipped)[0, 0]
    tipped.objects[0, 0, 2] = 0.05  # on the rim
    assert not rules.holds(tipped)[0, 0]
    stacked = placed((Goal(GoalKind.STACK, 0, base=1),))
    assert not rules.holds(stacked)[0, 0]
    stacked.objects[0, 0] = [0.605, 0.0, 0.06]
    assert rules.holds(stacked)[0, 0]
    for opening, expected in ((0.0, (False, True)), (0.5, (False, False)), (1.0, (True, False))):
        drawer = placed((Goal(GoalKind.OPEN), Goal(GoalKind.CLOSE)))
        drawer.joints[0] = opening
        assert tuple(rules.holds(drawer)[0, :2]) == expected


def test_what_is_pushed_must_not_be_lifted() -> None:
    state = placed((Goal(GoalKind.PUSH, 0),))
    assert rules.holds(state)[0, 0] and not rules.wrong_object(state)[0]
    state.objects[0, 0, 2] = 0.09
    assert rules.wrong_object(state)[0]
    state = placed((Goal(GoalKind.LIFT, 0),))
    state.objects[0, :, 2] = 0.09
    assert rules.wrong_object(state)[0]
    state.active[0, 1] = False
    assert not rules.wrong_object(state)[0]


def test_the_rules_judge_tensors_as_arrays() -> None:
    torch = pytest.importorskip("torch")
    rng, n = np.random.default_rng(0), 400
    state = rules.empty_state(n, np.array([0.02, 0.03, 0.014]), np.array([0.055, 0.05]), 2)
    for i in range(n):
        kinds = rng.integers(len(GoalKind), size=rng.integers(1, 4))
        chosen = tuple(
            Goal(GoalKind(int(k)), int(rng.integers(2)), int(rng.integers(2)), 2, int(rng.integers(2))) for k in kinds
        )
        rules.write_goals(state, i, chosen, (0, 1, 2))
    state.objects[:] = rng.uniform([0.5, 0.0, 0.01], [0.55, 0.05, 0.2], (n, 3, 3))
    state.objects[::2, :, 2] = 0.02
    state.places[:] = rng.uniform([0.5, 0.0, 0.0], [0.55, 0.05, 0.01], (n, 2, 3))
    state.joints[:], state.handles[:] = rng.random((n, 2)), rng.random((n, 2, 3))
    state.grip[:], state.finger_opening[:] = state.objects[:, 0] + rng.normal(0, 0.04, (n, 3)), rng.random(n)
    tensors = rules.WorldState(**{name: torch.as_tensor(value.copy()) for name, value in vars(state).items()})
    judged = rules.holds(state)
    assert judged.any(axis=0).all() and len({GoalKind(int(k)) for k in state.goal_kind[judged]}) == len(GoalKind)
    assert np.array_equal(judged, rules.holds(tensors).numpy())
    for _ in range(3 * rules.HOLD_STEPS):
        assert np.array_equal(rules.advance(state), rules.advance(tensors).numpy())
        assert np.array_equal(state.stage, tensors.stage.numpy())
    assert state.stage.max() == 2
    assert np.array_equal(rules.wrong_object(state), rules.wrong_object(tensors).numpy())
    gripper, command = rng.random(n), rng.random((n, 3))
    for full, width in ((False, rules.PRIVILEGED_DIM), (True, rules.PRIVILEGED_FULL_DIM)):
        ours = rules.privileged(state, gripper, command, np, full=full)
        theirs = rules.privileged(tensors, torch.as_tensor(gripper), torch.as_tensor(command), torch, full=full)
        assert ours.shape == (n, width) and np.array_equal(ours, theirs.numpy())


def test_things_stay_where_they_are_put_and_buttons_spring_back() -> None:
    worlds = build("tabletop-goal", 2)
    worlds.reset(seeds=[3, 3], tasks=["open", "close"])
    away = [slot for slot in range(4) if slot not in worlds.episodes[0].slots]
    before = worlds.state.objects.copy()
    cap = worlds.index.joint_qpos[1]
    for data in worlds.data:
        data.qpos[cap] = 0.012
    worlds.step_chunk(np.tile(np.array([0, 0, 0, 1], np.float32), (2, 60, 1)))
    assert np.abs(worlds.state.objects[:, away] - before[:, away]).max() < 1e-3  # hanging in the air
    assert np.abs(worlds.state.joints[:, 0] - [0, 1]).max() < 0.02  # the drawer, as it was
    assert np.abs(worlds.state.joints[:, 1]).max() < 0.05


def test_evaluation_counts_per_task_over_workers() -> None:
    env = make_vec("tabletop-goal", 6, num_workers=2, phrasings="novel")
    try:
        env.set_rendering(False)
        report = evaluate(make_expert("tabletop-goal", 6), env, range(5_000_000, 5_000_012), suite="tabletop-goal")
    finally:
        env.close()
    assert report.successes >= 11 and sum(count.episodes for count in report.per_task.values()) == 12
    assert len(report.per_task) > 3 and len(report.per_phrasing) > 3


def test_random_resets_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in check_resets((*SUITES, "tabletop-mixed"), 25).values():
        assert found.sound and found.resets == 25

    def heap(*args: object, **kwargs: object) -> Episode:
        episode = sample_episode(*args, **kwargs)  # type: ignore[arg-type]
        return dataclasses.replace(episode, poses=tuple((0.5, 0.01 * k, 0.0) for k in range(len(episode.poses))))

    monkeypatch.setattr("envs.tabletop.episode_source.sample_episode", heap)
    assert check_resets(["tabletop-spatial"], 5)["tabletop-spatial"].shifted == 5
    monkeypatch.setattr(
        "envs.tabletop.episode_source.sample_episode", lambda *args, **kwargs: next(itertools.count(1 / 0))
    )
    broken = check_resets(["tabletop-spatial"], 5)["tabletop-spatial"]
    assert broken.exceptions == 5 and "ZeroDivision" in broken.first_error


def test_scenes_that_must_not_be_shared_have_disjoint_seeds() -> None:
    ranges = sorted(SCENE_RANGES.values(), key=lambda range_: range_.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ranges))
    assert ranges[0].start <= RL_TRAIN_SEEDS[0] < RL_TRAIN_SEEDS[1] <= SCENE_RANGES["training"].stop
    for name in all_suite_names():
        assert load_suite(name).eval_seed0 in SCENE_RANGES["evaluation"]
    lerobot = (Path(__file__).parents[3] / "policies/lerobot/config_tabletop.py").read_text()
    assert f"first_seed: int = {FIRST_EVALUATION_SEED:_}\n" in lerobot  # it may not import envs


def test_scenes_with_another_purpose_than_evaluation_are_named():
    assert "scenes 0 to 9 are for training: a policy may have learnt" in chosen_by(range(10))
    assert "scenes 3,000,000 to 3,000,004 are for validation" in chosen_by(range(2_999_990, 3_000_005))
    assert "scenes 4,999,999 to 4,999,999 are for retention" in chosen_by(range(4_999_999, 5_000_001))
    assert chosen_by(range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + 300)) == ""
