"""Whole episodes, not a number of decisions: groups of worlds that start alike, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rl.rollout.step_collector import Collector
from rl.storage.episode_buffer import EpisodeBuffer
from rl.storage.rollout_buffer import RolloutBuffer, require_finite
from vla.runtime.distributed import Team

Judge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Returns (groups, G) of finished episodes -> (kept (groups,) bool, advantages (groups, G))."""


class EpisodeCollector:
    """Plays rounds of whole episodes, `group_size` worlds from one seed, until enough episodes are worth keeping."""

    def __init__(
        self,
        worlds: Collector,
        *,
        group_size: int,
        wanted: int,
        max_rounds: int,
        judge: Judge,
        team: Team | None = None,
    ) -> None:
        """`worlds`: whose environment, actor, noise and seeds are used. `wanted`: episodes kept, over all processes."""
        if worlds.env.num_envs % group_size:
            raise ValueError(f"{worlds.env.num_envs} worlds do not divide into groups of {group_size}")
        self.worlds, self.group_size, self.wanted, self.max_rounds = worlds, group_size, wanted, max_rounds
        self.judge, self.team = judge, team or Team()
        at_once = worlds.env.n_action_steps or min(worlds.n_action_steps, worlds.actor.model.chunk_size)
        self.max_decisions = -(-worlds.env.horizon // at_once)
        self._round: RolloutBuffer | None = None

    @property
    def capacity(self) -> int:
        """Rows that all rounds of one update can fill."""
        return self.max_rounds * self.max_decisions * self.worlds.env.num_envs

    def collect(self, buffer: EpisodeBuffer) -> dict[str, float]:
        """Fill `buffer` with episodes worth learning from; rates over all that were played."""
        num_envs, size = self.worlds.env.num_envs, self.group_size
        played = kept_episodes = mixed = succeeded = wrong = control_steps = rounds = 0
        for _ in range(self.max_rounds):
            rounds += 1
            seeds = self.worlds.next_seeds(num_envs // size)
            chosen = self.worlds.curriculum
            tasks = None if chosen is None else [task for task in chosen.draw(len(seeds)) for _ in range(size)]
            rollout, returns_N, facts = self._play([seed for seed in seeds for _ in range(size)], tasks)
            kept, advantages = self.judge(returns_N.view(-1, size))
            worlds = kept.repeat_interleave(size)
            decided = rollout.flat("n_steps")[: rollout.filled * num_envs].view(-1, num_envs) > 0
            rows = (decided & worlds).flatten().nonzero().squeeze(1)
            buffer.append(rollout, rows, advantages.flatten()[rows % num_envs].to(rollout.flat("log_prob")))
            played, mixed = played + num_envs, mixed + int(kept.sum())
            succeeded, wrong = succeeded + facts["succeeded"], wrong + facts["wrong"]
            control_steps += facts["control_steps"]
            kept_episodes += int(worlds.sum())
            if self.team.total(float(kept_episodes))[0] >= self.wanted:
                break
        if not buffer.size:
            buffer.pad(rollout)
        self.worlds.env_steps += control_steps
        self.worlds.forget_worlds()
        return {
            "episodes": played,
            "control_steps": control_steps,
            "success_rate": succeeded / played,
            "wrong_object": wrong / played,
            "kept_groups": mixed,
            "kept_episodes": kept_episodes,
            "rounds": rounds,
        } | (self.worlds.curriculum.metrics() if self.worlds.curriculum is not None else {})

    @torch.no_grad()
    def _play(self, seeds: list[int], tasks: list[str] | None) -> tuple[RolloutBuffer, Tensor, dict[str, int]]:
        """One episode in every world: (its decisions, returns (N,), counts). Finished worlds wait for the others."""
        env, actor, num_envs = self.worlds.env, self.worlds.actor, self.worlds.env.num_envs
        if self._round is None:
            self._round = RolloutBuffer(self.max_decisions, num_envs)
        rollout = self._round
        rollout.clear()
        obs, elapsed = self.worlds.start(seeds, range(num_envs), tasks), np.zeros(num_envs, np.int64)
        returns, success, wrong = torch.zeros(num_envs), np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        over = np.zeros(num_envs, bool)
        while not over.all():
            where = f"in decision {rollout.filled} of an episode"
            conditions, proprio = actor.encode(obs)
            policy = actor.distribution(rollout.put_conditions(conditions), proprio)
            action = policy.sample(self.worlds.generator)
            chunk = actor.chunk_of(action)
            require_finite("action", chunk, where)
            result = env.step_chunk(actor.to_env(chunk, env.action_spec, self.worlds.n_action_steps))
            n_steps = torch.from_numpy(np.where(over, 0, result.n_steps))
            until = torch.from_numpy(np.where(over, 0, result.executed_until))
            executed = (torch.arange(chunk.shape[1]) < until[:, None]).to(actor.device)
            rollout.add(
                proprio_BP=proprio,
                action=action,
                executed_BC=executed,
                log_prob=policy.log_prob(action, executed),
                state_BS=proprio,  # there is no critic to read more
                next_state_BS=proprio,
                reward=torch.from_numpy(result.reward).float(),
                terminated=torch.from_numpy(result.terminated),
                truncated=torch.from_numpy(result.truncated),
                n_steps=n_steps,
            )
            returns += torch.from_numpy(np.where(over, 0.0, result.reward)).float()
            ended = ~over & (result.terminated | result.truncated)
            success |= ended & result.info["success"].astype(bool)
            wrong |= ended & result.info["wrong_object"].astype(bool)
            for i in np.flatnonzero(ended):
                self.worlds.ended(int(i), bool(result.info["success"][i]))
            elapsed += n_steps.numpy()
            over |= ended
            obs = result.obs
        counts = {"succeeded": int(success.sum()), "wrong": int(wrong.sum()), "control_steps": int(elapsed.sum())}
        return rollout, returns, counts
