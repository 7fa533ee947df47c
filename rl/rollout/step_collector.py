"""Rollouts: environments stepped chunk by chunk, every decision written into a buffer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.seeds import FIRST_EVALUATION_SEED
from rl.algorithms.policy_gradient import PolicyObjective
from rl.models.actor import ChunkActor
from rl.models.critic import critic_state, seen_state
from rl.models.distribution import ChunkDistribution
from rl.models.policy_inputs import PolicyInput
from rl.rewards.shaping import Shaping
from rl.rollout.curriculum import Curriculum
from rl.storage.rollout_buffer import RolloutBuffer, require_finite
from vla.core.types import Observation, Policy, StepResult, VecEnv, executed
from vla.runtime.distributed import Team

Score = Callable[[ChunkDistribution, Tensor, Tensor], Tensor]
"""(distribution, sample, executed (B, C)) -> log-densities (B,), or of each token (B, C, A)."""


def play(policy: Policy, env: VecEnv, seeds: Sequence[int]) -> int:
    """Play one episode per environment, from `seeds`; return how many succeeded."""
    obs = env.reset(seeds=seeds)
    policy.reset()
    alive = np.ones(env.num_envs, bool)
    successes = 0
    while alive.any():
        result = env.step_chunk(executed(policy.spec, policy.act(obs)))
        done = alive & (result.terminated | result.truncated | (result.n_steps == 0))
        successes += int((result.info["success"].astype(bool) & done).sum())
        alive &= ~done
        obs = result.obs
    return successes


def successes(policy: Policy, env: VecEnv, rounds: Sequence[Sequence[int]], team: Team) -> int:
    """Play every round's seeds, one episode per environment; return how many succeeded, over all processes."""
    return int(team.total(float(sum(play(policy, env, seeds) for seeds in rounds)))[0])


def totals(metrics: dict[str, float], team: Team) -> dict[str, float]:
    """Return a rollout's metrics with counts summed and rates averaged over all processes."""
    if team.size == 1:
        return metrics
    counts = [name for name in ("episodes", "control_steps", "kept_groups", "kept_episodes") if name in metrics]
    rates, played = ("success_rate", "wrong_object"), metrics["episodes"]
    sums = team.total(*(metrics[name] for name in counts), *(metrics.get(name, 0.0) * played for name in rates))
    out = metrics | dict(zip(counts, sums, strict=False))
    if out["episodes"]:
        out |= {name: value / out["episodes"] for name, value in zip(rates, sums[len(counts) :], strict=True)}
    return out


@dataclass
class RolloutStats:
    """Counts over a rollout, and where its time went."""

    episodes: int = 0
    successes: int = 0
    wrong_object: int = 0
    control_steps: int = 0
    diverged: int = 0
    """Episodes cut short because the simulation blew up."""
    seconds_policy: float = 0.0
    """Wall clock of encoding and choosing."""
    seconds_worlds: float = 0.0
    """Wall clock of physics, rendering and their way between processes."""

    def count(self, result: StepResult, ended: NDArray[np.bool_], n_steps: NDArray[np.int64]) -> None:
        """Add one decision of every environment."""
        self.control_steps += int(n_steps.sum())
        self.episodes += int(ended.sum())
        self.successes += int(result.info["success"].astype(bool)[ended].sum())
        self.wrong_object += int(result.info["wrong_object"].astype(bool)[ended].sum())
        self.diverged += int(result.diverged.sum())

    def metrics(self) -> dict[str, float]:
        """Return counts and rates for the log; rates only if an episode ended."""
        out: dict[str, float] = {
            "episodes": self.episodes,
            "control_steps": self.control_steps,
            "seconds_policy": self.seconds_policy,
            "seconds_worlds": self.seconds_worlds,
        }
        if self.episodes:
            rates = {"success_rate": self.successes / self.episodes, "wrong_object": self.wrong_object / self.episodes}
            out |= rates
        return out | ({"diverged": self.diverged} if self.diverged else {})


