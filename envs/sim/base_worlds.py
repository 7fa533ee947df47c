"""The base class of environments in one process, tabletop or adapter: shapes, image memory, which episodes are over."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.sim.render_options import RenderOptions
from envs.tabletop.language import Phrasings
from vla.core.types import ActionChunk, ActionSpec, Observation, StepResult, VecEnv

Frames = tuple[NDArray[np.uint8], NDArray[np.float32] | None]
"""Images (n, V, H, W, 3) and, if requested, depth (n, V, H, W) in metres."""


def check_seeds(
    ids: Sequence[int] | NDArray[np.int64], seeds: Sequence[int], tasks: Sequence[str] | None = None
) -> None:
    """ValueError unless there is one seed, a whole number from 0 on, for each environment in `ids`, which names none
    twice, and one of the `tasks`, if there are any."""
    for seed in seeds:
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
            raise ValueError(f"a seed must be a whole number, got {seed!r}")
        if seed < 0:
            raise ValueError(f"a seed must be at least 0, got {seed}")
    if len(ids) != len(seeds):
        raise ValueError(f"reset needs one seed per world: {len(ids)} worlds, {len(seeds)} seeds")
    if tasks is not None and len(tasks) != len(ids):
        raise ValueError(f"reset needs one task per world, or none: {len(ids)} worlds, {len(tasks)} tasks")
    if len({int(i) for i in ids}) < len(ids):
        raise ValueError(f"reset names a world twice: {[int(i) for i in ids]}; it has one episode")


def check_started(episodes: Sequence[object]) -> None:
    """RuntimeError while no environment has an episode (all None)."""
    if all(episode is None for episode in episodes):
        raise RuntimeError("no episode has begun: call reset() before step_chunk()")


@dataclass
class ChunkOutcome:
    """Result of a chunk in n environments: `vla.core.types.StepResult` without its observation, (n,) arrays."""

    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    n_steps: NDArray[np.int64]
    diverged: NDArray[np.bool_]
    info: dict[str, NDArray[Any]]


WORDS = ("instruction", "swapped_instruction", "template", "task")
"""Words of an episode that `WordedEnv` tells."""


class WordedEnv(VecEnv):
    """Environments that tell the words of their present episodes; where those live elsewhere, override `words`."""

    episodes: Sequence[Any]
    """Episode of each environment, with the fields `WORDS` and a seed; None before the first reset."""

    def words(self, name: str) -> list[str]:
        """One of `WORDS` of each environment's episode; "" before the first reset."""
        return [getattr(episode, name) if episode else "" for episode in self.episodes]

    @property
    def tasks(self) -> list[str]:
        """See `vla.core.types.VecEnv.tasks`."""
        return self.words("task")

    @property
    def templates(self) -> list[str]:
        """See `vla.core.types.VecEnv.templates`."""
        return self.words("template")

    def alternative_instructions(self) -> list[str]:
        """See `vla.core.types.VecEnv.alternative_instructions`."""
        return self.words("swapped_instruction")


