"""Worlds whose policy answers late: what is played when, what is made up for, and who is told."""

import numpy as np
import pytest

from envs.backends.delayed_env import DelayedVecEnv
from vla.core.types import ActionSpec, Observation, StepResult, VecEnv

N, LATE = 3, 2
SPEC = ActionSpec(names=("dx", "gripper"), low=(-1.0, -1.0), high=(1.0, 1.0), control_hz=10.0)


class Track(VecEnv):
    """Worlds on a line that keep a record of every action; an episode is `horizon` steps."""

    action_spec, cameras, proprio_dim, privileged_dim = SPEC, (), 1, 1

    def __init__(self, num_envs, horizon=100):
        self.num_envs, self.horizon = num_envs, horizon
        self.x, self.steps = np.zeros(num_envs), np.zeros(num_envs, int)
        self.played = [[] for _ in range(num_envs)]

    def reset(self, *, seeds, tasks=None, env_ids=None):
        for i in range(self.num_envs) if env_ids is None else env_ids:
            self.x[i], self.steps[i], self.played[i] = 0.0, 0, []
        return self.obs()

    def observation(self):
        return self.obs()

    def obs(self):
        x = self.x[:, None].astype(np.float32)
        return Observation({}, x, [""] * self.num_envs, privileged=x)

    def step_chunk(self, chunk):
        n = np.zeros(self.num_envs, int)
        for i in range(self.num_envs):
            for action in chunk[i]:
                if self.steps[i] < self.horizon:
                    self.x[i] += action[0]
                    self.played[i].append(action.copy())
                    self.steps[i], n[i] = self.steps[i] + 1, n[i] + 1
        false = np.zeros(self.num_envs, bool)
        over = self.steps >= self.horizon
        info = {"success": false, "wrong_object": false}
        return StepResult(self.obs(), np.zeros(self.num_envs, np.float32), false, over, n, info)


def worlds(num_envs=24, horizon=100):
    track = Track(num_envs, horizon)
    late = DelayedVecEnv(track, n_action_steps=N, late_steps=LATE)
    late.reset(seeds=range(num_envs))
    assert set(late.late) == {0, 1, 2}, "every lateness is drawn"
    return late, track


def chunk_of(values):
    """The same chunk in every world: displacements `values`, a gripper that tells which chunk it is."""
    return lambda num_envs, mark: np.tile(np.array([[v, mark] for v in values], np.float32), (num_envs, 1, 1))


def test_what_is_played_when():
    env, track = worlds()
    still = chunk_of([0.0] * 5)
    for mark in (0.1, 0.2, 0.3):
        env.step_chunk(still(env.num_envs, mark))
    for i, d in enumerate(env.late):
        marks = [round(float(action[1]), 1) for action in track.played[i]]
        # the first chunk at once; later ones when they arrive, and until then the one before
        assert marks == [0.1] * N + [0.1] * d + [0.2] * (N - d) + [0.2] * d + [0.3] * (N - d)


def test_the_later_actions_of_the_old_chunk_go_on_in_order():
    env, track = worlds()
    env.step_chunk(chunk_of([0.01, 0.02, 0.03, 0.04, 0.05])(env.num_envs, 1.0))
    env.step_chunk(chunk_of([0.0] * 5)(env.num_envs, -1.0))
    i = int(np.flatnonzero(env.late == 2)[0])
    assert np.allclose([a[0] for a in track.played[i]][:5], [0.01, 0.02, 0.03, 0.04, 0.05])


def test_what_was_meant_and_not_played_is_made_up_for():
    env, track = worlds()
    env.step_chunk(chunk_of([0.0] * 5)(env.num_envs, 1.0))
    env.step_chunk(chunk_of([0.4, 0.4, 0.0, 0.0, 0.0])(env.num_envs, 1.0))
    # a late robot plays nothing of what a chunk begins with, but goes there: a debt is paid in four parts, and three
    # actions are played before the next chunk takes over
    goes_to = track.x + np.array([env._left[i, :d, 0].sum() for i, d in enumerate(env.late)])
    assert np.allclose(goes_to[env.late == 0], 0.8)
    assert np.allclose(goes_to[env.late == 1], 0.4 + 0.4 * 3 / 4)
    assert np.allclose(goes_to[env.late == 2], 0.8 * 3 / 4)


def test_a_policy_that_knows_where_to_go_arrives_however_late():
    env, track = worlds()
    for _ in range(20):
        left = 3.0 - track.x
        steps = np.clip(np.repeat(left[:, None] / 5, 5, 1), -0.3, 0.3)
        env.step_chunk(np.stack([steps, np.ones_like(steps)], -1).astype(np.float32))
    assert np.allclose(track.x, 3.0, atol=0.05)


def test_it_tells_which_actions_count():
    env, _ = worlds(horizon=7)
    chunk = chunk_of([0.0] * 5)(env.num_envs, 1.0)
    assert (env.step_chunk(chunk).executed_until == N + env.late).all()
    env.step_chunk(chunk)
    result = env.step_chunk(chunk)
    assert result.truncated.all()
    assert (result.executed_until == 1).all(), "nothing is played after the end"


def test_the_critic_knows_what_is_still_to_be_played():
    env, track = worlds()
    obs = env.step_chunk(chunk_of([0.1, 0.2, 0.3, 0.4, 0.5])(env.num_envs, 1.0)).obs
    assert obs.privileged.shape == (env.num_envs, env.privileged_dim) and env.privileged_dim == 1 + 1 + LATE * 2
    for row, x, d in zip(obs.privileged, track.x, env.late, strict=True):
        left = [[0.4, 1.0], [0.5, 1.0]][:d] + [[0.0, 0.0]] * (LATE - d)
        assert np.allclose(row, [x, d / LATE, *np.ravel(left)])


def test_the_seed_draws_the_lateness_and_a_new_episode_starts_without_leftovers():
    env, track = worlds()
    before = env.late.copy()
    env.step_chunk(chunk_of([0.5] * 5)(env.num_envs, 1.0))
    env.reset(seeds=[5, 6], env_ids=[0, 1])
    again = DelayedVecEnv(Track(2), n_action_steps=N, late_steps=LATE)
    again.reset(seeds=[5, 6])
    assert (env.late[:2] == again.late).all() and (env.late[2:] == before[2:]).all()
    env.step_chunk(chunk_of([0.0] * 5)(env.num_envs, -1.0))
    assert track.x[0] == 0.0 and (np.array(track.played[0])[:, 1] == -1).all()


def test_a_chunk_that_is_too_short_is_refused():
    env, _ = worlds()
    with pytest.raises(ValueError, match="need chunks of 5 actions, got 3"):
        env.step_chunk(np.zeros((env.num_envs, 3, 2), np.float32))
