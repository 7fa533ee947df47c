"""A worker process that runs in another Python environment: a simulator whose packages do not go with ours.

That environment has numpy and its own MuJoCo, and finds our packages behind its own: it must be Python 3.12 or later
and needs nothing else of ours. What is sent is what a spawned worker is sent, by the same pipe.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vla.core.paths import ROOT
from vla.core.subprocesses import DIED

_ENTRY = "import sys; sys.path.append(sys.argv[1]); from envs.backends.other_python import main; main(int(sys.argv[2]))"
_OURS = ("builtins", "vla", "envs", "numpy")
"""Packages that both sides have: errors of these may cross the pipe."""
_END_S = 10.0
"""Longest wait for the end of a process that was killed."""


class OtherProcess:
    """The methods of `multiprocessing.Process` that a worker's parent uses, of a program."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self.pid = process, process.pid

    @property
    def exitcode(self) -> int | None:
        """Exit code; the negated signal where it was killed; None while it runs."""
        return self._process.poll()

    def is_alive(self) -> bool:
        """True while it runs."""
        return self._process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or the time is over."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()


def spawn_in(python: Path, target: Callable[..., None], pipe: Connection, args: tuple[Any, ...]) -> OtherProcess:
    """A process of the interpreter `python` that runs `target(pipe, *args)`, both pickled. It prints nothing on stdout:
    simulators greet."""
    command = [str(python), "-I", "-c", _ENTRY, str(ROOT), str(pipe.fileno())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(pipe.fileno(),), bufsize=0
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as stdin:  # it has died: `Worker.receive` finds that out
        stdin.write(pickle.dumps((target, args)))
    return OtherProcess(process)


def main(fd: int) -> None:
    """The process's beginning: read the target from stdin and run it with the pipe `fd`."""
    # The shared memory is the parent's: a tracker of this process would remove it when this process ends.
    resource_tracker.register = lambda name, rtype: None  # type: ignore[assignment]
    pipe = Connection(fd)
    try:
        target, args = pickle.load(sys.stdin.buffer)
    except ImportError as error:
        pipe.send(("error", ValueError(f"the environment of {sys.executable} lacks {error.name}: install it again")))
        return
    target(_Shared(pipe), *args)


@contextmanager
def pool_in(python: Path, workers: int) -> Iterator[Executor]:
    """Processes of the interpreter `python` to give jobs to, as `vla.core.subprocesses.pool` has them: functions of one
    argument. They end with the block."""
    kept, running = threading.local(), []

    def start() -> None:
        ours, theirs = Pipe()
        running.append((spawn_in(python, _do_jobs, theirs, ()), ours))
        theirs.close()
        kept.pipe = ours

    def run(job: Callable[[Any], Any], argument: Any) -> Any:
        try:
            kept.pipe.send((job, argument))
            status, value = kept.pipe.recv()
        except (EOFError, OSError):
            raise ChildProcessError(DIED) from None
        if status == "error":
            raise value
        return value

    class Jobs(ThreadPoolExecutor):
        """One thread for each process, which waits for it."""

        def submit(self, fn: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
            """Give a job to the next process that is free."""
            return super().submit(run, fn, *args)

    executor = Jobs(workers, initializer=start)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process, pipe in running:
            process.kill()
            process.join(_END_S)  # or it stays as a zombie
            pipe.close()


def _do_jobs(pipe: Connection) -> None:
    """Do the jobs that arrive until no more can."""
    with suppress(EOFError, OSError):
        while True:
            job, argument = pipe.recv()
            try:
                answer = ("ok", job(argument))
            except Exception as error:
                answer = ("error", error)
            pipe.send(answer)


class _Shared:
    """A pipe to a process that lacks some of our packages: their errors are told in words."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self.recv = pipe, pipe.recv

    def send(self, message: tuple[str, Any]) -> None:
        """Send (status, value)."""
        status, value = message
        if status == "error" and type(value).__module__.partition(".")[0] not in _OURS:
            value = RuntimeError(f"{type(value).__name__}: {value}")
        self._pipe.send((status, value))
