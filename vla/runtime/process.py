"""Process settings of a long run: idle cores, restored threads, kept memory, and Ctrl-C as a request."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from vla.runtime.machine import idle_cores


class Stop:
    """Set by the first Ctrl-C, SIGTERM or SIGHUP."""

    requested = False


def use_idle_cores() -> None:
    """Give torch one thread per idle core, at most as many as it has and at least one.

    More threads than idle cores take turns with other programs, and each waits for the slowest. Does nothing where
    OMP_NUM_THREADS says how many there are to be.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, round(idle_cores()))))


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next use. glibc gives large blocks back to the system at once and
    gets them again a moment later, page by page: a tenth of a small network's time. Does nothing elsewhere."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, 32 << 20)  # the most it allows
    mallopt(trim_threshold, 1 << 30)
    mallopt(top_pad, 256 << 20)


@contextmanager
def restored_threads() -> Iterator[None]:
    """Torch's thread count afterwards is what it was before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into a request; a second Ctrl-C is the usual KeyboardInterrupt."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
