"""The parts of one update: which collector fills which buffer, and which learner learns from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rl import streams
from rl.algorithms.filtered_bc import FilteredImitation
from rl.algorithms.grpo import GRPO
from rl.algorithms.policy_gradient import PolicyLearner
from rl.algorithms.ppo import PPO
from rl.configs.learning import CriticConfig, GRPOConfig
from rl.configs.run import RunnerConfig
from rl.models.actor import ChunkActor
from rl.models.critic import Critic
from rl.models.policy_inputs import summary
from rl.rollout.episode_collector import EpisodeCollector
from rl.rollout.step_collector import Collector
from rl.storage.episode_buffer import EpisodeBuffer
from rl.storage.rollout_buffer import RolloutBuffer
from vla.runtime.distributed import Team


class BufferCollector(Protocol):
    """Fills a buffer from the environments."""

    def collect(self, buffer: Any) -> dict[str, float]:
        """Fill `buffer` (the kind that the collector is paired with) and return counts and rates for the log."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """One update is `collector.collect(buffer)`, then `learner.update(buffer)`."""

    learner: PolicyLearner
    collector: BufferCollector
    buffer: RolloutBuffer | EpisodeBuffer


def make_algorithm(config: RunnerConfig, actor: ChunkActor, collector: Collector, team: Team) -> Algorithm:
    """Return the algorithm that `config` names; `collector` plays its episodes."""
    env, method, order = collector.env, config.method, streams.minibatches(config.seed)
    if method is None:
        critic = make_critic(collector, config.critic, config.seed).to(actor.device)
        ppo = PPO(actor, critic, config.ppo, generator=order, team=team)
        return Algorithm(ppo, collector, RolloutBuffer(config.decisions_per_update, env.num_envs))
    learner: GRPO | FilteredImitation
    if isinstance(method, GRPOConfig):
        learner, group_size = GRPO(actor, method, generator=order, team=team), method.group_size
    else:
        learner, group_size = FilteredImitation(actor, method, generator=order, team=team), 1
    episodes = EpisodeCollector(
        collector,
        group_size=group_size,
        wanted=method.episodes_per_update,
        max_rounds=method.max_rounds,
        judge=learner.judge,
        team=team,
    )
    return Algorithm(learner, episodes, EpisodeBuffer(episodes.capacity))


def make_critic(collector: Collector, config: CriticConfig, seed: int) -> Critic:
    """Return a critic of what `collector` stores. Its initial weights follow from `seed`, not from the process's random
    state."""
    env = collector.env
    widths = (env.privileged_dim, env.proprio_dim)
    if config.reads == "latents":
        seen = env.reset(seeds=[collector.low] * env.num_envs)  # nothing but a look tells how wide latents are
        widths = summary(*collector.actor.encode(seen)).shape[1], 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Critic(*widths, config)
