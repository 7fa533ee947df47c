"""What a refinement run is (`RunnerConfig`), how it ended (`RunResult`), and the parts that its method needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from rl.algorithms.filtered_bc import FilteredConfig, FilteredImitation
from rl.algorithms.grpo import GRPO, GRPOConfig
from rl.algorithms.policy_gradient import PolicyLearner
from rl.algorithms.ppo import PPO, PPOConfig
from rl.models.actor import ActorConfig, GaussianChunkActor
from rl.models.critic import Critic, CriticConfig
from rl.rewards.process_reward import ShapingConfig
from rl.rollout.curriculum import CurriculumConfig
from rl.rollout.episode_collector import EpisodeCollector
from rl.rollout.step_collector import Collector
from rl.storage.episode_buffer import EpisodeBuffer
from rl.storage.rollout_buffer import RolloutBuffer, Transitions
from rl.teacher.distill import GuideConfig
from vla.runtime.distributed import Team

BUDGET_FIELDS = frozenset(
    {"max_updates", "max_env_steps", "max_seconds", "target_success", "patience", "calibrate_scales", "trackers"}
)
"""What may differ between a run and its continuation; everything else would make it another run."""


@dataclass(frozen=True)
class RunnerConfig:
    """One refinement run."""

    suite: str = "tabletop-pick"
    num_envs: int = 48
    """Worlds, over all processes."""
    decisions_per_update: int = 10
    """Chunks per world between updates: the batch is num_envs times this. (Methods of whole episodes do not ask.)"""
    n_action_steps: int | None = None
    """Execute only the first so many control steps of a chunk (None: as the policy's configuration says)."""
    horizon: int | None = None
    """Control steps of an episode while learning and choosing the best (None: the suite's). Where a task takes 60 of
    the 500 that its suite allows, nearly all steps would go into episodes that have failed already."""
    seed: int = 0
    train_seeds: tuple[int, int] = (0, 1_000_000)
    """First and one past the last scene seed of training episodes; evaluation seeds start at 5,000,000."""
    max_updates: int = 200
    max_env_steps: int | None = None
    """Control steps, over all worlds."""
    max_seconds: float | None = None
    """Wall clock of calibration, training and evaluation, over all sittings of a resumed run."""
    eval_every: int = 10
    """Updates between evaluations. Each is also a checkpoint, after which all worlds start anew."""
    target_success: float | None = 0.97
    """Stop when two evaluations in a row reach this (None: use the whole budget)."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a new best (None: never)."""
    calibrate_scales: tuple[float, ...] = (1.0, 0.6, 0.35)
    """Multiples of the initial std to try, largest first; empty: no calibration."""
    calibrate_keep: float = 0.7
    """Take the largest scale whose sampled success is at least this fraction of greedy success."""
    calibrate_episodes: int = 48
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    method: FilteredConfig | GRPOConfig | None = None
    """Learn by this instead of PPO."""
    guide: GuideConfig | None = None
    """Learn from a teacher that sees the simulator's state, too (PPO only). Needs demonstrations with that state."""
    curriculum: CurriculumConfig | None = None
    """Draw tasks by how they succeed (None: as the seeds say, each as often as any other)."""
    shaping: ShapingConfig | None = None
    """Add a learnt reward for progress (PPO only). None: the world's reward alone."""
    trackers: tuple[str, ...] = ()
    """Besides metrics.jsonl: tensorboard, wandb, trackio."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `evaluations`: (update, successes, episodes), the first of the policy RL started from."""

    updates: int
    env_steps: int
    seconds: float
    std_scale: float
    best_update: int
    evaluations: tuple[tuple[int, int, int], ...]
    stopped_by: str
    """"target", "patience", "updates", "env_steps" or "seconds"."""


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
