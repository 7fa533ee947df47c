"""A worker process that owns some environments, and the parent's end of it, which notices when it dies or hangs.

Workers are spawned (a forked EGL context deadlocks), create their GL context themselves, and run one thread each
(`LP_NUM_THREADS=1`: without it the software renderer's threads fight over the cores, and two workers are no faster
than one).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from envs.backends.other_python import spawn_in
from envs.sim.base_worlds import WORDS, BaseWorlds, ChunkOutcome, Frames
from vla.core.subprocesses import spawn
from vla.core.types import ActionSpec
from vla.runtime import rendering_backend

_WORKER_ENVIRONMENT = {
    "LP_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
START_TIMEOUT_S = 300.0
"""A worker imports its simulator and compiles its models; adapters take a minute on a busy machine."""


class WorkerDied(RuntimeError):
    """The process is gone, or was killed because it did not answer."""


@contextmanager
def worker_environment() -> Iterator[None]:
    """Set the environment variables that workers must start with. ValueError where nothing can be rendered."""
    rendering_backend.check()
    saved = {name: os.environ.get(name) for name in _WORKER_ENVIRONMENT}
    os.environ.update(_WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class SharedFrames:
    """Layout of the memory that all workers draw into: everyone's images, then everyone's depths."""

    num_envs: int
    """Number of environments of all workers together."""
    views: int
    image_size: int
    depth: bool

    @property
    def num_bytes(self) -> int:
        """Size of the shared memory."""
        return self._depth_offset + 4 * self.depth * self.num_envs * self.views * self.image_size**2

    @property
    def _depth_offset(self) -> int:
        images = 3 * self.num_envs * self.views * self.image_size**2
        return images + -images % 4

    def arrays(self, memory: SharedMemory, lo: int, hi: int) -> Frames:
        """Images (hi - lo, V, H, W, 3) and depths (hi - lo, V, H, W) of environments lo..hi."""
        frame = self.views * self.image_size**2
        shape = (hi - lo, self.views, self.image_size, self.image_size)
        images = np.ndarray((*shape, 3), np.uint8, buffer=memory.buf, offset=3 * lo * frame)
        if not self.depth:
            return images, None
        return images, np.ndarray(shape, np.float32, buffer=memory.buf, offset=self._depth_offset + 4 * lo * frame)


@dataclass(frozen=True)
class Facts:
    """Facts that a worker reports when it has built its environments; see `vla.core.types.VecEnv`."""

    action_spec: ActionSpec
    cameras: tuple[str, ...]
    proprio_dim: int
    privileged_dim: int
    proprio_names: tuple[str, ...]
    mujoco: str
    """Version of the MuJoCo that simulates."""


class Worker:
    """The parent's end. `start`, `ready`, then `send` and `receive` in turns."""

    def __init__(
        self,
        make: Callable[..., Any],
        lo: int,
        hi: int,
        memory: str,
        frames: SharedFrames,
        *,
        timeout_s: float,
        python: Path | None = None,
    ) -> None:
        """`make(num_worlds=..., frames_out=...)` builds the environments lo..hi, in the new process; `python`: the
        interpreter of another environment to run it in."""
        self.lo, self.hi = lo, hi
        self._arguments = (make, lo, hi, memory, frames)
        self._timeout_s, self._python = timeout_s, python
        self._pipe: Connection | None = None
        self._has_worked = False
        self.process: Any = None

    def start(self) -> None:
        """Spawn the process; returns before it has built its environments."""
        self._pipe, theirs = Pipe()
        with worker_environment():
            if self._python is None:
                self.process = spawn(_serve, (theirs, *self._arguments))
            else:
                self.process = spawn_in(self._python, _serve, theirs, self._arguments)
        theirs.close()

    def ready(self) -> Facts:
        """Wait until the environments are built. An error of the worker while it built them is raised here."""
        return self.receive(START_TIMEOUT_S)

    def send(self, command: str, argument: object) -> None:
        """Send a command; `receive` raises where the worker is gone."""
        assert self._pipe is not None, "start first"
        with suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send((command, argument))

    def receive(self, timeout_s: float | None = None) -> Any:
        """The answer. WorkerDied if there will be none; the worker's own error if it raised one."""
        assert self._pipe is not None, "start first"
        limit = self._timeout_s if timeout_s is None else timeout_s
        try:
            if not self._pipe.poll(limit):
                self.kill()
                raise WorkerDied(f"did not answer for {limit:g} s and was killed")
            status, value = self._pipe.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError):
            self.process.join(5)
            if not self._has_worked and (reason := rendering_backend.problem()) is not None:
                raise ValueError(reason) from None  # a GL library that ends the process would end the next one, too
            raise WorkerDied(f"died (exit code {self.process.exitcode})") from None
        if status == "error":
            raise value
        self._has_worked |= timeout_s is None  # it has answered a command, not only built its worlds
        return value

    def kill(self) -> None:
        """Kill the process, also in the middle of a command."""
        self.process.kill()
        self.process.join(5)

    def restart(self) -> None:
        """A new process in the place of a dead one, ready."""
        self.kill()
        if self._pipe is not None:
            self._pipe.close()
        self.start()
        self.ready()

    def close(self) -> None:
        """Request the process to end and wait for it. Does nothing if none was started."""
        if self.process is None:
            return
        self.send("close", None)
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.kill()


