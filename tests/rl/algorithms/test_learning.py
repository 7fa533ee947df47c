"""learning: over several seeds the real chunk PPO and GRPO learn, do no harm, and fail when the advantage lies."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import rl.algorithms.ppo
from bascule.experiments.gym_control import MlpNetwork
from rl.algorithms.ppo import PPO
from rl.configs.learning import ActorConfig, GRPOConfig, PPOConfig
from rl.models.actor import GaussianChunkActor, GreedyPolicy
from rl.models.critic import Critic
from rl.rollout.step_collector import Collector
from rl.runner import Runner
from rl.storage.rollout_buffer import RolloutBuffer
from tests.rl.toy import PointReach, ToyVLA, config, evaluate, learning_config
from vla.core.types import ActionSpec, Observation, StepResult, executed

SEEDS = [1, 2, 3]
GROUPS = GRPOConfig(lr=6e-4, epochs=4, minibatch_size=256, group_size=8, kl_stop=0.1, episodes_per_update=96)


def rates(policy, out, settings) -> list[float]:
    """Success of the greedy policy, from before the first update to after the last."""
    model = ToyVLA()
    model.load_state_dict(policy)
    result = Runner(model, PointReach(settings.num_envs), settings, out, evaluate=evaluate).run()
    return [successes / episodes for _, successes, episodes in result.evaluations]


def lie(monkeypatch) -> None:
    real = rl.algorithms.ppo.normalise
    monkeypatch.setattr(rl.algorithms.ppo, "normalise", lambda *batch: -real(*batch))


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_learns(cloned, tmp_path, seed):
    before, *_, after = rates(cloned, tmp_path, learning_config(seed=seed))
    assert 0.4 <= before <= 0.6 and after >= 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_learns(cloned, tmp_path, seed):
    settings = config(num_envs=64, max_updates=24, eval_every=24, seed=seed)
    before, after = rates(cloned, tmp_path, replace(settings, method=GROUPS))
    assert 0.4 <= before <= 0.6 and after >= 0.85


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sign_flipped_advantage_unlearns(cloned, tmp_path, seed, monkeypatch):
    lie(monkeypatch)
    settings = replace(learning_config(seed=seed), max_updates=12, eval_every=12)
    before, after = rates(cloned, tmp_path, settings)
    assert after < 0.6 * before, "what passes the tests above must fail by a flipped sign"


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_does_not_degrade_a_policy_that_is_good_already(precise, tmp_path, seed):
    settings = replace(learning_config(seed=seed), max_updates=12, eval_every=12, target_success=None)
    before, after = rates(precise, tmp_path, settings)
    assert before >= 0.95 and after >= 0.9


class Bandit(PointReach):
    """One decision: a chunk of three steps, each worth more the nearer it is to what is seen."""

    action_spec = ActionSpec(("x", "y"), (-2.0, -2.0), (2.0, 2.0), 20.0)
    privileged_dim, horizon = 0, 3

    def _obs(self) -> Observation:
        nothing = np.zeros((self.num_envs, 0), np.float32)
        return Observation({}, self.goal.copy(), [""] * self.num_envs, nothing)

    def step_chunk(self, chunk) -> StepResult:
        reward = -np.abs(chunk - self.goal[:, None]).mean((1, 2)).astype(np.float32)
        over, never = np.ones(self.num_envs, bool), np.zeros(self.num_envs, bool)
        info = {"success": never, "wrong_object": never}
        return StepResult(self._obs(), reward, over, never, np.full(self.num_envs, 3), info)


def distance(seed: int) -> tuple[float, float]:
    """Mean distance of the greedy chunk to the best one, before and after learning."""
    env = Bandit(64)
    model = MlpNetwork(2, 2, chunk_size=3, hidden=(32, 32), seed=seed)
    actor = GaussianChunkActor(model, env.action_spec.names, ActorConfig(motion_std=0.3))
    torch.manual_seed(seed)
    settings = PPOConfig(lr=3e-3, minibatch_size=64, critic_warmup=0, epochs=4)
    learner = PPO(actor, Critic(0, 2), settings, generator=torch.Generator().manual_seed(seed))
    noise = torch.Generator().manual_seed(seed + 100)
    collector = Collector(actor, env, generator=noise, train_seeds=(0, 100_000), first_seed=seed)
    return before_and_after(env, learner, collector, RolloutBuffer(2, 64), updates=40)


def before_and_after(
    env: Bandit, learner: PPO, collector: Collector, buffer: RolloutBuffer, *, updates: int
) -> tuple[float, float]:
    """Mean distance of the greedy chunk to the best one, before and after that many updates."""
    policy, found = GreedyPolicy(learner.actor, env.action_spec, 3), []
    for more in (0, updates):
        for _ in range(more):
            buffer.clear()
            collector.collect(buffer)
            learner.update(buffer)
        seen = env.reset(seeds=range(200_000, 200_064))
        found.append(-float(env.step_chunk(executed(policy.spec, policy.act(seen))).reward.mean()))
        collector.forget_worlds()
    return found[0], found[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bandit_of_chunks_is_solved_and_by_a_flipped_sign_is_not(seed, monkeypatch):
    before, after = distance(seed)
    assert before > 0.3 and after < 0.1
    lie(monkeypatch)
    before, after = distance(seed)
    assert after > 1.5 * before
