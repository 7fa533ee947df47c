"""Reward shaping: a process reward model learnt from the policy's own episodes, as a potential-based reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl import streams
from rl.configs.rewards import ShapingConfig
from rl.models.actor import ChunkActor, SampledPolicy
from rl.models.policy_inputs import summary
from rl.rewards.process_reward import Episode, ProgressModel, ProgressReport, fit_progress
from vla.backbones.features import Features
from vla.core.types import Observation, Policy, VecEnv, executed
from vla.model.heads.residual import Latents


@torch.no_grad()
def watch(
    actor: ChunkActor,
    policy: Policy,
    env: VecEnv,
    seeds: Sequence[int],
    *,
    position: slice = slice(0, 3),
) -> list[Episode]:
    """Play one episode per seed, in rounds of all environments. `position` is the end effector's place in proprio."""
    names = env.action_spec.names
    grippers = [i for i, name in enumerate(names) if "gripper" in name]
    if not grippers:
        raise ValueError(f"milestones are cut at gripper changes, and no action is called so: {', '.join(names)}")
    episodes: list[Episode] = []
    for start in range(0, len(seeds) - env.num_envs + 1, env.num_envs):
        obs = env.reset(seeds=seeds[start : start + env.num_envs])
        policy.reset()
        rows: list[list[tuple[Any, ...]]] = [[] for _ in range(env.num_envs)]
        success, over = np.zeros(env.num_envs, bool), np.zeros(env.num_envs, bool)
        played = np.zeros(env.num_envs, np.int64)
        while not over.all():
            reworded = replace(obs, instruction=env.alternative_instructions())
            state, other = (_summary(actor, one) for one in (obs, reworded))
            chunk = executed(policy.spec, policy.act(obs))
            for i in np.flatnonzero(~over):
                rows[i].append((state[i], other[i], chunk[i, 0, grippers[0]], obs.proprio[i, position].copy()))
            result = env.step_chunk(chunk)
            played += np.where(over, 0, result.n_steps)
            ended = ~over & (result.terminated | result.truncated)
            if ended.any():  # the frame in which it was done (or not) is the one that matters most
                reworded = replace(result.obs, instruction=env.alternative_instructions())
                state, other = (_summary(actor, one) for one in (result.obs, reworded))
                for i in np.flatnonzero(ended):
                    last = chunk[i, max(0, result.n_steps[i] - 1), grippers[0]]
                    rows[i].append((state[i], other[i], last, result.obs.proprio[i, position].copy()))
            success |= ended & result.info["success"].astype(bool)
            over |= ended
            obs = result.obs
        for i, row in enumerate(rows):
            columns = [np.stack(column).astype(np.float32) for column in zip(*row, strict=True)]
            episodes.append(Episode(*columns, bool(success[i]), int(played[i])))
    return episodes


def _summary(actor: ChunkActor, obs: Observation) -> NDArray[np.float32]:
    return summary(*actor.encode(obs)).cpu().numpy()


class Shaping:
    """Potential-based reward from a calibrated model: coef * (gamma * Phi(s') - Phi(s)), Phi = milestones seen / goals.

    Over an episode that adds up to no more than `coef` in size, and to nothing that a policy could prefer: a finished
    episode's potential is 0 (Ng et al. 1999).
    """

    def __init__(
        self, num_envs: int, *, coef: float = 0.3, gamma: float = 1.0, model: ProgressModel | None = None
    ) -> None:
        """`gamma` is the discount of a decision, `coef` a fraction of the reward of success. Without a `model` one must
        be learnt (`learn_process_reward`) or loaded first."""
        if not 0 <= coef <= 1:
            raise ValueError(f"shaping is a fraction of success, its coef in [0, 1], got {coef}")
        self.model, self.coef, self.gamma = model, coef, gamma
        self._seen = np.zeros(num_envs, np.int64)
        self._above = np.zeros(num_envs, bool)

    def load(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Restore the model from its `state_dict`."""
        self.model = ProgressModel.from_tensors(tensors).to(device)

    def begin(self, ids: Sequence[int]) -> None:
        """Start new episodes in environments `ids`."""
        self._seen[list(ids)], self._above[list(ids)] = 0, False

    @torch.no_grad()
    def potential(self, inputs: Features | Latents, proprio_BP: Tensor) -> NDArray[np.float32]:
        """Return the potential (N,) of every environment's state; call it once per decision."""
        assert self.model is not None, "learn or load a process reward model first"
        above = self.model(summary(inputs, proprio_BP)).cpu().numpy() > float(self.model.threshold)
        self._seen += above & ~self._above
        self._above = above
        return np.minimum(1.0, self._seen / max(1, int(self.model.goals))).astype(np.float32)

    def reward(
        self, before: NDArray[np.float32], after: NDArray[np.float32], ended: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Return the reward (N,) of the decision between two potentials."""
        return self.coef * (self.gamma * np.where(ended, 0.0, after) - before).astype(np.float32)


def learn_process_reward(
    shaping: Shaping,
    actor: ChunkActor,
    env: VecEnv,
    next_seeds: Callable[[int], list[int]],
    config: ShapingConfig,
    *,
    n_action_steps: int,
    seed: int,
) -> tuple[ProgressReport, int]:
    """Give `shaping` a model that is trained and calibrated on the policy's own noisy episodes; return the report and
    the control steps that were played. `next_seeds(count)` gives the scenes."""
    seeds = next_seeds(-(-config.episodes // env.num_envs) * env.num_envs)
    policy = SampledPolicy(actor, env.action_spec, n_action_steps, generator=streams.reward_episodes(seed))
    episodes = watch(actor, policy, env, seeds)
    model, report = fit_progress(episodes, config.progress, seed=seed)
    shaping.model = model.to(actor.device)
    return report, sum(episode.control_steps for episode in episodes)
