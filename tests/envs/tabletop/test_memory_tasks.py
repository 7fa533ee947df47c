"""The suite whose next step depends on what was done: its rules, its lamps, and that the pictures do not tell."""

from copy import deepcopy

import numpy as np
import pytest

from envs.backends.cpu_worlds import TabletopWorlds
from envs.experts.goals import GoalExpert
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from envs.tabletop import goals as rules
from envs.tabletop.episodes import sample_episode
from envs.tabletop.goals import Goal, GoalKind, empty_state, write_goals
from envs.tabletop.scene import SCENES

LEFT, MIDDLE, RIGHT = range(3)


def panel(*joints, strict=True, hold=rules.HOLD_STEPS):
    state = empty_state(1, np.array([0.02]), np.zeros(0), 3)
    goals = tuple(Goal(GoalKind.PRESS, joint=joint, hold=hold) for joint in joints)
    write_goals(state, 0, goals, (0,), strict=strict)
    return state


def press(state, joint, steps=rules.HOLD_STEPS):
    """Press for `steps` control steps, then let go for one: (done, wrong) at any of them."""
    done = wrong = False
    for down in (*[1.0] * steps, 0.0):
        state.joints[0] = 0.0
        state.joints[0, joint] = down
        done |= bool(rules.advance(state)[0])
        wrong |= bool(rules.wrong_object(state)[0])
    return done, wrong


def test_a_press_counts_once_until_the_button_is_let_go():
    state = panel(LEFT, LEFT, RIGHT)
    assert press(state, LEFT, steps=5 * rules.HOLD_STEPS) == (False, False) and state.stage[0] == 1
    assert press(state, LEFT) == (False, False) and state.stage[0] == 2
    assert press(state, RIGHT) == (True, False)


def test_a_button_pressed_out_of_turn_or_once_too_often_is_wrong_in_a_strict_task_only():
    for strict in (True, False):
        state = panel(LEFT, RIGHT, strict=strict)
        assert press(state, RIGHT, steps=1) == (False, strict)
        state = panel(LEFT, RIGHT, strict=strict)
        assert press(state, LEFT) == (False, False)
        assert press(state, LEFT, steps=1) == (False, strict)
        assert press(panel(LEFT, RIGHT, strict=strict), MIDDLE, steps=1) == (False, strict)  # no goal is about it


def test_a_press_must_last_as_long_as_its_goal_says():
    state = panel(LEFT, RIGHT, hold=20)
    assert press(state, LEFT, steps=19) == (False, False) and state.stage[0] == 0
    press(state, LEFT, steps=20)
    assert state.stage[0] == 1


@pytest.fixture(scope="module")
def worlds():
    worlds = TabletopWorlds(load_suite("tabletop-memory"), 4, render=RenderOptions(image_size=48))
    yield worlds
    worlds.close()


def _white(image):
    """Pixels that are bright in every colour: nothing but a lamp is."""
    return int((image.min(-1) > 205).sum())


def test_the_expert_solves_every_task_and_a_lamp_shows_a_press_that_counts(worlds):
    tasks = worlds.suite.tasks
    worlds.reset(seeds=[5_000_000 + k for k in range(4)], tasks=[*tasks, *tasks])
    expert, solved, lit, dark = GoalExpert(4), np.zeros(4, bool), [], []
    while not worlds.over.all():
        result = worlds.step_chunk(expert.act(worlds.observation()))
        solved |= result.info["success"]
        if not worlds.over[2]:
            (lit if worlds.state.spent[2].any() else dark).append(_white(worlds.images[2, 1]))
    assert solved.all() and len(lit) > 4
    assert min(lit) > 20 and max(dark) == 0
    holds = {goal.hold for episode in worlds.episodes for goal in episode.goals}
    assert min(holds) == rules.HOLD_STEPS and max(holds) > 10


def _green(image):
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    return int(((green > red + 40) & (green > blue + 40)).sum())


@pytest.fixture(scope="module")
def flashing():
    worlds = TabletopWorlds(load_suite("tabletop-lamps"), 6, render=RenderOptions(image_size=48))
    yield worlds
    worlds.close()


def test_lamps_flash_while_one_has_to_wait_and_show_nothing_more_until_all_are_lit(flashing):
    suite = flashing.suite
    flashing.reset(seeds=[3_000_000 + k for k in range(6)], tasks=suite.tasks)
    expert, solved, seen = GoalExpert(6), np.zeros(6, bool), [[] for _ in range(6)]
    while not flashing.over.all():
        over = flashing.over.copy()
        solved |= flashing.step_chunk(expert.act(flashing.observation())).info["success"]
        for i in np.flatnonzero(~over & ~flashing.over):
            lamps = rules.lit(flashing.state, i, flashing.episodes[i].flashes, int(flashing.elapsed[i]))
            seen[i].append((int(flashing.state.stage[i]), tuple(lamps), _green(flashing.images[i, 0])))
    assert solved.all()
    for i, task in enumerate(suite.tasks):
        wanted = flashing.episodes[i].goals[1].joint
        waiting = [(lamps, green) for stage, lamps, green in seen[i] if stage == 0]
        flashed = {lamp for lamps, _ in waiting for lamp in lamps}
        assert flashed == ({wanted} if task.startswith("was-lit") else {LEFT, MIDDLE, RIGHT} - {wanted})
        assert all(sum(lamps == (lamp,) for lamps, _ in waiting) == 16 for lamp in flashed)
        assert all(not lamps for lamps, _ in waiting[-4:]), "the flash must be over before the choice"
        after = [(lamps, green) for stage, lamps, green in seen[i] if stage == 1]
        assert all(lamps == (LEFT, MIDDLE, RIGHT) for lamps, _ in after)
        dark = [green for lamps, green in waiting if not lamps]
        assert max(dark) == 0 < min(green for _, green in after)
        assert all(green for lamps, green in waiting if lamps)


