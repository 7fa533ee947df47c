"""Policies that must fail (zero, random, blind replay): the floor every success rate stands on. And episode films."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from envs.experts.registry import make_expert
from envs.make import worlds_class
from envs.registry import load_suite
from vla.core.types import ActionChunk, ActionSpec, Observation, Policy, PolicySpec, Prefix, VecEnv


@dataclass
class Film:
    """One episode's frames, one per decision, the cameras side by side."""

    caption: str
    success: bool = False
    wrong_object: bool = False
    frames: list[np.ndarray] = field(default_factory=list)

    def add(self, obs: Observation, world: int, caption: str) -> None:
        """Add the present frame of environment `world`."""
        self.caption = caption
        self.frames.append(np.concatenate([image[world] for image in obs.images.values()], axis=1))

    def finish(self, obs: Observation, world: int, success: bool, wrong_object: bool) -> None:
        """Add the last frame (of the finished episode, not of the next) and the verdict."""
        self.add(obs, world, self.caption)
        self.success, self.wrong_object = success, wrong_object


class ZeroPolicy:
    """Stands still with the gripper open."""

    def __init__(self, spec: ActionSpec, chunk_size: int = 8) -> None:
        self.spec = PolicySpec(spec, chunk_size)
        self._action = np.zeros((chunk_size, spec.dim), np.float32)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """See `vla.core.types.Policy.act`."""
        return np.repeat(self._action[None], obs.batch_size, axis=0)


class RandomPolicy:
    """Uniform in the action's bounds, seeded."""

    def __init__(self, spec: ActionSpec, chunk_size: int = 8, seed: int = 0) -> None:
        self.spec = PolicySpec(spec, chunk_size)
        self._rng = np.random.default_rng(seed)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """See `vla.core.types.Policy.act`."""
        action, chunk_size = self.spec.action_spec, self.spec.chunk_size
        shape = (obs.batch_size, chunk_size, action.dim)
        return self._rng.uniform(action.low, action.high, shape).astype(np.float32)


class BlindReplay:
    """Replays one demonstration's actions regardless of the observation, then repeats the last one."""

    def __init__(self, actions_TA: np.ndarray, num_envs: int, chunk_size: int = 8) -> None:
        self._actions = np.asarray(actions_TA, np.float32)
        self.spec = PolicySpec(None, chunk_size)
        self._chunk_size = chunk_size
        self._at = np.zeros(num_envs, np.int64)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""
        self._at[slice(None) if env_ids is None else list(env_ids)] = 0

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """See `vla.core.types.Policy.act`."""
        rows = self._at[:, None] + np.arange(self._chunk_size)[None]
        self._at += self._chunk_size
        return self._actions[np.minimum(rows, len(self._actions) - 1)]


class BlindReplayOfTasks:
    """Replays, regardless of the observation, one demonstration of the task that each environment plays."""

    def __init__(self, suite: str, env: VecEnv, chunk_size: int = 8) -> None:
        """Demonstrations are played when a task is first met; of one that the expert does not solve, its last try is
        replayed."""
        self._suite, self._env, self._demos = suite, env, {}
        self._replays = [BlindReplay(np.zeros((1, env.action_spec.dim)), 1, chunk_size) for _ in range(env.num_envs)]
        self.spec = PolicySpec(None, chunk_size)

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""
        for i in range(len(self._replays)) if env_ids is None else env_ids:
            task = self._env.tasks[i]
            if task not in self._demos:
                self._demos[task] = expert_actions(self._suite, 0, task=task, attempts=5)
            self._replays[i] = BlindReplay(self._demos[task], 1, self.spec.chunk_size)

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """See `vla.core.types.Policy.act`."""
        return np.concatenate([replay.act(obs) for replay in self._replays])


def blind_replay(suite: str, env: VecEnv) -> Policy:
    """The blind floor of a suite: one demonstration replayed; on LIBERO, whose tasks are told apart by their sentences
    and whose scenes differ little, one for each task."""
    if suite.startswith("libero-"):
        return BlindReplayOfTasks(suite, env)
    return BlindReplay(expert_actions(suite, 0), env.num_envs)


def expert_actions(suite: str, seed: int, *, task: str | None = None, attempts: int = 50) -> np.ndarray:
    """(T, A) actions of one successful scripted demonstration, from `seed` on.

    Of a `task`, where one is named, it may be a failed one: the last of the attempts.
    """
    spec = load_suite(suite)
    worlds = worlds_class(spec)(spec, 1)
    worlds.render_images = False
    for attempt in range(seed, seed + attempts):
        worlds.reset(seeds=[attempt], tasks=None if task is None else [task])
        expert = make_expert(suite, 1)
        actions = []
        while not worlds.over[0]:
            chunk = expert.act(worlds.observation())
            actions.append(chunk[0, 0])
            result = worlds.step_chunk(chunk)
        if result.info["success"][0]:
            break
    else:
        if task is None:
            raise RuntimeError(f"the scripted expert failed {attempts} times in a row on {suite!r}")
    worlds.close()
    return np.stack(actions)
