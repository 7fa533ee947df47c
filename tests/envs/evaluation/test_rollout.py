"""Evaluation: every seed counted once, whatever the number of worlds; the floor policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.evaluation.baselines import BlindReplay, BlindReplayOfTasks, ZeroPolicy, expert_actions
from envs.evaluation.evaluate import evaluate, wilson95
from envs.evaluation.failures import Failures
from envs.experts.pick_place import TabletopExpert
from envs.make import make_cpu_vec
from envs.sim.render_options import RenderOptions
from vla.core.types import ActionChunk, Observation, Prefix, StepResult


@pytest.fixture(scope="module")
def env() -> Iterator[MujocoVecEnv]:
    made = make_cpu_vec("tabletop-pick", 3, num_workers=1, phrasings="train", render=RenderOptions(32))
    yield made
    made.close()


def test_wilson_interval_against_known_values() -> None:
    assert wilson95(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson95(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    assert wilson95(98, 100) == pytest.approx((0.93000, 0.99450), abs=1e-4)


def test_more_seeds_than_worlds_are_all_counted(env: MujocoVecEnv) -> None:
    seeds = range(5_000_000, 5_000_008)
    report = evaluate(TabletopExpert(3), env, seeds, suite="tabletop-pick", num_films=1)
    assert report.episodes == 8 and report.successes >= 7
    assert sum(c.episodes for c in report.per_phrasing.values()) == 8
    assert sum(c.successes for c in report.per_task.values()) == report.successes
    assert report.seeds == (5_000_000, 5_000_007)
    film = report.films[0]
    assert film.success and film.frames[0].shape == (32, 64, 3) and len(film.frames) > 10
    alone = evaluate(TabletopExpert(3), env, [5_000_003])
    assert alone.episodes == 1


def test_a_report_names_no_other_suite_than_was_played(env: MujocoVecEnv) -> None:
    with pytest.raises(ValueError, match="these environments are of the suite tabletop-pick, not tabletop-place"):
        evaluate(TabletopExpert(3), env, [5_000_000], suite="tabletop-place")


def test_who_does_not_look_fails(env: MujocoVecEnv) -> None:
    seeds = range(5_000_000, 5_000_006)
    assert evaluate(ZeroPolicy(env.action_spec), env, seeds).successes == 0
    actions = expert_actions("tabletop-pick", 0)
    blind = evaluate(BlindReplay(actions, 3), env, seeds)
    assert blind.successes <= 1
    # and the same actions on their own scene succeed, open loop: the control is a real demonstration
    own = next(s for s in range(5) if len(expert_actions("tabletop-pick", s)) == len(actions))
    assert evaluate(BlindReplay(actions, 3), env, [own]).successes == 1


def test_blind_replay_of_tasks_plays_each_episodes_own_demonstration() -> None:
    both = make_cpu_vec("tabletop-mixed", 2, num_workers=1, phrasings="train", render=RenderOptions(32))
    both.set_rendering(False)
    demos = {task: expert_actions("tabletop-mixed", 0, task=task) for task in both.task_names}
    blind = BlindReplayOfTasks("tabletop-mixed", both)
    for tasks in (list(both.task_names)[:2], list(both.task_names)[1::-1]):
        obs = both.reset(seeds=[7, 7], tasks=tasks)
        blind.reset()
        for start in (0, 8):
            expected = np.stack([demos[task][start : start + 8] for task in tasks])
            np.testing.assert_array_equal(blind.act(obs), expected)
    both.close()


def test_swapping_tells_the_policy_something_else(env: MujocoVecEnv) -> None:
    heard: list[str] = []

    class Listener(ZeroPolicy):
        def act(self, obs: Observation) -> ActionChunk:
            heard.extend(obs.instruction)
            return super().act(obs)

    env.reset(seeds=[1, 2, 3])
    truth, swapped = env.observation().instruction, env.alternative_instructions()
    evaluate(Listener(env.action_spec), env, [1, 2, 3], swap_instruction=True)
    assert set(heard) == set(swapped) and not set(heard) & set(truth)


def test_the_policy_is_told_which_environments_still_play(env: MujocoVecEnv) -> None:
    live: list[int] = []

    class Listener(TabletopExpert):
        def act(self, obs: Observation, **more: object) -> ActionChunk:
            assert obs.live is not None
            live.append(int(obs.live.sum()))
            chunk = super().act(obs, **more)
            return np.where(obs.live[:, None, None], chunk, 0)  # what an idle environment is sent plays no part

    seeds = range(5_000_000, 5_000_004)
    told, plain = evaluate(Listener(3), env, seeds), evaluate(TabletopExpert(3), env, seeds)
    assert (told.successes, told.mean_steps) == (plain.successes, plain.mean_steps)
    assert live[0] == 3 and live[-1] == 1
    live.clear()
    evaluate(Listener(3), env, seeds[:2])
    assert live[0] == 2  # the third environment plays for nobody


def test_no_seeds_is_an_error(env: MujocoVecEnv) -> None:
    with pytest.raises(ValueError, match="seed"):
        evaluate(ZeroPolicy(env.action_spec), env, np.array([], int))


def test_the_worst_failures_are_kept_in_pictures(env: MujocoVecEnv) -> None:
    seeds, zero = range(5_000_000, 5_000_007), ZeroPolicy(env.action_spec)
    earliest, unexpected = Failures(2), Failures(2, np.isin(np.arange(7), (4, 6)))
    for failures in (earliest, unexpected):
        report = evaluate(zero, env, seeds, failures=failures)
    assert report.outcomes == ["out of time"] * 7
    assert [one.episode for one in earliest.kept] == [0, 1]
    assert [one.episode for one in unexpected.kept] == [4, 6]
    env.reset(seeds=[5_000_006] * 3)
    obs, worst = env.observation(), unexpected.kept[1]
    assert worst.instruction == obs.instruction[0] and worst.outcome == "out of time"
    assert (worst.first == np.concatenate([image[0] for image in obs.images.values()], axis=1)).all()
    assert worst.last.shape == worst.first.shape
    none = Failures(2)
    solved = evaluate(TabletopExpert(3), env, seeds, failures=none)
    assert [outcome != "success" for outcome in solved.outcomes].count(True) == len(none.kept) == 7 - solved.successes


def test_a_seed_given_twice_is_no_second_scene(env: MujocoVecEnv) -> None:
    with pytest.raises(ValueError, match="seed 7 is given more than once"):
        evaluate(ZeroPolicy(env.action_spec), env, [5, 7, 8, 7])


class Unsure(TabletopExpert):
    """The expert, which sees what it is told to take from the third decision of an episode on, and then no more; in
    every third environment never."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs)
        self.spec = replace(self.spec, grounding_threshold=0.5)
        self.decisions = np.zeros(num_envs, int)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        super().reset(env_ids)
        self.decisions[slice(None) if env_ids is None else list(env_ids)] = 0

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        self.decisions += 1
        self.confidence = np.where((self.decisions == 3) & (np.arange(len(self.decisions)) < 2), 0.9, 0.1)
        return super().act(obs)