def test_pressing_too_soon_or_another_button_than_the_right_one_is_a_failure(flashing):
    flashing.reset(seeds=[3_000_000] * 6, tasks=flashing.suite.tasks)
    for i, episode in enumerate(flashing.episodes):
        wait, choice = episode.goals
        assert wait.hold > max(stop for _, _, stop in episode.flashes)
        for joint in (LEFT, MIDDLE, RIGHT):
            state = empty_state(1, np.array([0.02]), np.zeros(0), 3)
            write_goals(state, 0, episode.goals, (0,), strict=True)
            assert press(deepcopy(state), joint, steps=1) == (False, True), "while one has to wait, no button is right"
            for _ in range(wait.hold - 1):
                assert not rules.advance(state)[0] and state.stage[0] == 0
            assert not rules.advance(state)[0] and state.stage[0] == 1
            assert press(state, joint) == ((True, False) if joint == choice.joint else (False, True)), (i, joint)


def test_sentences_about_lamps_do_not_say_which_and_the_other_instruction_is_the_opposite(flashing):
    suite = flashing.suite
    for phrasings in ("train", "heldout"):
        for seed in range(40):
            for kind, other in (("was-lit", "not-lit"), ("not-lit", "was-lit")):
                told = [
                    sample_episode(suite, SCENES["panel"], seed, task=f"{kind}-{side}", phrasings=phrasings)
                    for side in ("left", "middle", "right")
                ]
                assert len({episode.instruction for episode in told}) == 1
                (left, *_) = told
                opposite = sample_episode(suite, SCENES["panel"], seed, task=f"{other}-left", phrasings=phrasings)
                never = {" never " in text for text in (left.instruction, opposite.swapped_instruction)}
                assert never == {kind == "not-lit"} and (" never " in left.swapped_instruction) == (kind == "was-lit")
                assert all(a.goals[1].joint != a.swapped_goals[1].joint for a in told)


def test_only_a_panels_buttons_are_strict_and_flash(tmp_path):
    suite = tmp_path / "suite.toml"
    head = (
        'scene = "{}"\ntasks = ["short"]\nobjects_per_episode = 2\nplates_per_episode = 0\nhorizon = 9\n'
        'eval_seed0 = 5000000\ndescription = "x"\n[new_tasks.short]\n'
    )
    for scene, task, words in (
        ("row", 'strict = true\nsteps = [{kind = "lift", object = "a"}]', "strict is about the buttons"),
        ("panel", 'flash = "wanted"\nsteps = [{kind = "press", fixture = "middle-button"}]', "lamps flash in a strict"),
        ("panel", 'flash = "wnated"\nsteps = [{kind = "press", fixture = "middle-button"}]', "flash"),
    ):
        suite.write_text(head.format(scene) + task)
        with pytest.raises(ValueError, match=words):
            load_suite(str(suite))


def test_the_other_instruction_asks_for_the_mirrored_task(worlds):
    worlds.reset(seeds=[1, 2, 3, 4], tasks=[*worlds.suite.tasks] * 2)
    swap = {LEFT: RIGHT, RIGHT: LEFT, MIDDLE: MIDDLE}
    for episode in worlds.episodes:
        assert [swap[goal.joint] for goal in episode.goals] == [goal.joint for goal in episode.swapped_goals]
        assert episode.swapped_instruction != episode.instruction


def test_one_short_sentence_tells_the_whole_task_and_names_the_button_that_comes_first():
    suite = load_suite("tabletop-memory")
    for task, first, other in (("other-button", "yellow", "yellow"), ("press-twice", "red", "blue")):
        for phrasings in ("train", "heldout"):
            told = [sample_episode(suite, SCENES["panel"], seed, task=task, phrasings=phrasings) for seed in range(60)]
            assert len({episode.instruction for episode in told}) >= 2
            for episode in told:
                words, mirrored = episode.instruction.split(), episode.swapped_instruction.split()
                assert len(words) < 20 and {"red", "yellow", "blue"} & {*words} == {first}
                assert {"red", "yellow", "blue"} & {*mirrored} == {other}
                if task == "other-button":
                    assert "from left to right" in episode.instruction
                    assert "from right to left" in episode.swapped_instruction


def test_a_task_told_in_a_sentence_about_buttons_must_have_them(tmp_path):
    suite = tmp_path / "suite.toml"
    suite.write_text(
        'scene = "panel"\ntasks = ["short"]\nobjects_per_episode = 1\nplates_per_episode = 0\nhorizon = 9\n'
        'eval_seed0 = 5000000\ndescription = "x"\n[new_tasks.short]\ntold = "twice"\n'
        'steps = [{kind = "press", fixture = "middle-button"}]\n'
    )
    with pytest.raises(ValueError, match="about the buttons"):
        load_suite(str(suite))
    suite.write_text(suite.read_text().replace('told = "twice"', 'told = "twise"'))
    with pytest.raises(ValueError, match="did you mean 'twice'"):
        load_suite(str(suite))


def test_warp_says_that_it_draws_no_lamps():
    pytest.importorskip("mujoco_warp")
    from envs.backends.warp_vec_env import WarpVecEnv

    with pytest.raises(ValueError, match="only --backend cpu draws"):
        WarpVecEnv(load_suite("tabletop-memory"), 1, device="cpu")