class BaseWorlds(WordedEnv):
    """n environments in this process. Subclasses start episodes, run chunks and render.

    A worker process calls `start_episodes` and `run_chunk`, which build no observation; `reset` and `step_chunk` add
    one for callers in this process.
    """

    def __init__(
        self,
        suite: Any,
        num_worlds: int,
        *,
        action_spec: ActionSpec,
        cameras: tuple[str, ...],
        proprio_dim: int,
        privileged_dim: int,
        phrasings: Phrasings,
        render: RenderOptions,
        frames_out: Frames | None,
    ) -> None:
        """`frames_out`: arrays to render into, such as shared memory; None for arrays of its own."""
        self.suite, self.phrasings, self.image_size = suite, phrasings, render.image_size
        self.num_envs, self.horizon = num_worlds, suite.horizon
        self.task_names, self.plane = suite.tasks, suite.plane
        self.action_spec, self.cameras = action_spec, cameras
        self.proprio_dim, self.privileged_dim = proprio_dim, privileged_dim
        self.render_images = True
        """Render at resets and after action chunks; if False, images keep the last frame."""
        shape = (num_worlds, len(cameras), render.image_size, render.image_size, 3)
        own = np.zeros(shape, np.uint8), np.zeros(shape[:-1], np.float32) if render.depth else None
        self.images, self.depth = own if frames_out is None else frames_out
        """(n, V, H, W, 3) RGB and (n, V, H, W) metres of the last render; no depth unless requested."""
        self.intrinsics = np.zeros((*shape[:2], 3, 3), np.float32) if render.calibration else None
        self.extrinsics = np.zeros((*shape[:2], 4, 4), np.float32) if render.calibration else None
        """See `vla.core.types.Observation`; of the last render, per world and camera."""
        self.episodes: list[Any] = [None] * num_worlds
        self.over = np.ones(num_worlds, bool)
        self.elapsed = np.zeros(num_worlds, np.int64)
        """Control steps since the reset."""

    def set_rendering(self, on: bool) -> None:
        """See `vla.core.types.VecEnv.set_rendering`."""
        self.render_images = on

    @abstractmethod
    def start_episodes(self, seeds: Sequence[int], tasks: Sequence[str] | None, env_ids: Sequence[int] | None) -> None:
        """Start the episodes that `seeds` mean in environments `env_ids` (all when None), and render them."""

    def continue_episodes(self, seeds: Sequence[int], tasks: Sequence[str], env_ids: Sequence[int] | None) -> None:
        """Begin episodes of `tasks` where these environments are now. ValueError where they cannot."""
        raise ValueError(f"suite {self.suite.name!r} cannot go on without a reset: the tabletop suites can")

    @abstractmethod
    def run_chunk(self, chunk: ActionChunk) -> ChunkOutcome:
        """Run up to C control steps in each environment whose episode is not over, then render once.

        A simulation that blows up truncates its episode and shows its last observation from before.
        """

    def reset(
        self,
        *,
        seeds: Sequence[int],
        tasks: Sequence[str] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> Observation:
        """See `vla.core.types.VecEnv.reset`."""
        self.start_episodes(seeds, tasks, env_ids)
        return self.observation()

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """See `vla.core.types.VecEnv.step_chunk`."""
        check_started(self.episodes)
        outcome = self.run_chunk(chunk)
        return StepResult(self.observation(), **vars(outcome))

    @abstractmethod
    def proprio(self) -> NDArray[np.float32]:
        """(n, P), see `proprio_names`."""

    def exact_proprio(self) -> NDArray[np.float32] | None:
        """(n, P) proprio without the noise of sensors; None where they have none."""
        return None

    @abstractmethod
    def privileged(self) -> NDArray[np.float32]:
        """(n, S) simulator state for critics and scripted experts."""

    def observation(self) -> Observation:
        """The present observation of every environment. Images are views of those of the last render: copy to keep."""

        def by_camera(values: NDArray[Any] | None) -> dict[str, NDArray[Any]] | None:
            return None if values is None else {name: values[:, v] for v, name in enumerate(self.cameras)}

        return Observation(
            by_camera(self.images),
            self.proprio(),
            self.words("instruction"),
            self.privileged(),
            depth=by_camera(self.depth),
            intrinsics=by_camera(self.intrinsics),
            extrinsics=by_camera(self.extrinsics),
            exact_proprio=self.exact_proprio(),
        )

    def _ids(self, seeds: Sequence[int], env_ids: Sequence[int] | None) -> list[int]:
        """Indices of the environments to reset. ValueError unless each has its seed."""
        ids = list(range(self.num_envs)) if env_ids is None else [int(i) for i in env_ids]
        check_seeds(ids, seeds)
        return ids

    def _checked(self, chunk: ActionChunk) -> NDArray[np.float64]:
        """(n, C, A). ValueError for another shape, NaN or infinity."""
        chunk = np.asarray(chunk, np.float64)
        if chunk.ndim != 3 or chunk.shape[0] != self.num_envs or chunk.shape[2] != self.action_spec.dim:
            raise ValueError(f"action chunk must be ({self.num_envs}, C, {self.action_spec.dim}), got {chunk.shape}")
        if not np.isfinite(chunk).all():
            raise ValueError("action chunk holds NaN or Inf")
        return chunk
