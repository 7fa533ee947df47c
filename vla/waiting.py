"""Threads that wait for work sleep, so that a busy machine slows a run down by its share and not by ten times.

An OpenMP thread that has nothing to do spins on its core by default, in case work comes soon. Where another program
wants that core, the thread with the work waits for the one that spins: 800 GELUs over 200,000 numbers on two cores
beside other programs took 19.7 s, and 0.2 s with sleeping threads. OpenMP reads these variables once, when torch loads
it, so they are set when `vla`, `envs`, `policies` or `rl` is imported; processes that are started afterwards inherit
them. A program of your own that imports torch first sets them itself (`OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0`).
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
