"""CPU backend: classic MuJoCo, worlds spread over worker processes, images in shared memory.

Workers are spawned (a forked EGL context deadlocks), create their GL context themselves, and run one thread each
(`LP_NUM_THREADS=1`: without it the software renderer's threads fight over the cores, and two workers are no faster
than one).
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from envs.base import check_seeds
from envs.language import Phrasings
from envs.suites import Suite, load_suite
from vla.types import ActionChunk, Observation, StepResult

_WORKER_ENVIRONMENT = {
    "LP_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@contextmanager
def worker_environment() -> Iterator[None]:
    """Environment variables that worker processes must be born with."""
    saved = {name: os.environ.get(name) for name in (*_WORKER_ENVIRONMENT, "MUJOCO_GL")}
    os.environ.update(_WORKER_ENVIRONMENT)
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def worlds_class(suite: Suite) -> type:
    """Which class plays a suite in one process: ours for a suite file, an adapter's for its own.

    ValueError naming the extra that an adapter needs and does not find.
    """
    if isinstance(suite, Suite):
        from envs.worlds import Worlds

        return Worlds
    from envs.robosuite_env import RobosuiteWorlds, require_robosuite

    require_robosuite()
    return RobosuiteWorlds


def _serve(
    pipe: Connection, suite: Suite, num_worlds: int, image_size: int, phrasings: Phrasings, memory: str, offset: int
) -> None:
    """Worker main: owns some worlds, answers commands until told to close or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    shared = SharedMemory(name=memory)
    try:
        views = 2
        shape = (num_worlds, views, image_size, image_size, 3)
        images = np.ndarray(shape, np.uint8, buffer=shared.buf, offset=offset)
        make = worlds_class(suite)
        worlds = make(suite, num_worlds, image_size=image_size, phrasings=phrasings, images_out=images)
        pipe.send(("ok", (worlds.action_spec, worlds.cameras, worlds.proprio_dim, worlds.privileged_dim)))
        while True:
            command, argument = pipe.recv()
            if command == "close":
                return
            try:
                if command == "reset":
                    seeds, tasks, ids = argument
                    worlds.reset(seeds=seeds, tasks=tasks, env_ids=ids)
                    result = None
                elif command == "step":
                    step = worlds.step_chunk(argument)
                    result = (step.reward, step.terminated, step.truncated, step.n_steps, step.info)
                elif command == "render":
                    worlds.render_images = argument
                    result = None
                state = (
                    worlds.proprio(), worlds.privileged(), worlds.observation().instruction,
                    worlds.alternative_instructions(),
                    [e.template if e else "" for e in worlds.episodes], [e.task if e else "" for e in worlds.episodes],
                )  # fmt: skip
                pipe.send(("ok", (result, state)))
            except Exception as error:  # sent to the parent, which raises it there
                pipe.send(("error", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    finally:
        images = worlds = None  # type: ignore[assignment]
        shared.close()
        # Mesa's atexit teardown prints EGL errors; this process has nothing left to flush.
        os._exit(0)


class MujocoVecEnv:
    """`vla.types.VecEnv` over worker processes."""

    def __init__(
        self, suite: Suite, num_envs: int, *, num_workers: int, image_size: int, phrasings: Phrasings = "train"
    ) -> None:
        if num_envs < 1 or num_workers < 1:
            raise ValueError(f"num_envs and num_workers must be at least 1, got {num_envs} and {num_workers}")
        num_workers = min(num_workers, num_envs)
        self.suite, self.num_envs, self.horizon = suite, num_envs, suite.horizon
        self._bounds = np.linspace(0, num_envs, num_workers + 1).astype(int)
        self._closed = False
        frame = 2 * image_size * image_size * 3
        self._memory = SharedMemory(create=True, size=num_envs * frame)
        self._images = np.ndarray((num_envs, 2, image_size, image_size, 3), np.uint8, buffer=self._memory.buf)
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        with worker_environment():
            for lo, hi in zip(self._bounds[:-1], self._bounds[1:], strict=True):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(theirs, suite, int(hi - lo), image_size, phrasings, self._memory.name, int(lo) * frame),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        atexit.register(self.close)
        for w in range(num_workers):
            facts = self._receive(w)
        self.action_spec, self.cameras, self.proprio_dim, self.privileged_dim = facts
        self._proprio = np.zeros((num_envs, self.proprio_dim), np.float32)
        self._privileged = np.zeros((num_envs, self.privileged_dim), np.float32)
        self._instructions = [""] * num_envs
        self._alternatives = [""] * num_envs
        self.templates = [""] * num_envs
        """Phrasing template of each world's instruction."""
        self.tasks = [""] * num_envs
        """Task of each world's episode."""

    def _receive(self, w: int) -> object:
        try:
            status, value = self._pipes[w].recv()
        except (EOFError, ConnectionResetError) as error:
            code = self._processes[w].exitcode
            raise RuntimeError(
                f"simulation worker {w} died (exit code {code}); run again, or with --workers 1 to see its error"
            ) from error
        if status == "error":
            raise value
        return value

    def _all(self, command: str, arguments: dict[int, object]) -> dict[int, object]:
        for w, argument in arguments.items():
            self._pipes[w].send((command, argument))
        results, failure = {}, None
        for w in arguments:
            try:  # every answer is read even if one is an error, or the pipes would be one message behind
                result, state = self._receive(w)
            except (ValueError, RuntimeError) as error:
                failure = error
                continue
            lo, hi = self._bounds[w], self._bounds[w + 1]
            self._proprio[lo:hi], self._privileged[lo:hi] = state[0], state[1]
            self._instructions[lo:hi], self._alternatives[lo:hi] = state[2], state[3]
            self.templates[lo:hi], self.tasks[lo:hi] = state[4], state[5]
            results[w] = result
        if failure is not None:
            raise failure
        return results

    def set_rendering(self, on: bool) -> None:
        """Switch images off for experts that do not look (they keep the last frame) or on again."""
        self._all("render", dict.fromkeys(range(len(self._pipes)), on))

    def reset(
        self,
        *,
        seeds: Sequence[int],
        tasks: Sequence[str] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> Observation:
        """See `vla.types.VecEnv.reset`."""
        ids = np.arange(self.num_envs) if env_ids is None else np.asarray(env_ids, dtype=int)
        check_seeds(ids, seeds)
        arguments: dict[int, object] = {}
        for w in range(len(self._pipes)):
            mine = np.flatnonzero((ids >= self._bounds[w]) & (ids < self._bounds[w + 1]))
            if len(mine):
                chosen = [tasks[k] for k in mine] if tasks else None
                local = [int(ids[k] - self._bounds[w]) for k in mine]
                arguments[w] = ([int(seeds[k]) for k in mine], chosen, local)
        self._all("reset", arguments)
        return self.observation()

    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """See `vla.types.VecEnv.step_chunk`."""
        chunk = np.asarray(chunk, np.float32)
        if chunk.ndim != 3 or chunk.shape[0] != self.num_envs:
            raise ValueError(f"action chunk must be ({self.num_envs}, C, {self.action_spec.dim}), got {chunk.shape}")
        parts = {w: chunk[self._bounds[w] : self._bounds[w + 1]] for w in range(len(self._pipes))}
        results = self._all("step", parts)
        fields = [np.concatenate([results[w][k] for w in sorted(results)]) for k in range(4)]
        infos = [results[w][4] for w in sorted(results)]
        info = {name: np.concatenate([i[name] for i in infos]) for name in infos[0]}
        return StepResult(self.observation(), *fields, info)

    def observation(self) -> Observation:
        """Of every world, now. Copies: safe to keep."""
        images = {name: self._images[:, v].copy() for v, name in enumerate(self.cameras)}
        return Observation(images, self._proprio.copy(), list(self._instructions), self._privileged.copy())

    def alternative_instructions(self) -> list[str]:
        """See `vla.types.VecEnv.alternative_instructions`."""
        return list(self._alternatives)

    def close(self) -> None:
        """Stop the workers and free the shared memory. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for pipe in self._pipes:
            with suppress(BrokenPipeError, OSError):
                pipe.send(("close", None))
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        del self._images
        self._memory.close()
        self._memory.unlink()


def make_cpu_vec(suite: str, num_envs: int, *, num_workers: int, image_size: int, phrasings: Phrasings) -> MujocoVecEnv:
    """Build the CPU backend of a suite by name."""
    spec = load_suite(suite)
    worlds_class(spec)  # a missing extra is told here, not by a worker that dies of it
    return MujocoVecEnv(spec, num_envs, num_workers=num_workers, image_size=image_size, phrasings=phrasings)
