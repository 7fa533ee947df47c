"""The simulated robot at a task and its undo: what it practises with, in real time, in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from bascule.practice.attendants import DONE, NOTHING, OUT_OF_REACH
from envs.backends.reset_free_env import ResetFreeVecEnv
from envs.backends.worker import worker_environment
from envs.make import worlds_class
from envs.registry import load_suite
from envs.seeds import RL_TRAIN_SEEDS
from envs.sim.render_options import RenderOptions
from policies.control.realtime_sim import LiveWorld
from rl.offline.run import Draws
from vla.core.types import ActionChunk, Observation, StepResult


class _InThisProcess:
    """Environments of this process, called as those in worker processes are."""

    def __init__(self, worlds: Any) -> None:
        self._worlds = worlds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worlds, name)

    def continue_episodes(
        self, *, seeds: Sequence[int], tasks: Sequence[str], env_ids: Sequence[int] | None = None
    ) -> Observation:
        self._worlds.continue_episodes(seeds, tasks, env_ids)
        return self._worlds.observation()


class PairWorld(ResetFreeVecEnv):
    """One environment in which a task and its undo alternate when it is told so, and nothing else ends an episode."""

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """See `ResetFreeVecEnv.step_chunk`; `info["word"]` (1,) is what an attendant would say."""
        self.elapsed[:] = 0  # whoever controls it keeps the time
        result = super().step_chunk(chunk)
        lost = result.truncated
        result.info["word"] = np.where(lost, OUT_OF_REACH, np.where(result.info["success"], DONE, NOTHING))
        result.truncated = np.zeros(1, bool)
        return result

    def put_back(self) -> Observation:
        """A real reset: the next scene, at the first task."""
        return self.start()

    def turn(self) -> Observation:
        """The other task begins, where things are."""
        return self.begin([0])


def pair_world(suite: str, pair: tuple[str, str], image_size: int, seed: int) -> PairWorld:
    """A `PairWorld` of a suite, in this process."""
    spec = load_suite(suite)
    worlds = _InThisProcess(worlds_class(spec)(spec, 1, render=RenderOptions(image_size)))
    return PairWorld(worlds, pair, Draws(seed, RL_TRAIN_SEEDS))  # type: ignore[arg-type]


class SimulatedRobot(LiveWorld):
    """The simulated robot at a pair of tasks, in real time, which puts things back when it is asked."""

    def __init__(
        self, suite: str, pair: tuple[str, str], *, control_hz: float, seed: int, image_size: int,
        proprio_names: Sequence[str],
    ) -> None:  # fmt: skip
        """See `LiveWorld` and `pair_world`."""
        with worker_environment():
            make = partial(pair_world, suite, pair, image_size, seed)
            super().__init__(make, control_hz=control_hz, seed=seed, task=pair[0], proprio_names=proprio_names)

    def put_back(self) -> None:
        """See `Attendant.put_back`."""
        self.call("put_back")

    def next_task(self, forward: bool) -> None:
        """See `Attendant.next_task`: the tasks take turns by themselves."""
        self.call("turn")

    def word(self) -> int:
        """See `Attendant.word`."""
        return self.told
