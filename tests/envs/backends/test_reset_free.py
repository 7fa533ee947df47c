"""Episodes without resets: the same world goes on, every episode is counted, and so is every real reset."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from envs import make_vec
from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.backends.cpu_worlds import TabletopWorlds
from envs.backends.reset_free_env import ResetFreeVecEnv, out_of_reach
from envs.experts.goals import GoalExpert
from envs.registry import load_suite
from envs.tabletop import goals as rules
from envs.tabletop.goals import GoalKind

PAIR = ("into-tray", "out-of-tray")


@pytest.fixture(scope="module")
def worlds() -> Iterator[MujocoVecEnv]:
    env = make_vec("tabletop-tray", 3, num_workers=2)
    env.set_rendering(False)
    yield env
    env.close()


class Scenes:
    def __init__(self) -> None:
        self.drawn: list[int] = []

    def __call__(self, count: int) -> list[int]:
        fresh = [100 + len(self.drawn) + k for k in range(count)]
        self.drawn += fresh
        return fresh


def still(env: ResetFreeVecEnv, steps: int = 2) -> np.ndarray:
    action = np.zeros((env.num_envs, steps, 4), np.float32)
    action[..., 3] = 1.0
    return action


def test_the_undo_begins_where_the_task_ends() -> None:
    world = TabletopWorlds(load_suite("tabletop-tray"), 4)
    world.render_images = False
    seeds = [1, 2, 3, 4]
    world.reset(seeds=seeds, tasks=[PAIR[0]] * 4)
    outside = world.state.objects.copy()
    assert not rules.achieved(world.state)[:, 0].any()
    world.reset(seeds=seeds, tasks=[PAIR[1]] * 4)
    assert not rules.achieved(world.state)[:, 0].any()
    world.continue_episodes(seeds, [PAIR[0]] * 4, None)
    apart = np.linalg.norm(world.state.objects[world.state.row[:, 0], world.state.goal_object[:, 0]] - world.state.grip)
    assert rules.achieved(world.state)[:, 0].all() and apart > 0.05  # in the tray, and nobody holds it
    slots = np.arange(4), [1 - episode.slots[0] for episode in world.episodes]
    assert np.abs(outside[slots] - world.state.objects[slots]).max() < 1e-9  # everything else stands as it did
    world.close()


def test_going_on_changes_the_goal_and_the_words_and_nothing_else(worlds: MujocoVecEnv) -> None:
    obs = worlds.reset(seeds=[5, 6, 7], tasks=[PAIR[0]] * 3)
    action = np.full((3, 2, 4), 0.3, np.float32)
    before = worlds.step_chunk(action).obs
    after = worlds.continue_episodes(seeds=[8, 9], tasks=[PAIR[1]] * 2, env_ids=[0, 2])
    assert after.privileged is not None and before.privileged is not None
    np.testing.assert_array_equal(after.proprio, before.proprio)
    np.testing.assert_array_equal(after.privileged[:, :6], before.privileged[:, :6])  # the object and the hand
    assert worlds.tasks == [PAIR[1], PAIR[0], PAIR[1]] and after.instruction[1] == obs.instruction[1]
    assert after.instruction[0] != obs.instruction[0] and after.instruction[2] != obs.instruction[2]
    kind = after.privileged[:, 16:24].argmax(1)
    assert kind.tolist() == [GoalKind.ON, GoalKind.IN, GoalKind.ON]


def test_tasks_that_need_other_things_cannot_go_on(worlds: MujocoVecEnv) -> None:
    worlds.reset(seeds=[5, 6, 7])
    with pytest.raises(ValueError, match="has no task 'bowl'"):
        worlds.continue_episodes(seeds=[1, 2, 3], tasks=["bowl"] * 3)
    object_worlds = TabletopWorlds(load_suite("tabletop-object"), 1)
    object_worlds.place(0, object_worlds.source.sample(0))
    with pytest.raises(ValueError, match="cannot go on in its scene"):
        object_worlds.continue_episodes([0], ["lift-ball"], None)


def test_every_episode_is_counted_and_every_real_reset(worlds: MujocoVecEnv) -> None:
    scenes = Scenes()
    env = ResetFreeVecEnv(worlds, PAIR, scenes, reset_every=2, horizon=4)
    env.start()
    begun, rounds = env.num_envs, 0
    while not env.reset_is_due:
        assert not env.step_chunk(still(env)).truncated.any()
        assert env.step_chunk(still(env)).truncated.all()
        env.begin(range(env.num_envs))
        begun, rounds = begun + env.num_envs, rounds + 1
        assert env.tasks == [PAIR[rounds % 2]] * 3
    counts = env.counts
    assert rounds == 2 and counts.scheduled == 3 and counts.out_of_reach == counts.broken == 0
    assert counts.scheduled + counts.continued == begun and len(scenes.drawn) == 3
    env.start()
    assert counts.scheduled == 6 and not env.reset_is_due and env.tasks == [PAIR[0]] * 3


def test_an_object_that_is_out_of_reach_costs_a_reset_of_its_own(
    worlds: MujocoVecEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = Scenes()
    env = ResetFreeVecEnv(worlds, PAIR, scenes)
    env.start()
    lost = np.array([False, True, False])
    monkeypatch.setattr("envs.backends.reset_free_env.out_of_reach", lambda position: lost)
    result = env.step_chunk(still(env))
    np.testing.assert_array_equal(result.truncated, lost)
    np.testing.assert_array_equal(result.info["out_of_reach"], lost)
    monkeypatch.undo()
    env.begin([1])
    assert env.counts.out_of_reach == 1 and env.counts.continued == 0 and len(scenes.drawn) == 4
    assert env.tasks[1] == PAIR[0] and not env.step_chunk(still(env)).truncated.any()


def test_reach_is_the_grippers_workspace() -> None:
    inside, aside, fallen = (0.5, 0.1, 0.02), (0.5, 0.27, 0.02), (0.5, 0.1, -0.3)
    assert out_of_reach(np.array([inside, aside, fallen])).tolist() == [False, True, True]


def test_success_is_told_and_ends_nothing() -> None:
    env = ResetFreeVecEnv(make_vec("tabletop-tray", 1, num_workers=1), PAIR, Scenes(), horizon=90)
    try:
        env.set_rendering(False)
        expert = GoalExpert(1)
        env.start()
        steps = 0
        while not env.step_chunk(expert.act(env.observation())).info["success"][0]:
            steps += 1
        for _ in range(3):  # the world goes on, and the episode with it
            result = env.step_chunk(still(env))
            assert result.n_steps[0] == 2 and result.info["success"][0] and not result.terminated[0]
        env.begin([0])
        expert.reset()
        result = env.step_chunk(expert.act(env.observation()))
        assert not result.info["success"][0] and env.tasks == [PAIR[1]] and env.elapsed[0] == 1
        while not result.truncated[0] and not result.info["success"][0]:
            result = env.step_chunk(expert.act(env.observation()))
        assert result.info["success"][0]  # out again, from where it was left
    finally:
        env.close()
