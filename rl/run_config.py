"""What a refinement run is (`RunnerConfig`), how it ended (`RunResult`), and the parts that its method needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from rl.algorithms.filtered_bc import FilteredImitation
from rl.algorithms.grpo import GRPO
from rl.algorithms.policy_gradient import PolicyLearner
from rl.algorithms.ppo import PPO
from rl.configs.learning import GRPOConfig
from rl.configs.run import RunnerConfig
from rl.models.actor import GaussianChunkActor
from rl.models.critic import Critic
from rl.rollout.episode_collector import EpisodeCollector
from rl.rollout.step_collector import Collector
from rl.storage.episode_buffer import EpisodeBuffer
from rl.storage.rollout_buffer import RolloutBuffer, Transitions
from vla.runtime.distributed import Team


class Gather(Protocol):
    """Fills a buffer from the worlds; returns rates."""

    def collect(self, buffer: Transitions) -> dict[str, float]: ...


@dataclass(frozen=True)
class Method:
    """What one update is made of: `gather.collect(buffer)`, then `learner.update(buffer)`."""

    learner: PolicyLearner
    gather: Gather
    buffer: RolloutBuffer | EpisodeBuffer


def make_method(config: RunnerConfig, actor: GaussianChunkActor, worlds: Collector, team: Team) -> Method:
    """The learner that the configuration names, with what fills its buffer."""
    env, how = worlds.env, config.method
    order = torch.Generator().manual_seed(2 * config.seed)
    if how is None:
        width, worlds.critic_reads = 0, config.critic.reads
        if config.critic.reads != "privileged":  # how wide the policy's latents are is known once it has looked
            seen = env.reset(seeds=[config.train_seeds[0]] * env.num_envs)
            width = actor.latents_of(*actor.encode(seen)).shape[1]
        # the critic's initial weights follow from the run's seed, not from whatever ran before in this process
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            critic = Critic(env.privileged_dim, env.proprio_dim, config.critic, latent_dim=width).to(actor.device)
        ppo = PPO(actor, critic, config.ppo, generator=order, team=team)
        return Method(ppo, worlds, RolloutBuffer(config.decisions_per_update, env.num_envs))
    group = how.group_size if isinstance(how, GRPOConfig) else 1
    learner = (
        GRPO(actor, how, generator=order, team=team)
        if isinstance(how, GRPOConfig)
        else FilteredImitation(actor, how, generator=order, team=team)
    )
    gather = EpisodeCollector(
        worlds,
        group_size=group,
        wanted=how.episodes_per_update,
        max_rounds=how.max_rounds,
        judge=learner.judge,
        team=team,
    )
    return Method(learner, gather, EpisodeBuffer(gather.capacity))