class Collector:
    """Fills rollout buffers from one vector environment. A finished episode is followed by a new one by default.

    Scene seeds run through `train_seeds` one after the other, from a place that depends on the run's seed.
    """

    def __init__(
        self,
        actor: ChunkActor,
        env: VecEnv,
        *,
        generator: torch.Generator,
        train_seeds: tuple[int, int],
        first_seed: int = 0,
        n_action_steps: int | None = None,
        curriculum: Curriculum | None = None,
        shaping: Shaping | None = None,
        critic: Literal["privileged", "latents"] | None = "privileged",
        score: Score = PolicyObjective.score,
        share: tuple[int, int] = (0, 1),
        word_noise: float = 0.0,
    ) -> None:
        """`curriculum` chooses the tasks; without one the seeds do. `shaping` adds a reward for progress to the
        environment's. `critic`: what a critic reads is stored too (`CriticConfig.reads`). `score`: the
        log-densities to store. `share` is (rank, number of processes): the seeds are
        dealt out to the processes in turn. `word_noise`: see `RunnerConfig`."""
        low, high = train_seeds
        if not 0 <= low < high <= FIRST_EVALUATION_SEED:
            raise ValueError(
                f"train_seeds {train_seeds} must be an increasing pair within [0, {FIRST_EVALUATION_SEED}]: seeds from "
                f"{FIRST_EVALUATION_SEED} on are for evaluation only"
            )
        if n_action_steps is not None and n_action_steps < 1:
            raise ValueError(f"n_action_steps must be at least 1, got {n_action_steps}")
        self.actor, self.env, self.generator = actor, env, generator
        self.low, self.high = low, high
        # a large odd stride keeps runs with neighbouring seeds on different scenes
        self.offset = first_seed * 104_729 % (high - low)
        self.share = share
        self.curriculum, self.shaping, self.critic, self.score = curriculum, shaping, critic, score
        self._tasks = [""] * env.num_envs
        self.seeds_used = 0
        self.env_steps = 0
        self.n_action_steps = n_action_steps or 1_000_000  # slicing past the chunk's end is the whole chunk
        self._obs: Observation | None = None
        self._elapsed = np.zeros(env.num_envs, np.int64)
        self.word_noise = word_noise
        self._seeds = torch.zeros(env.num_envs, dtype=torch.int64)
        """Seed of the episode in each environment."""

    def next_seeds(self, count: int) -> list[int]:
        """Return the next `count` training seeds."""
        span, (rank, size) = self.high - self.low, self.share
        start = self.offset + self.seeds_used * size + rank
        self.seeds_used += count
        return [self.low + (start + i * size) % span for i in range(count)]

    def start(self, seeds: Sequence[int], ids: Sequence[int], tasks: Sequence[str] | None = None) -> Observation:
        """Start new episodes in environments `ids`, of these tasks if given, else of those the curriculum draws."""
        self._elapsed[list(ids)] = 0
        self._seeds[list(ids)] = torch.tensor(list(seeds))
        if self.shaping is not None:
            self.shaping.begin(ids)
        if tasks is None and self.curriculum is not None:
            tasks = self.curriculum.draw(len(seeds))
        env_ids = None if len(ids) == self.env.num_envs else ids
        if tasks is None:
            return self.env.reset(seeds=seeds, env_ids=env_ids)
        for i, task in zip(ids, tasks, strict=True):
            self._tasks[i] = task
        return self.env.reset(seeds=seeds, tasks=tasks, env_ids=env_ids)

    def forget_worlds(self) -> None:
        """Let the next rollout start new episodes everywhere: others stepped the environments, or a checkpoint was
        made."""
        self._obs = None

    def collect(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Fill `buffer`; return rates over the episodes that ended. NonFiniteError names a broken observation, action
        or reward."""
        obs = self._obs
        if obs is None:
            obs = self.start(self.next_seeds(self.env.num_envs), range(self.env.num_envs))
        stats = RolloutStats()
        self._obs = self.fill(buffer, obs, stats)
        return stats.metrics() | self.curriculum_metrics()

    @torch.no_grad()
    def fill(
        self, buffer: RolloutBuffer, obs: Observation, stats: RolloutStats, *, restart: bool = True
    ) -> Observation:
        """Play from `obs` and add to `buffer` and `stats`: until the buffer is full, or (without `restart`) until one
        episode has ended in every environment, the finished ones waiting. Return the last observation."""
        active = np.ones(self.env.num_envs, bool)
        before: tuple[NDArray[np.float32], NDArray[np.bool_]] | None = None
        while not (buffer.full if restart else not active.any()):
            began = time.perf_counter()
            inputs, proprio = self._encoded(obs)
            inputs = buffer.put_inputs(inputs)
            if self.shaping is not None:
                now = self._shape(buffer, before, inputs, proprio)
            result, n_steps, ended = self._decide(buffer, obs, inputs, proprio, active, stats, began)
            stats.count(result, ended, n_steps)
            self.env_steps += int(n_steps.sum())
            if self.shaping is not None:
                before = (now, ended)
            obs, ids = result.obs, np.flatnonzero(ended).tolist()
            if self.curriculum is not None:
                for i in ids:
                    self.curriculum.record(self._tasks[i], bool(result.info["success"][i]))
            if not restart:
                active &= ~ended
            elif ids:
                began = time.perf_counter()
                obs = self.start(self.next_seeds(len(ids)), ids)
                stats.seconds_worlds += time.perf_counter() - began
        if self.shaping is not None or self.critic == "latents":
            inputs, proprio = self._encoded(obs)
            if self.shaping is not None:
                self._shape(buffer, before, inputs, proprio)
            if self.critic == "latents":
                self._followed_by(buffer, self._state(obs, self._elapsed_fraction(), inputs, proprio))
        return obs

    def _encoded(self, obs: Observation) -> tuple[PolicyInput, Tensor]:
        """The policy's inputs for these observations, with noise on the words where training is to have it."""
        return self.actor.encode(obs, (self.word_noise, self._seeds) if self.word_noise else None)

    def _decide(
        self,
        buffer: RolloutBuffer,
        obs: Observation,
        inputs: PolicyInput,
        proprio: Tensor,
        active: NDArray[np.bool_],
        stats: RolloutStats,
        began: float,
    ) -> tuple[StepResult, NDArray[np.int64], NDArray[np.bool_]]:
        """Sample a chunk in every environment, execute it and store the decision; return what the environments
        answered, the control steps (N,) of active environments and which of their episodes ended (N,)."""
        env, actor, to = self.env, self.actor, self.actor.device
        where = f"in decision {buffer.filled} of the rollout"
        state = self._state(obs, self._elapsed_fraction(), inputs, proprio)
        if self.critic == "latents" and buffer.filled:
            self._followed_by(buffer, state)
        require_finite("obs (privileged state or proprio)", state, where)
        policy = actor.distribution(inputs, proprio)
        action = policy.sample(self.generator)
        chunk = actor.chunk_of(action)
        require_finite("action", chunk, where)  # before it moves anything
        wanted, chosen = actor.to_env(chunk, env.action_spec, obs, self.n_action_steps), time.perf_counter()
        result = env.step_chunk(wanted)
        stats.seconds_policy += chosen - began
        stats.seconds_worlds += time.perf_counter() - chosen
        # An environment whose process died took no step: its decision counts for nothing, its episode is cut short.
        if ((result.n_steps < 1) & active & ~result.worker_restarted).any():
            raise RuntimeError("an environment executed no control step although its episode had been reset")
        n_steps = np.where(active, result.n_steps, 0)
        before = self._elapsed_fraction()
        self._elapsed += n_steps
        # no chunk ever starts at the time limit, so the critic has no value for that moment: ask about the last
        # moment it knows, which is also what bootstrapping past a time limit means
        after = np.where(result.truncated, before, self._elapsed_fraction())
        # (what the policy will see next is not known yet: `_followed_by`)
        next_state = state if self.critic == "latents" else self._state(result.obs, after, inputs, proprio)
        # (of a late answer, later actions play a part, too: in the next decision)
        until = torch.from_numpy(np.where(active, result.executed_until, 0))
        executed_BC = (torch.arange(chunk.shape[1]) < until[:, None]).to(to)
        buffer.add(
            proprio_BP=proprio,
            action=action,
            executed_BC=executed_BC,
            log_prob=self.score(policy, action, executed_BC),
            state_BS=state.to(to),
            next_state_BS=next_state.to(to),
            reward=torch.from_numpy(result.reward).float().to(to),
            terminated=torch.from_numpy(result.terminated).to(to),
            truncated=torch.from_numpy(result.truncated).to(to),
            n_steps=torch.from_numpy(n_steps).to(to),
        )
        return result, n_steps, active & (result.terminated | result.truncated)

    def _state(self, obs: Observation, elapsed: NDArray[np.float32], inputs: PolicyInput, proprio: Tensor) -> Tensor:
        """The critic's input; without a critic `proprio` stands in its place."""
        if self.critic == "latents":
            return seen_state(inputs, proprio, elapsed)
        return critic_state(obs, elapsed) if self.critic else proprio

    def _followed_by(self, buffer: RolloutBuffer, state_BS: Tensor) -> None:
        """The state that the policy sees now is the one in which the decision before ended, where no episode did: there
        nobody looks at it, since neither success nor the time limit has a future (`run_checks`)."""
        last = buffer.filled - 1
        ended = buffer.time_major("terminated")[last] | buffer.time_major("truncated")[last]
        kept = buffer.time_major("next_state")[last]
        kept.copy_(torch.where(ended[:, None], kept, state_BS))

    def _shape(
        self,
        buffer: RolloutBuffer,
        before: tuple[NDArray[np.float32], NDArray[np.bool_]] | None,
        inputs: PolicyInput,
        proprio: Tensor,
    ) -> NDArray[np.float32]:
        """Return the potentials (N,) now; their change joins the reward of the decision before, in this rollout."""
        assert self.shaping is not None, "nothing shapes the reward"
        now = self.shaping.potential(inputs, proprio)
        if before is not None:
            gained = torch.from_numpy(self.shaping.reward(before[0], now, before[1]))
            buffer.time_major("reward")[buffer.filled - 1] += gained.to(self.actor.device)
        return now

    def _elapsed_fraction(self) -> NDArray[np.float32]:
        return (self._elapsed / self.env.horizon).astype(np.float32)

    def curriculum_metrics(self) -> dict[str, float]:
        """Return success and share of every task, if there is a curriculum."""
        return {} if self.curriculum is None else self.curriculum.metrics()

    def state(self) -> dict[str, Any]:
        """Return the state for an exact resume; the environments themselves are reset (`forget_worlds`)."""
        return {
            "seeds_used": self.seeds_used,
            "env_steps": self.env_steps,
            "generator": self.generator.get_state(),
            "curriculum": None if self.curriculum is None else self.curriculum.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.seeds_used, self.env_steps = state["seeds_used"], state["env_steps"]
        self.generator.set_state(state["generator"])
        if self.curriculum is not None:
            self.curriculum.load_state(state["curriculum"])
        self.forget_worlds()
