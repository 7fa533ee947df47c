"""Environments with inference latency: a chunk starts some control steps after the observation it was computed from.

This is what a slow link does to a real robot, inside training: meanwhile the previous chunk continues, and the
displacements of the steps already over are compensated (`policies.control.playback` does the same on the robot). Every
episode has its own latency, so that one policy learns them all, from none to `late_steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from envs.seeds import Stream
from envs.sim.base_worlds import check_seeds
from vla.core.late_chunks import catch_up
from vla.core.types import ActionChunk, Observation, StepResult, VecEnv

CATCH_UP_STEPS = 4
"""Number of actions over which the displacement lost to latency is made up for."""


class DelayedVecEnv(VecEnv):
    """A `vla.core.types.VecEnv` around another one. Decisions are `n_action_steps` control steps apart.

    With a latency of d steps, the last d actions of the previous chunk are executed first, then the new chunk from its
    action d on. The first chunk of an episode is executed from its beginning: a robot at rest waits for it.
    `StepResult.executed_until` (B,) counts the actions of the chunk that were executed or will be.
    The privileged state is the inner environment's, the latency as a share of `late_steps`, and the actions left of the
    previous chunk: (B, S + 1 + late_steps * A).
    """

    def __init__(self, env: VecEnv, *, n_action_steps: int, late_steps: int) -> None:
        """`late_steps` is the largest latency, control steps; chunks must hold `chunk_steps` actions. ValueError for
        fewer than one step per decision or a negative latency."""
        if n_action_steps < 1 or late_steps < 0:
            raise ValueError(f"need n_action_steps >= 1 and late_steps >= 0, got {n_action_steps} and {late_steps}")
        self.env, self.n_action_steps, self.late_steps = env, n_action_steps, late_steps
        self.num_envs, self.horizon, self.action_spec = env.num_envs, env.horizon, env.action_spec
        self.cameras, self.task_names = env.cameras, env.task_names
        self.proprio_dim, self.proprio_names = env.proprio_dim, env.proprio_names
        self.chunk_steps = n_action_steps + late_steps
        self.privileged_dim = env.privileged_dim + 1 + late_steps * env.action_spec.dim
        self.late = np.zeros(env.num_envs, np.int64)
        """(B,) latency of the current episodes, control steps."""
        self._left = np.zeros((env.num_envs, late_steps, env.action_spec.dim), np.float32)
        self._first = np.ones(env.num_envs, bool)
        spec = env.action_spec
        self._displacement = np.array(["gripper" not in name for name in spec.names])
        self._bounds = np.float32(spec.low), np.float32(spec.high)

    @property
    def tasks(self) -> list[str]:
        """See `vla.core.types.VecEnv.tasks`."""
        return self.env.tasks

    @property
    def templates(self) -> list[str]:
        """See `vla.core.types.VecEnv.templates`."""
        return self.env.templates

    def reset(
        self, *, seeds: Sequence[int], tasks: Sequence[str] | None = None, env_ids: Sequence[int] | None = None
    ) -> Observation:
        """Reset the inner environments; the seed also draws the latency of the episode."""
        ids = range(self.env.num_envs) if env_ids is None else env_ids
        check_seeds(ids, seeds)
        for i, seed in zip(ids, seeds, strict=True):
            rng = np.random.default_rng([seed, Stream.LATENCY])
            # the most is the hardest, and what the link is known to do: half of the episodes
            self.late[i] = self.late_steps if rng.random() < 0.5 else rng.integers(self.late_steps + 1)
            self._first[i], self._left[i] = True, 0.0
        return self._told(self.env.reset(seeds=seeds, tasks=tasks, env_ids=env_ids))

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """`n_action_steps` control steps. ValueError for chunks shorter than `chunk_steps`."""
        chunk = np.asarray(chunk, np.float32)
        if chunk.shape[1] < self.chunk_steps:
            raise ValueError(
                f"answers up to {self.late_steps} steps late need chunks of {self.chunk_steps} actions, got "
                f"{chunk.shape[1]}: fewer late steps, a smaller n_action_steps or a longer chunk"
            )
        n, played = self.n_action_steps, chunk[:, : self.chunk_steps].copy()
        for i in np.flatnonzero(self.late * ~self._first):
            d = self.late[i]
            meant = chunk[i, :d].sum(0) - self._left[i, :d].sum(0)
            played[i, :d] = self._left[i, :d]
            debt = np.where(self._displacement, meant, 0.0)
            catch_up(played[i, d : n + d], debt, *self._bounds, steps=CATCH_UP_STEPS)
        for i, d in enumerate(self.late):
            self._left[i, :d], self._left[i, d:] = played[i, n : n + d], 0.0
        self._first[:] = False
        result = self.env.step_chunk(played[:, :n])
        over = result.terminated | result.truncated
        until = np.where(over, np.minimum(result.n_steps, n), n + self.late)
        return replace(result, obs=self._told(result.obs), executed_until=until)

    def observation(self) -> Observation:
        """See `vla.core.types.VecEnv.observation`."""
        return self._told(self.env.observation())

    def set_rendering(self, on: bool) -> None:
        """See `vla.core.types.VecEnv.set_rendering`."""
        self.env.set_rendering(on)

    def alternative_instructions(self) -> list[str]:
        """See `vla.core.types.VecEnv.alternative_instructions`."""
        return self.env.alternative_instructions()

    def close(self) -> None:
        """Close the inner environments."""
        self.env.close()

    def _told(self, obs: Observation) -> Observation:
        if obs.privileged is None:
            return obs
        share = self.late[:, None] / max(1, self.late_steps)
        parts = (obs.privileged, share, self._left.reshape(len(share), -1))
        return replace(obs, privileged=np.concatenate(parts, 1, dtype=np.float32))
