"""Rollouts: worlds stepped chunk by chunk, every observation encoded once, finished worlds reset to fresh seeds."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from envs.seeds import FIRST_EVALUATION_SEED
from rl.configs.learning import Reads
from rl.models.actor import GaussianChunkActor
from rl.models.critic import critic_state
from rl.models.policy_inputs import Conditions
from rl.rewards.process_reward import Shaping
from rl.rollout.curriculum import Curriculum
from rl.storage.rollout_buffer import RolloutBuffer, require_finite
from vla.core.types import Observation, Policy, VecEnv, executed


def play(policy: Policy, env: VecEnv, seeds: Sequence[int]) -> int:
    """One episode per world, from `seeds`; returns how many succeeded."""
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


class Collector:
    """Fills rollout buffers from one vector environment, across episode ends.

    Scene seeds run through `train_seeds` one after the other, from a place that depends on the run's seed.
    """

    def __init__(
        self,
        actor: GaussianChunkActor,
        env: VecEnv,
        *,
        generator: torch.Generator,
        train_seeds: tuple[int, int],
        first_seed: int = 0,
        n_action_steps: int | None = None,
        curriculum: Curriculum | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """`curriculum` chooses the tasks; without one the seeds do. `share`: of the seeds, number i of n."""
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
        self.curriculum = curriculum
        self.shaping: Shaping | None = None
        """A reward for progress, beside the world's."""
        self.critic_reads: Reads = "privileged"
        """What the critic is told of a state (`CriticConfig.reads`)."""
        self._tasks = [""] * env.num_envs
        self.seeds_used = 0
        self.env_steps = 0
        self.n_action_steps = n_action_steps or 1_000_000  # slicing past the chunk's end is the whole chunk
        self._obs: Observation | None = None
        self._elapsed = np.zeros(env.num_envs, np.int64)

    def next_seeds(self, count: int) -> list[int]:
        """The next `count` training seeds."""
        span, (rank, size) = self.high - self.low, self.share
        start = self.offset + self.seeds_used * size + rank
        self.seeds_used += count
        return [self.low + (start + i * size) % span for i in range(count)]

    def start(self, seeds: Sequence[int], ids: Sequence[int], tasks: Sequence[str] | None = None) -> Observation:
        """New episodes in worlds `ids`, of these tasks if given, else of those that the curriculum draws."""
        if self.shaping is not None:
            self.shaping.begin(ids)
        if tasks is None and self.curriculum is not None:
            tasks = self.curriculum.draw(len(seeds))
        if tasks is None:
            return self.env.reset(seeds=seeds, env_ids=None if len(ids) == self.env.num_envs else ids)
        for i, task in zip(ids, tasks, strict=True):
            self._tasks[i] = task
        return self.env.reset(seeds=seeds, tasks=tasks, env_ids=None if len(ids) == self.env.num_envs else ids)

    def ended(self, world: int, success: bool) -> None:
        """Tell the curriculum how an episode went."""
        if self.curriculum is not None:
            self.curriculum.record(self._tasks[world], success)

    def forget_worlds(self) -> None:
        """The next rollout starts new episodes everywhere (others stepped the worlds, or a checkpoint was made)."""
        self._obs = None

    @torch.no_grad()
    def collect(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Fill `buffer`; returns rates over the episodes that ended. NonFiniteError: broken obs, action or reward.

        Of the time it takes, `seconds_policy` goes into looking and choosing, `seconds_worlds` into physics, pictures
        and their way between the two.
        """
        env, actor = self.env, self.actor
        took = {"seconds_policy": 0.0, "seconds_worlds": 0.0}
        ended = succeeded = wrong = control_steps = diverged = 0
        if self._obs is None:
            self._obs = self.start(self.next_seeds(env.num_envs), range(env.num_envs))
            self._elapsed[:] = 0
        before: tuple[np.ndarray, np.ndarray] | None = None
        while not buffer.full:
            obs, began = self._obs, time.perf_counter()
            where = f"in decision {buffer.filled} of the rollout"
            conditions, proprio = actor.encode(obs)
            conditions = buffer.put_conditions(conditions)
            state = self._critic_state(obs, self._elapsed_fraction(), conditions, proprio)
            require_finite("obs (privileged state or proprio)", state, where)
            if self.shaping is not None:
                now = self._shape(buffer, before, conditions, proprio)
            policy = actor.distribution(conditions, proprio)
            action = policy.sample(self.generator)
            chunk = actor.chunk_of(action)
            require_finite("action", chunk, where)  # before it moves anything
            wanted, chosen = actor.to_env(chunk, env.action_spec, self.n_action_steps), time.perf_counter()
            result = env.step_chunk(wanted)
            took["seconds_policy"] += chosen - began
            took["seconds_worlds"] += time.perf_counter() - chosen
            # A world whose process died took no step: its decision counts for nothing, and its episode is cut short.
            lost = result.worker_restarted
            if ((result.n_steps < 1) & ~lost).any():
                raise RuntimeError("a world executed no control step although its episode had been reset")
            before = self._elapsed_fraction()
            self._elapsed += result.n_steps
            # no chunk ever starts at the time limit, so the critic has no value for that moment: ask about the last
            # moment it knows, which is also what bootstrapping past a time limit means
            after = np.where(result.truncated, before, self._elapsed_fraction())
            n_steps = torch.from_numpy(result.n_steps)
            # (of a late answer, later actions play a part, too: in the next decision)
            until = torch.from_numpy(result.executed_until)
            executed = torch.arange(chunk.shape[1]) < until[:, None]
            to = actor.device
            buffer.add(
                proprio_BP=proprio,
                action=action,
                executed_BC=executed.to(to),
                log_prob=policy.log_prob(action, executed.to(to)),
                state_BS=state.to(to),
                next_state_BS=self._critic_state(result.obs, after).to(to),
                reward=torch.from_numpy(result.reward).float().to(to),
                terminated=torch.from_numpy(result.terminated).to(to),
                truncated=torch.from_numpy(result.truncated).to(to),
                n_steps=n_steps.to(to),
            )
            control_steps += int(result.n_steps.sum())
            done = result.terminated | result.truncated
            if self.shaping is not None:
                before = (now, done)
            ended += int(done.sum())
            succeeded += int(result.info["success"].astype(bool)[done].sum())
            wrong += int(result.info["wrong_object"].astype(bool)[done].sum())
            diverged += int(result.diverged.sum())
            self._obs = result.obs
            if done.any():
                ids = np.flatnonzero(done).tolist()
                for i in ids:
                    self.ended(i, bool(result.info["success"][i]))
                began = time.perf_counter()
                self._obs = self.start(self.next_seeds(len(ids)), ids)
                took["seconds_worlds"] += time.perf_counter() - began
                self._elapsed[done] = 0
        if self.shaping is not None:
            self._shape(buffer, before, *actor.encode(self._obs))
        self.env_steps += control_steps
        metrics: dict[str, float] = {"episodes": ended, "control_steps": control_steps, **took}
        if ended:
            metrics |= {"success_rate": succeeded / ended, "wrong_object": wrong / ended}
        if diverged:  # simulations that blew up: their episodes were cut short
            metrics["diverged"] = diverged
        return metrics | (self.curriculum.metrics() if self.curriculum is not None else {})

    def _critic_state(
        self,
        obs: Observation,
        elapsed: np.ndarray,
        conditions: Conditions | None = None,
        proprio: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The critic's input; the policy looks once more if it must and has not yet."""
        if self.critic_reads == "privileged":
            return critic_state(obs, elapsed)
        if conditions is None or proprio is None:
            conditions, proprio = self.actor.encode(obs)
        return critic_state(obs, elapsed, self.actor.latents_of(conditions, proprio), reads=self.critic_reads)

    def _shape(
        self,
        buffer: RolloutBuffer,
        before: tuple[np.ndarray, np.ndarray] | None,
        conditions: Conditions,
        proprio: torch.Tensor,
    ) -> np.ndarray:
        """The worlds' potentials now; their change joins the reward of the decision before, in this rollout."""
        assert self.shaping is not None, "nothing shapes the reward"
        now = self.shaping.potential(conditions, proprio)
        if before is not None:
            gained = torch.from_numpy(self.shaping.reward(before[0], now, before[1]))
            buffer.time_major("reward")[buffer.filled - 1] += gained.to(self.actor.device)
        return now

    def _elapsed_fraction(self) -> np.ndarray:
        return (self._elapsed / self.env.horizon).astype(np.float32)

    def state(self) -> dict[str, object]:
        """For an exact resume; the worlds themselves start anew (`forget_worlds`)."""
        return {
            "seeds_used": self.seeds_used,
            "env_steps": self.env_steps,
            "generator": self.generator.get_state(),
            "curriculum": None if self.curriculum is None else self.curriculum.state(),
        }

    def load_state(self, state: dict[str, object]) -> None:
        """Inverse of `state`."""
        self.seeds_used, self.env_steps = state["seeds_used"], state["env_steps"]
        self.generator.set_state(state["generator"])
        if self.curriculum is not None:
            self.curriculum.load_state(state["curriculum"])
        self.forget_worlds()
