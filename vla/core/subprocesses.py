"""Spawned (not forked) processes that do not run the caller's `__main__` a second time."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

DIED = "a worker process died (killed, perhaps for want of memory: fewer --workers need less); nothing is kept"
"""Message of the ChildProcessError of a pool whose process has died."""


def spawn(target: Callable[..., None], args: tuple[Any, ...], *, name: str | None = None) -> Any:
    """A started daemon process that runs `target(*args)`, both pickled.

    multiprocessing has a spawned process import the caller's script first, which therefore must not begin anything
    itself unless guarded (its documentation, "Safe importing of main module"). Here this is done only where something
    in `args` was defined in that script.
    """
    process = mp.get_context("spawn").Process(target=target, args=args, daemon=True, name=name)
    if b"__main__" in pickle.dumps((target, [arg for arg in args if not isinstance(arg, Connection)])):
        process.start()
    else:
        with _no_script():
            process.start()
    return process


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes to give jobs to, which end with the block, at once if it ends by an error. ChildProcessError
    where one of them dies: multiprocessing's own pool would wait for its job for ever."""
    executor = ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn"))
    try:
        yield executor
    except BrokenProcessPool:
        raise ChildProcessError(DIED) from None
    except BaseException:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _no_script() -> Iterator[None]:
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
