"""Environments whose instructions are replaced by sentences of one's own, with a note of what each episode came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vla.core.grounding import confidence_of
from vla.core.types import ActionChunk, Observation, Policy, Prefix, StepResult, VecEnv

TARGET, OTHER, NOTHING = "target", "other", "nothing"


@dataclass
class Heard:
    """One episode: what was said, and what came of it."""

    seed: int
    group: str
    sentence: str
    """With its slots open."""
    instruction: str
    lifted: str = NOTHING
    """`target`, `other` (another object than the target) or `nothing`."""
    held: bool | None = None
    """True if the policy's confidence said, at its first decision, that nothing named is in sight: a robot that holds
    then stands still, and goes on seeing the same. None for a policy without a confidence."""


class SpokenEnv(VecEnv):
    """A `vla.core.types.VecEnv` around another one: the episode of a seed has the instruction of its `Heard`, in which
    the outcome is noted. Scenes, targets and success are the inner environment's."""

    def __init__(self, env: VecEnv, heard: Sequence[Heard]) -> None:
        self.env, self.suite = env, getattr(env, "suite", None)
        self.num_envs, self.horizon, self.action_spec = env.num_envs, env.horizon, env.action_spec
        self.cameras, self.task_names, self.plane = env.cameras, env.task_names, env.plane
        self.proprio_dim, self.proprio_names = env.proprio_dim, env.proprio_names
        self.privileged_dim = env.privileged_dim
        self.n_action_steps, self.chunk_steps = env.n_action_steps, env.chunk_steps
        self.heard: Mapping[int, Heard] = {one.seed: one for one in heard}
        self.playing: list[Heard | None] = [None] * env.num_envs
        """Episode of each environment; None once it is over."""
        self._instruction = [""] * env.num_envs

    @property
    def tasks(self) -> list[str]:
        """See `vla.core.types.VecEnv.tasks`."""
        return self.env.tasks

    def _told(self, obs: Observation) -> Observation:
        return replace(obs, instruction=list(self._instruction))

    def reset(
        self, *, seeds: Sequence[int], tasks: Sequence[str] | None = None, env_ids: Sequence[int] | None = None
    ) -> Observation:
        """Start the episodes of these seeds; of a seed that is there twice, the first counts (the others are spare
        environments). KeyError for a seed about which nothing is said."""
        for k, world in enumerate(range(self.num_envs) if env_ids is None else env_ids):
            heard = self.heard[int(seeds[k])]
            self.playing[world] = None if seeds[k] in seeds[:k] else heard
            self._instruction[world] = heard.instruction
        return self._told(self.env.reset(seeds=seeds, tasks=tasks, env_ids=env_ids))

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """See `vla.core.types.VecEnv.step_chunk`."""
        result = self.env.step_chunk(chunk)
        for world in np.flatnonzero(result.terminated | result.truncated):
            if (heard := self.playing[world]) is not None:
                wrong, right = result.info["wrong_object"][world], result.info["success"][world]
                heard.lifted = OTHER if wrong else TARGET if right else NOTHING
                self.playing[world] = None
        return replace(result, obs=self._told(result.obs))

    def observation(self) -> Observation:
        """See `vla.core.types.VecEnv.observation`."""
        return self._told(self.env.observation())

    def close(self) -> None:
        """Close the inner environments."""
        self.env.close()


class Listener:
    """A policy in a `SpokenEnv`, whose confidence at the first decision of every episode is noted."""

    def __init__(self, policy: Policy, env: SpokenEnv) -> None:
        self.policy, self.env, self.spec = policy, env, policy.spec

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""
        self.policy.reset(env_ids)

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """See `vla.core.types.Policy.act`."""
        chunk = self.policy.act(obs) if prefix is None else self.policy.act(obs, prefix=prefix)
        confidence, threshold = confidence_of(self.policy), self.spec.grounding_threshold
        if confidence is not None and threshold is not None:
            for heard, sure in zip(self.env.playing, confidence.tolist(), strict=True):
                if heard is not None and heard.held is None and not math.isnan(sure):
                    heard.held = sure < threshold
        return chunk
