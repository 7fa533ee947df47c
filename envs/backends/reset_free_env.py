"""Episodes without resets: a task and its undo alternate in the same scene, each beginning where the last one ended.

A real robot has nobody who puts things back. Real resets are few and counted: all environments together after so many
episodes (RoboFuME, Yang et al. 2023, arXiv 2310.15145, resets every 25), and one alone where its object is out of
reach or the simulation blew up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.tabletop.control import ControlConfig
from vla.core.types import ActionChunk, Observation, StepResult, VecEnv

_MARGIN_M = 0.01
_FALLEN_M = -0.01


@dataclass
class ResetCounts:
    """How often an episode began with a real reset, and how often without."""

    scheduled: int = 0
    """Environments reset because it was their turn, the first time included."""
    out_of_reach: int = 0
    """Environments reset because their object could not be reached any more."""
    broken: int = 0
    """Environments reset because the simulation blew up, or its process died."""
    continued: int = 0
    """Episodes that began where the one before had ended."""


class ResetFreeVecEnv(VecEnv):
    """A `vla.core.types.VecEnv` around the CPU backend of a tabletop suite that has both tasks of `pair`.

    An episode ends when the caller says so (`begin`), and is truncated after `horizon` control steps. The simulator's
    word that its task is done ends nothing: `info["success"]` (B,) says whether it was given in this episode so far, so
    that somebody else may judge, who cannot ask a simulator.
    """

    save_every = 0
    """See `rl.offline.practice.PracticeEnv`: what came after the last scheduled reset is repeated exactly."""

    def __init__(
        self,
        env: MujocoVecEnv,
        pair: tuple[str, str],
        next_seeds: Callable[[int], Sequence[int]],
        *,
        reset_every: int = 25,
        horizon: int | None = None,
    ) -> None:
        """`next_seeds(count)` gives the scenes of real resets, which come when the environments have had `reset_every`
        episodes each, on average. ValueError for a task that the suite does not have."""
        for task in pair:
            if task not in env.task_names:
                raise ValueError(f"the suite has no task {task!r}; it has: {', '.join(env.task_names)}")
        if reset_every < 1:
            raise ValueError(f"reset_every must be at least 1, got {reset_every}")
        self.env, self.pair, self.reset_every = env, pair, reset_every
        self.num_envs, self.action_spec, self.cameras = env.num_envs, env.action_spec, env.cameras
        self.proprio_dim, self.proprio_names = env.proprio_dim, env.proprio_names
        self.privileged_dim, self.task_names = env.privileged_dim, env.task_names
        self.horizon = min(env.horizon, horizon or env.horizon)
        self.counts = ResetCounts()
        self.elapsed = np.zeros(env.num_envs, np.int64)
        """(B,) control steps of the present episodes."""
        self.forward = np.ones(env.num_envs, bool)
        """(B,) True where the present episode is one of the first task of the pair."""
        self._next_seeds = next_seeds
        self._success = np.zeros(env.num_envs, bool)
        self._stranded = np.zeros(env.num_envs, bool)
        self._broken = np.zeros(env.num_envs, bool)
        self._word_seeds = np.zeros(env.num_envs, np.int64)
        """(B,) what draws the words of the present episodes."""
        self._ended = 0

    @property
    def tasks(self) -> list[str]:
        """See `vla.core.types.VecEnv.tasks`."""
        return self.env.tasks

    @property
    def templates(self) -> list[str]:
        """See `vla.core.types.VecEnv.templates`."""
        return self.env.templates

    def alternative_instructions(self) -> list[str]:
        """See `vla.core.types.VecEnv.alternative_instructions`."""
        return self.env.alternative_instructions()

    @property
    def reset_is_due(self) -> bool:
        """True when all environments have had their episodes since the last scheduled reset."""
        return self._ended >= self.reset_every * self.num_envs

    def start(self) -> Observation:
        """A scheduled reset of all environments, which then begin the first task of the pair."""
        self._ended = 0
        self.counts.scheduled += self.num_envs
        return self._reset(np.arange(self.num_envs))

    def reset(
        self, *, seeds: Sequence[int], tasks: Sequence[str] | None = None, env_ids: Sequence[int] | None = None
    ) -> Observation:
        """A reset that the caller asks for, such as an evaluation's; it is not counted. Tasks: as asked, or the pair's
        first."""
        ids = np.arange(self.num_envs) if env_ids is None else np.asarray(env_ids, int)
        chosen = [self.pair[0]] * len(ids) if tasks is None else list(tasks)
        self.env.reset(seeds=seeds, tasks=chosen, env_ids=ids.tolist())
        self.forward[ids] = [task == self.pair[0] for task in chosen]
        self._fresh(ids)
        self._word_seeds[ids] = seeds
        # Begun once more at the same place: whatever is lifted by mistake must not end it.
        return self.env.continue_episodes(seeds=seeds, tasks=chosen, env_ids=ids.tolist())

    def begin(self, env_ids: Sequence[int]) -> Observation:
        """End the episodes in `env_ids` and begin the other task of the pair there: where things are now, or after a
        real reset where the object is out of reach or the simulation broke."""
        ids = np.asarray(env_ids, int)
        self._ended += len(ids)
        lost = self._stranded[ids] | self._broken[ids]
        self.counts.broken += int(self._broken[ids].sum())
        self.counts.out_of_reach += int((self._stranded[ids] & ~self._broken[ids]).sum())
        if lost.any():
            self._reset(ids[lost])
        going_on = ids[~lost]
        self.counts.continued += len(going_on)
        if len(going_on):
            self.forward[going_on] ^= True
            self._fresh(going_on)
            self._word_seeds[going_on] += 1
            self._continue(going_on)
        return self.env.observation()

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """Up to C control steps in every environment: fewer where the simulator's word that the task is done comes
        within the chunk, at most once an episode. `terminated` is never true."""
        result = self.env.step_chunk(chunk)
        self.elapsed += result.n_steps
        self._broken |= result.diverged | result.worker_restarted
        self._success |= result.info["success"]
        privileged = result.obs.privileged
        assert privileged is not None, "tabletop environments tell their state"
        self._stranded |= out_of_reach(privileged[:, :3])
        truncated = (self.elapsed >= self.horizon) | self._stranded | self._broken
        stopped = (result.terminated | result.truncated) & ~truncated
        obs = result.obs
        if stopped.any():  # the simulator is content, or its own clock has run out: go on
            obs = self._continue(np.flatnonzero(stopped))
        info = {**result.info, "success": self._success.copy(), "out_of_reach": self._stranded.copy()}
        return replace(result, obs=obs, terminated=np.zeros(self.num_envs, bool), truncated=truncated, info=info)

    def observation(self) -> Observation:
        """See `vla.core.types.VecEnv.observation`."""
        return self.env.observation()

    def set_rendering(self, on: bool) -> None:
        """See `vla.core.types.VecEnv.set_rendering`."""
        self.env.set_rendering(on)

    def close(self) -> None:
        """Close the inner environments."""
        self.env.close()

    def _reset(self, ids: NDArray[np.int64]) -> Observation:
        return self.reset(seeds=self._next_seeds(len(ids)), env_ids=ids.tolist())

    def _fresh(self, ids: NDArray[np.int64]) -> None:
        self.elapsed[ids] = 0
        self._success[ids] = self._stranded[ids] = self._broken[ids] = False

    def _continue(self, ids: NDArray[np.int64]) -> Observation:
        """The present task of each of these environments, in its present words, from where things are now."""
        tasks = [self.pair[0] if self.forward[i] else self.pair[1] for i in ids]
        return self.env.continue_episodes(seeds=self._word_seeds[ids].tolist(), tasks=tasks, env_ids=ids.tolist())


def out_of_reach(position_B3: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(B,) objects where the gripper cannot get to (m, world frame): off its workspace, or fallen from the table."""
    config = ControlConfig()
    low, high = np.array(config.low_m[:2]) + _MARGIN_M, np.array(config.high_m[:2]) - _MARGIN_M
    away = (position_B3[:, :2] < low) | (position_B3[:, :2] > high)
    return away.any(1) | (position_B3[:, 2] < _FALLEN_M)
