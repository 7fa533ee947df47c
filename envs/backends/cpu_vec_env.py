"""CPU backend: classic MuJoCo, environments spread over worker processes, images in shared memory.

A worker that dies or hangs is replaced: the episodes it was playing are reported truncated, with
`StepResult.worker_restarted`, and everything else goes on.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from envs.backends.worker import SharedFrames, Worker, WorkerDied
from envs.sim.base_worlds import WORDS, WordedEnv, check_seeds, check_started
from envs.sim.cameras import FrameHistory
from envs.sim.render_options import RenderOptions
from envs.tabletop.language import Phrasings
from envs.tabletop.suites import AnySuite
from vla.core.types import ActionChunk, Observation, StepResult

ANSWER_TIMEOUT_S = 120.0
"""A worker that is silent for longer has hung: a chunk takes well under a second per environment."""
OTHER_PYTHON_TIMEOUT_S = 900.0
"""The same, where a reset may compile a model for every environment, on a busy machine some 20 s each."""
_MAX_DEATHS_IN_A_ROW = 3
"""Deaths of one worker without a completed step between them after which the cause is not bad luck."""

_log = logging.getLogger(__name__)


class MujocoVecEnv(WordedEnv):
    """`vla.core.types.VecEnv` over worker processes."""

    def __init__(
        self,
        suite: AnySuite,
        worlds: Callable[..., Any],
        num_envs: int,
        *,
        num_workers: int,
        render: RenderOptions = RenderOptions(),  # noqa: B008 - frozen
        phrasings: Phrasings = "train",
        answer_timeout_s: float | None = None,
        python: Path | None = None,
    ) -> None:
        """`worlds(suite, n, phrasings=, render=, frames_out=)` makes n environments in one process: see
        `envs.make.worlds_class`. `python`: the interpreter of another environment, for worlds that need one."""
        if num_envs < 1 or num_workers < 1:
            raise ValueError(f"num_envs and num_workers must be at least 1, got {num_envs} and {num_workers}")
        num_workers = min(num_workers, num_envs)
        self.suite, self.num_envs, self.horizon = suite, num_envs, suite.horizon
        self.task_names, self.plane = suite.tasks, suite.plane
        make = partial(worlds, suite, phrasings=phrasings, render=render)
        if answer_timeout_s is None:
            answer_timeout_s = ANSWER_TIMEOUT_S if python is None else OTHER_PYTHON_TIMEOUT_S
        views = suite.num_views
        frames = SharedFrames(num_envs, views, render.image_size, render.depth)
        self._memory: SharedMemory | None = SharedMemory(create=True, size=frames.num_bytes)
        self._images, self._depth = frames.arrays(self._memory, 0, num_envs)
        bounds = np.linspace(0, num_envs, num_workers + 1).astype(int).tolist()
        self._workers = [
            Worker(make, lo, hi, self._memory.name, frames, timeout_s=answer_timeout_s, python=python)
            for lo, hi in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        self._deaths = [0] * num_workers
        atexit.register(self.close)
        try:
            for worker in self._workers:
                worker.start()
            for w in range(num_workers):
                facts = self._first_facts(w)
        except BaseException:
            self.close()
            raise
        self.action_spec, self.cameras = facts.action_spec, facts.cameras
        self.proprio_dim, self.privileged_dim = facts.proprio_dim, facts.privileged_dim
        self.proprio_names, self.mujoco_version = facts.proprio_names, facts.mujoco
        shapes: dict[str, tuple[int, ...]] = {"proprio": (self.proprio_dim,), "privileged": (self.privileged_dim,)}
        if render.calibration:
            shapes |= {"intrinsics": (views, 3, 3), "extrinsics": (views, 4, 4)}
        counts = [worker.hi - worker.lo for worker in self._workers]
        self._state: list[dict[str, Any]] = [
            {name: np.zeros((n, *shape), np.float32) for name, shape in shapes.items()} | {w: [""] * n for w in WORDS}
            for n in counts
        ]
        """Last report of each worker, see `envs.backends.worker`; replaced as a whole, never written to."""
        self._history = FrameHistory(render.history) if render.history else None
        self._drawing = True
        self._asked: list[tuple[int, str | None] | None] = [None] * num_envs
        """Seed and task of every episode, as requested, for a worker that replaces a dead one."""
        self._playing = np.zeros(num_envs, bool)
        self._lost = np.zeros(num_envs, bool)
        """Episodes that died with their worker and have not been reported yet."""

    @property
    def worker_pids(self) -> list[int]:
        """Present process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    # ------------------------------------------------------------------ workers
    def _first_facts(self, w: int) -> Any:
        try:
            return self._workers[w].ready()
        except WorkerDied as error:
            raise RuntimeError(f"simulation worker {w} {error} while it built its worlds") from None

    def _all(self, command: str, arguments: dict[int, object]) -> dict[int, Any]:
        """Send a command to several workers and store the state they report. A worker that dies is replaced and has no
        result, unless the command can be repeated."""
        self._check_open()
        for w, argument in arguments.items():
            self._workers[w].send(command, argument)
        results, failure = {}, None
        for w in arguments:
            try:  # every answer is read even if one is an error, or the pipes would be one message behind
                result, state = self._workers[w].receive()
            except WorkerDied as death:
                self._replace(w, death)
                if command in ("step", "continue"):  # what they stood in is lost
                    continue
                try:
                    self._workers[w].send(command, arguments[w])
                    result, state = self._workers[w].receive()
                except WorkerDied as again:
                    raise RuntimeError(f"simulation worker {w} {again} when asked to {command}, twice") from None
            except Exception as error:
                failure = error
                continue
            self._state[w] = {**self._state[w], **state}
            results[w] = result
            if command == "step":
                self._deaths[w] = 0
        if failure is not None:
            raise failure
        return results

    def _check_open(self) -> None:
        if self._memory is None:
            raise RuntimeError("these environments are closed: make new ones with make_vec")

    def _replace(self, w: int, death: WorkerDied) -> None:
        """Replace worker `w`. Its environments keep their last observation until they are reset."""
        worker = self._workers[w]
        mine = slice(worker.lo, worker.hi)
        self._deaths[w] += 1
        if self._deaths[w] >= _MAX_DEATHS_IN_A_ROW:
            raise RuntimeError(f"simulation worker {w} {death}, {self._deaths[w]} times without completing a step")
        lost = int(self._playing[mine].sum())
        _log.warning("simulation worker %d %s and is restarted; %d episodes are cut short", w, death, lost)
        self._lost[mine] |= self._playing[mine]
        self._playing[mine] = False
        try:
            worker.restart()
            began = [i for i in range(worker.lo, worker.hi) if self._asked[i] is not None]
            for i in began:  # one by one: some episodes were asked for with a task, some without
                seed, task = self._asked[i]  # type: ignore[misc]
                worker.send("restore", ([seed], None if task is None else [task], [i - worker.lo]))
                worker.receive()
            worker.send("render", self._drawing)
            worker.receive()
        except WorkerDied as again:
            raise RuntimeError(f"simulation worker {w} {death}; the one in its place {again}") from None

    # ------------------------------------------------------------------ the contract
    def set_rendering(self, on: bool) -> None:
        """See `vla.core.types.VecEnv.set_rendering`."""
        self._drawing = on
        self._all("render", dict.fromkeys(range(len(self._workers)), on))

    def reset(
        self,
        *,
        seeds: Sequence[int],
        tasks: Sequence[str] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> Observation:
        """See `vla.core.types.VecEnv.reset`."""
        ids = np.arange(self.num_envs) if env_ids is None else np.asarray(env_ids, dtype=int)
        check_seeds(ids, seeds, tasks)
        arguments = self._shares(ids, seeds, tasks)
        self._playing[ids] = False  # what these worlds played is over, and nobody's loss if a worker dies now
        self._all("reset", arguments)
        for k, i in enumerate(ids):
            self._asked[i] = (int(seeds[k]), tasks[k] if tasks else None)
        self._playing[ids], self._lost[ids] = True, False
        if self._history is not None:
            self._history.restart(self._by_camera(self._images), ids)
        return self.observation()

    def continue_episodes(
        self, *, seeds: Sequence[int], tasks: Sequence[str], env_ids: Sequence[int] | None = None
    ) -> Observation:
        """Begin episodes of `tasks` in environments `env_ids` (all when None), where they are now, without a reset; the
        seeds draw the words. ValueError for a suite or a task that cannot. Where a worker dies meanwhile, the next
        step reports its episodes lost."""
        ids = np.arange(self.num_envs) if env_ids is None else np.asarray(env_ids, dtype=int)
        check_seeds(ids, seeds, tasks)
        check_started(self._asked)
        arguments = self._shares(ids, seeds, tasks)
        self._playing[ids] = True
        self._all("continue", arguments)
        return self.observation()

    def _shares(self, ids: np.ndarray, seeds: Sequence[int], tasks: Sequence[str] | None) -> dict[int, object]:
        """(seeds, tasks, its own numbers of the environments) for each worker that has some of `ids`."""
        shares: dict[int, object] = {}
        for w, worker in enumerate(self._workers):
            mine = np.flatnonzero((ids >= worker.lo) & (ids < worker.hi))
            if len(mine):
                chosen = [tasks[k] for k in mine] if tasks else None
                shares[w] = ([int(seeds[k]) for k in mine], chosen, [int(ids[k] - worker.lo) for k in mine])
        return shares

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """See `vla.core.types.VecEnv.step_chunk`. An episode lost with its worker shows its last observation."""
        chunk = np.asarray(chunk, np.float32)
        if chunk.ndim != 3 or chunk.shape[0] != self.num_envs:
            raise ValueError(f"action chunk must be ({self.num_envs}, C, {self.action_spec.dim}), got {chunk.shape}")
        self._check_open()
        check_started(self._asked)
        results = self._all("step", {w: chunk[worker.lo : worker.hi] for w, worker in enumerate(self._workers)})
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros(self.num_envs, bool), self._lost.copy()
        n_steps = np.zeros(self.num_envs, np.int64)
        info = {name: np.zeros(self.num_envs, bool) for name in ("success", "wrong_object")}
        diverged = np.zeros(self.num_envs, bool)
        for w, outcome in results.items():
            mine = slice(self._workers[w].lo, self._workers[w].hi)
            reward[mine], terminated[mine], n_steps[mine] = outcome.reward, outcome.terminated, outcome.n_steps
            truncated[mine] |= outcome.truncated
            diverged[mine] = outcome.diverged
            for name, values in outcome.info.items():
                info.setdefault(name, np.zeros(self.num_envs, values.dtype))[mine] = values
        restarted = self._lost.copy()
        self._lost[:] = False
        self._playing &= ~(terminated | truncated)
        if self._history is not None:
            self._history.push(self._by_camera(self._images))
        return StepResult(self.observation(), reward, terminated, truncated, n_steps, info, diverged, restarted)

    def words(self, name: str) -> list[str]:
        """One of `WORDS` of each environment's episode, as its worker told it last."""
        return [text for state in self._state for text in state[name]]

    def _rows(self, name: str) -> np.ndarray:
        """(B, ...) a new array: what every worker reported last."""
        return np.concatenate([state[name] for state in self._state])

    def _by_camera(self, values: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values[:, v] for v, name in enumerate(self.cameras)}

    def observation(self) -> Observation:
        """See `vla.core.types.VecEnv.observation`. Everything is copied once, out of the shared memory."""
        self._check_open()
        calibrated = "intrinsics" in self._state[0]
        return Observation(
            {name: view.copy() for name, view in self._by_camera(self._images).items()},
            self._rows("proprio"),
            self.words("instruction"),
            self._rows("privileged"),
            depth=None if self._depth is None else {n: v.copy() for n, v in self._by_camera(self._depth).items()},
            intrinsics=self._by_camera(self._rows("intrinsics")) if calibrated else None,
            extrinsics=self._by_camera(self._rows("extrinsics")) if calibrated else None,
            history=None if self._history is None else self._history.before(),
            exact_proprio=self._rows("exact_proprio") if "exact_proprio" in self._state[0] else None,
        )

    def close(self) -> None:
        """Stop the workers and free the shared memory. Safe to call twice."""
        if self._memory is None:
            return
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.close()
        self._images = self._depth = None  # type: ignore[assignment]
        self._memory.close()
        self._memory.unlink()
        self._memory = None