def _state(worlds: BaseWorlds, command: str) -> dict[str, Any]:
    """The state that a command may have changed: arrays and lists of one row per environment.

    Words change at a reset only. Images and depth are in shared memory already.
    """
    state: dict[str, Any] = {"proprio": worlds.proprio(), "privileged": worlds.privileged()}
    if (exact := worlds.exact_proprio()) is not None:
        state["exact_proprio"] = exact
    if command in ("reset", "continue"):
        state |= {name: worlds.words(name) for name in WORDS}
    if worlds.intrinsics is not None:
        state |= {"intrinsics": worlds.intrinsics, "extrinsics": worlds.extrinsics}
    return state


def mujoco_version() -> str:
    """Version of this process's MuJoCo."""
    import mujoco

    return str(mujoco.__version__)


def _answer(worlds: BaseWorlds, command: str, argument: Any) -> ChunkOutcome | None:
    if command == "reset":
        worlds.start_episodes(*argument)
    elif command == "continue":
        worlds.continue_episodes(*argument)
    elif command == "restore":
        # After a restart: the environments stand where their lost episodes began, but those are over.
        drawing, worlds.render_images = worlds.render_images, False  # the last frames stay
        worlds.start_episodes(*argument)
        worlds.render_images = drawing
        worlds.over[argument[2]] = True
    elif command == "step":
        return worlds.run_chunk(argument)
    elif command == "render":
        worlds.render_images = argument
    return None


def _serve(
    pipe: Connection,
    make: Callable[..., Any],
    lo: int,
    hi: int,
    memory: str,
    frames: SharedFrames,
) -> None:
    """The worker's main loop: execute commands until `close` arrives or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    shared = SharedMemory(name=memory)
    try:
        out = frames.arrays(shared, lo, hi)
        try:
            worlds = make(num_worlds=hi - lo, frames_out=out)
        except Exception as error:  # a missing mesh, say: the parent raises it, with the file's name
            pipe.send(("error", error))
            return
        dims = worlds.proprio_dim, worlds.privileged_dim
        names = tuple(worlds.proprio_names)
        pipe.send(("ok", Facts(worlds.action_spec, worlds.cameras, *dims, names, mujoco_version())))
        while True:
            command, argument = pipe.recv()
            if command == "close":
                return
            try:
                pipe.send(("ok", (_answer(worlds, command, argument), _state(worlds, command))))
            except Exception as error:
                pipe.send(("error", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    finally:
        out = worlds = None  # type: ignore[assignment]
        shared.close()
        # Mesa's atexit teardown prints EGL errors; this process has nothing left to flush.
        os._exit(0)