def test_a_policy_is_held_until_it_first_sees_its_object(env: MujocoVecEnv) -> None:
    seeds = range(5_000_000, 5_000_003)
    first = []
    step = env.step_chunk

    def watched(chunk: ActionChunk) -> StepResult:
        result = step(chunk)
        first.append((np.array(chunk[:, 0]), result.obs.proprio.copy()))
        return result

    env.step_chunk = watched  # type: ignore[method-assign]
    try:
        report = evaluate(Unsure(3), env, seeds, hold_ungrounded=True)
    finally:
        del env.step_chunk
    assert report.successes == 2 and not report.wrong_object, "two go on once they have seen it; the third never begins"
    assert report.held is not None and report.held["episodes"] == 3
    assert report.held["held_decisions"] == 2 + 2 + sum(1 for _ in first), "the third is held in every decision"
    still, moving = first[1][0], first[2][0]
    np.testing.assert_array_equal(still, [[0, 0, 0, 1]] * 3)
    assert (moving[:2, :3] != 0).any(1).all() and (moving[2] == [0, 0, 0, 1]).all()
    start, end = first[0][1][2], first[-1][1][2]
    np.testing.assert_allclose(start[:3], end[:3], atol=5e-3)
    assert report.to_dict()["held"] == report.held and "held" not in evaluate(Unsure(3), env, seeds).to_dict()
    with pytest.raises(ValueError, match="does not tell how surely it sees"):
        evaluate(TabletopExpert(3), env, seeds, hold_ungrounded=True)
