"""Threads that wait for work sleep, so that a busy machine slows a run down by its share and not by ten times.

An OpenMP thread that has nothing to do spins on its core by default, in case work comes soon. Where another program
wants that core, the thread with the work waits for the one that spins: 800 GELUs over 200,000 numbers on two cores
beside other programs took 19.7 s, and 0.2 s with sleeping threads. OpenMP reads these variables once, when torch loads
it, so they are set when `vla`, `envs`, `policies` or `rl` is imported; processes that are started afterwards inherit
them. A program of your own that imports torch first sets them itself (`OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0`).

In a container with a quota of CPU time torch would start a thread for every core of the whole machine; there
OMP_NUM_THREADS says how many cores the quota is worth.
"""

from __future__ import annotations

import os

WAITING = {
    "OMP_WAIT_POLICY": "PASSIVE",  # any OpenMP
    "GOMP_SPINCOUNT": "0",  # GNU's, which torch brings for Linux
    "KMP_BLOCKTIME": "0",  # Intel's and LLVM's, in milliseconds
}


def sleep_while_waiting() -> None:
    """Set `WAITING` in the environment of this process, unless the user has set any of it: then that alone counts."""
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING)
    if (cores := usable_cores()) < _scheduled_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, round(cores))))


def usable_cores(cgroup: str | os.PathLike[str] = "/sys/fs/cgroup") -> float:
    """Cores that this process may use: those it may be scheduled on, or its container's quota where that is less."""
    cores = float(_scheduled_cores())
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup 2, cgroup 1
        try:
            words = " ".join(_read(os.path.join(cgroup, name)) for name in names).split()
            quota, period = int(words[0]), int(words[1])  # microseconds; "max" and -1 are no quota
        except (OSError, ValueError, IndexError):
            continue
        if quota > 0 and period > 0:
            return min(cores, quota / period)
    return cores


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _scheduled_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
