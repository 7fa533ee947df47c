"""Stable-Baselines3: our worlds through its learners, its models through our evaluation, its arithmetic beside ours."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="the extra 'sb3' is not installed")

from stable_baselines3 import PPO, SAC  # noqa: E402
from stable_baselines3.common.buffers import RolloutBuffer  # noqa: E402
from stable_baselines3.common.distributions import DiagGaussianDistribution  # noqa: E402
from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402
from stable_baselines3.common.vec_env import VecCheckNan, VecMonitor, VecNormalize  # noqa: E402

from envs.backends.cpu_worlds import TabletopWorlds  # noqa: E402
from envs.evaluation.evaluate import evaluate  # noqa: E402
from envs.experts.pick_place import TabletopExpert  # noqa: E402
from envs.registry import load_suite  # noqa: E402
from envs.seeds import TRAIN_SEED_LIMIT
from envs.sim.render_options import RenderOptions
from rl.algorithms.advantages import gae  # noqa: E402
from rl.external.sb3 import SB3Policy, StateVecEnv, fill_replay, leave_no_log, state_of  # noqa: E402
from rl.models.distribution import ChunkGaussian  # noqa: E402
from vla.core.types import Policy  # noqa: E402

HORIZON = load_suite("tabletop-pick").horizon
WAIT = np.array([0, 0, 0, 1], np.float32)


def worlds(n: int = 2) -> TabletopWorlds:
    return TabletopWorlds(load_suite("tabletop-pick"), n, render=RenderOptions(image_size=16))


@pytest.fixture
def env() -> StateVecEnv:
    return StateVecEnv(worlds(), seed=3)


def test_sb3_sees_what_the_worlds_hold(env: StateVecEnv) -> None:
    state = env.reset()
    assert state in env.observation_space or state.shape == (2, *env.observation_space.shape)
    assert np.array_equal(state, state_of(env.env.observation()))
    twin = StateVecEnv(worlds(), seed=3)
    assert np.array_equal(state, twin.reset()) and not np.array_equal(state, twin.reset())
    twin.seed(11)
    env.seed(11)
    assert np.array_equal(env.reset(), twin.reset()), "SB3's seed() fixes what follows"
    assert all(e.seed < TRAIN_SEED_LIMIT for e in env.env.episodes)


def test_the_horizon_is_a_time_limit_and_success_is_not(env: StateVecEnv) -> None:
    env.reset()
    expert = TabletopExpert(2)
    ends, before = {}, None
    for t in range(HORIZON):
        action = np.stack([expert.act(env.obs)[0, 0], WAIT])  # world 0 works until it has succeeded, world 1 waits
        state, reward, done, infos = env.step(action)
        for i in np.flatnonzero(done):
            ends.setdefault(i, (t + 1, reward[i], infos[i], state[i].copy(), before[i]))
        before = state
        if 0 in ends:
            expert.reset()
    steps, reward, info, fresh, previous = ends[0]
    assert steps < HORIZON and reward == 1 and info["success"] and not info["TimeLimit.truncated"]
    # The last observation is the finished episode's, the one returned is the next episode's.
    proprio = env.env.proprio_dim
    assert np.abs(info["terminal_observation"][:3] - previous[:3]).max() < 0.05
    assert not np.allclose(info["terminal_observation"][proprio:], fresh[proprio:], atol=1e-3)
    steps, reward, info, *_ = ends[1]
    assert steps == HORIZON and reward == 0 and info["TimeLimit.truncated"] and not info["success"]
    assert "terminal_observation" in info


def test_unfinished_worlds_are_not_touched_by_a_reset_beside_them(env: StateVecEnv) -> None:
    env.reset()
    for _ in range(5):
        env.env.elapsed[0] = 0  # world 0 lags behind world 1
        env.step(np.stack([WAIT, WAIT]))
    env.env.elapsed[1] = HORIZON - 1
    episode = env.env.episodes[0]
    _, _, done, infos = env.step(np.stack([WAIT, WAIT]))
    assert done.tolist() == [False, True] and env.env.episodes[0] is episode
    assert "terminal_observation" not in infos[0]


def test_ppo_learns_steps_saves_and_is_scored_by_our_evaluation(tmp_path, env: StateVecEnv) -> None:
    torch.manual_seed(0)
    learner = VecCheckNan(VecMonitor(env), raise_exception=True)
    model = PPO("MlpPolicy", learner, n_steps=64, batch_size=64, n_epochs=2, seed=0, device="cpu")
    before = [p.detach().clone() for p in model.policy.parameters()]
    leave_no_log(model)
    model.learn(256)
    assert model.num_timesteps == 256 and len(model.ep_info_buffer) > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))

    policy = SB3Policy(model)
    assert isinstance(policy, Policy)
    model.save(tmp_path / "ppo.zip")
    again = SB3Policy(PPO.load(tmp_path / "ppo.zip", device="cpu"))
    env.reset()
    chunk = policy.act(env.obs)
    assert chunk.shape == (2, 1, 4) and chunk.dtype == np.float32
    assert np.array_equal(chunk, again.act(env.obs))
    assert (np.abs(chunk) <= 1).all()
    dark = worlds()
    dark.render_images = False
    report = evaluate(again, dark, [5_000_000, 5_000_001], name="sb3")
    assert report.episodes == 2 and report.chunk_size == 1


def test_our_evaluation_and_sb3s_agree(env: StateVecEnv) -> None:
    """A model that has learned the task from the expert is scored alike by both: observations and actions arrive."""
    expert = TabletopExpert(2)

    class Model:  # the expert behind SB3's predict()
        def predict(self, observations, state=None, episode_start=None, deterministic=True):
            if episode_start is not None and np.any(episode_start):
                expert.reset([int(i) for i in np.flatnonzero(episode_start)])
            return expert.act(env.obs)[:, 0], None

    rewards, lengths = evaluate_policy(Model(), VecMonitor(env), n_eval_episodes=6, return_episode_rewards=True)
    assert np.mean(rewards) >= 5 / 6 and max(lengths) <= HORIZON


def test_normalised_observations_reach_the_model() -> None:
    env = VecNormalize(StateVecEnv(worlds(), seed=1), norm_reward=False)
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu")
    leave_no_log(model)
    model.learn(64)
    inner = env.unwrapped
    inner.reset()
    ours = SB3Policy(model, normalise=env).act(inner.obs)[:, 0]
    theirs, _ = model.predict(env.normalize_obs(state_of(inner.obs)), deterministic=True)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, SB3Policy(model).act(inner.obs)[:, 0])


def test_sac_learns_from_the_experts_episodes(env: StateVecEnv) -> None:
    model = SAC(
        "MlpPolicy", env, learning_starts=0, batch_size=64, train_freq=4, seed=0, device="cpu", buffer_size=2000
    )
    stored, successes = fill_replay(model, TabletopExpert(2), 6)
    assert successes >= 5 and model.replay_buffer.pos == stored // 2
    buffer = model.replay_buffer
    assert buffer.rewards[: buffer.pos].sum() == successes
    # Success ends an episode for good: it must not be bootstrapped, so it must not count as a time limit.
    won = buffer.rewards[: buffer.pos] == 1
    assert buffer.dones[: buffer.pos][won].all() and not buffer.timeouts[: buffer.pos][won].any()
    # Where an episode ended, the next observation stored is its own last one: the arm has hardly moved.
    moved = np.abs(buffer.next_observations[: buffer.pos, :, :3] - buffer.observations[: buffer.pos, :, :3]).max(-1)
    assert moved[won].max() < 0.06
    leave_no_log(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.learn(64)
    assert model.num_timesteps == 64 and model._n_updates > 0
    with pytest.raises(ValueError, match="SAC or TD3"):
        fill_replay(PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu"), TabletopExpert(2), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 1.0), (1.0, 0.0)])
def test_gae_is_sb3s(gamma: float, lam: float, env: StateVecEnv) -> None:
    rng = np.random.default_rng(0)
    steps, n = 40, 7
    rewards, values = (rng.normal(size=(steps, n)).astype(np.float32) for _ in range(2))
    final = rng.normal(size=(steps, n)).astype(np.float32)  # value of the state an episode ended in
    last = rng.normal(size=n).astype(np.float32)
    terminated = rng.random((steps, n)) < 0.08
    truncated = ~terminated & (rng.random((steps, n)) < 0.08)
    done = terminated | truncated
    assert terminated.any() and truncated.any() and done[-1].any()

    buffer = RolloutBuffer(steps, env.observation_space, env.action_space, "cpu", gae_lambda=lam, gamma=gamma, n_envs=n)
    starts = np.ones(n, bool)
    for t in range(steps):
        # What OnPolicyAlgorithm.collect_rollouts does with a time limit: its value joins the reward.
        reward = rewards[t] + gamma * final[t] * truncated[t]
        obs, action = np.zeros((n, *env.observation_space.shape)), np.zeros((n, 4))
        buffer.add(obs, action, reward, starts, torch.tensor(values[t]), torch.zeros(n))
        starts = done[t]
    buffer.compute_returns_and_advantage(torch.tensor(last), done[-1])

    following = np.concatenate([values[1:], last[None]])
    ours = gae(
        torch.tensor(rewards),
        torch.tensor(values),
        torch.tensor(np.where(done, final, following)),
        torch.tensor(terminated),
        torch.tensor(truncated),
        torch.full((steps, n), gamma),
        lam,
    )
    assert np.abs(ours.numpy() - buffer.advantages).max() < 1e-5
    assert np.abs(ours.numpy() + values - buffer.returns).max() < 1e-5


def test_log_probabilities_of_one_step_chunks_are_sb3s() -> None:
    torch.manual_seed(0)
    mean, action, log_std = torch.randn(5, 4), torch.randn(5, 4), torch.randn(4) * 0.3
    theirs = DiagGaussianDistribution(4).proba_distribution(mean, log_std).log_prob(action)
    ours = ChunkGaussian(mean[:, None], log_std).log_prob(action[:, None], torch.ones(5, 1, dtype=torch.bool))
    assert torch.allclose(ours, theirs, atol=1e-5)
