"""Threads that wait for work go to sleep soon, so that a busy machine slows a run down by its share, not by ten times.

An OpenMP thread that has nothing to do spins on its core for a while, in case work comes soon. Where another program
wants that core, the thread with the work waits for the one that spins: with GNU's default (300,000 turns, some ten
milliseconds) 800 GELUs over 200,000 numbers on two cores beside other programs took 19.7 s, and 0.2 s with threads
that sleep at once. But to wake a thread costs time too, on a virtual machine a multiple of the work between two waits:
sleeping at once made training 2 to 3 times slower there, and single decisions 3 to 4 times. So they spin for 10,000
turns, less than half a millisecond: no slower than GNU's default on an idle machine, and on a busy one close to
sleeping at once (`python -m bascule.bench.busy_machine` measures all three).

OpenMP reads these variables once, when torch loads it, so they are set when `vla`, `envs`, `policies` or `rl` is
imported; processes that are started afterwards inherit them. A program of your own that imports torch first sets them
itself (`GOMP_SPINCOUNT=10000`).

In a container with a quota of CPU time torch would start a thread for every core of the whole machine; there
OMP_NUM_THREADS says how many cores the quota is worth.
"""

from __future__ import annotations

import os

WAITING = {
    "GOMP_SPINCOUNT": "10000",  # turns; GNU's OpenMP, which torch brings for Linux
    "KMP_BLOCKTIME": "1",  # milliseconds; Intel's and LLVM's
}
CHOSEN_BY_USER = (*WAITING, "OMP_WAIT_POLICY")  # any one of these, once set, says how threads wait


def limit_spinning() -> None:
    """Set `WAITING` in the environment of this process, unless the user has chosen: then that alone counts."""
    if not any(name in os.environ for name in CHOSEN_BY_USER):
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
