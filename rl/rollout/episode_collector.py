"""Rollouts of whole episodes: groups of environments with the same initial state, and the groups that are kept."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rl.rollout.step_collector import Collector, RolloutStats
from rl.storage.episode_buffer import EpisodeBuffer
from rl.storage.rollout_buffer import RolloutBuffer
from vla.runtime.distributed import Team

Judge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Returns (groups, G) of finished episodes -> (kept (groups,) bool, advantages (groups, G))."""


class EpisodeCollector:
    """Plays rounds of whole episodes, `group_size` environments from one seed, until enough episodes are kept."""

    def __init__(
        self,
        collector: Collector,
        *,
        group_size: int,
        wanted: int,
        max_rounds: int,
        judge: Judge,
        team: Team | None = None,
    ) -> None:
        """`collector` plays the episodes. `wanted` is the number of kept episodes over all processes. ValueError if
        the environments do not divide into groups."""
        num_envs = collector.env.num_envs
        if num_envs % group_size:
            raise ValueError(f"{num_envs} worlds do not divide into groups of {group_size}")
        self.collector, self.group_size, self.wanted, self.max_rounds = collector, group_size, wanted, max_rounds
        self.judge, self.team = judge, team or Team()
        at_once = collector.env.n_action_steps or min(collector.n_action_steps, collector.actor.chunk_size)
        self.max_decisions = -(-collector.env.horizon // at_once)
        self._round = RolloutBuffer(self.max_decisions, num_envs)

    @property
    def capacity(self) -> int:
        """Rows that all rounds of one update can fill."""
        return self.max_rounds * self._round.size

    def collect(self, buffer: EpisodeBuffer) -> dict[str, float]:
        """Fill `buffer` with the episodes to learn from; return rates over all that were played."""
        stats, num_envs = RolloutStats(), self.collector.env.num_envs
        kept_groups = kept_episodes = rounds = 0
        for _ in range(self.max_rounds):
            rounds += 1
            returns_N = self._play(stats)
            kept, advantages = self.judge(returns_N.view(-1, self.group_size))
            kept_envs = kept.repeat_interleave(self.group_size)
            rows = (self._decided().cpu() & kept_envs).flatten().nonzero().squeeze(1)
            buffer.append(self._round, rows, advantages.flatten()[rows % num_envs].to(self._round.flat("log_prob")))
            kept_groups, kept_episodes = kept_groups + int(kept.sum()), kept_episodes + int(kept_envs.sum())
            if self.team.total(float(kept_episodes))[0] >= self.wanted:
                break
        if not buffer.size:
            buffer.pad(self._round)
        self.collector.forget_worlds()
        kept_counts = {"kept_groups": kept_groups, "kept_episodes": kept_episodes, "rounds": rounds}
        return stats.metrics() | kept_counts | self.collector.curriculum_metrics()

    def _play(self, stats: RolloutStats) -> Tensor:
        """Play one episode in every environment; return their returns (N,)."""
        num_envs, size, curriculum = self.collector.env.num_envs, self.group_size, self.collector.curriculum
        seeds = self.collector.next_seeds(num_envs // size)
        tasks = None if curriculum is None else [task for task in curriculum.draw(len(seeds)) for _ in range(size)]
        self._round.clear()
        obs = self.collector.start([seed for seed in seeds for _ in range(size)], range(num_envs), tasks)
        self.collector.fill(self._round, obs, stats, restart=False)
        reward_TN = self._round.time_major("reward")[: self._round.filled]
        return (reward_TN * self._decided()).sum(0).cpu()

    def _decided(self) -> Tensor:
        """(T, N) bool: decisions that an unfinished episode made in the last round."""
        return self._round.time_major("n_steps")[: self._round.filled] > 0
