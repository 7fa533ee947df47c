"""Workers that are given jobs: what they answer, and what is said when one dies."""

import os
import signal
from operator import mul

import pytest

from vla.core.subprocesses import pool


def test_jobs_are_done_and_a_worker_that_dies_is_told():
    with pool(1) as workers:
        assert list(workers.map(mul, [1, 2], [3, 4])) == [3, 8]
    with (
        pytest.raises(ChildProcessError, match="worker process died .* fewer --workers"),
        pool(1) as workers,
    ):
        workers.submit(os.kill, workers.submit(os.getpid).result(), signal.SIGKILL).result()
    with pytest.raises(ValueError, match="mine"), pool(1):
        raise ValueError("mine")
