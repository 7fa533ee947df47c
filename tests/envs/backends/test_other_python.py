"""Workers in another Python environment: the same worlds, errors that arrive, deaths that are noticed.

The other environment here is the one that runs the tests; LIBERO's own is in `tests/envs/adapters/test_libero_env.py`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs import make_vec
from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.backends.cpu_worlds import TabletopWorlds
from envs.backends.other_python import pool_in
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions

SUITE = load_suite("tabletop-pick")
RENDER = RenderOptions(32)


@pytest.fixture(scope="module")
def there() -> Any:
    env = MujocoVecEnv(SUITE, TabletopWorlds, 2, num_workers=1, render=RENDER, python=Path(sys.executable))
    yield env
    env.close()


def test_another_interpreter_plays_the_same_episodes(there: MujocoVecEnv) -> None:
    here = make_vec("tabletop-pick", 2, num_workers=1, image_size=32)
    chunk = np.full((2, 4, there.action_spec.dim), 0.3, np.float32)
    for env in (here, there):
        env.reset(seeds=[5, 6])
    ours, theirs = here.step_chunk(chunk).obs, there.step_chunk(chunk).obs
    np.testing.assert_array_equal(ours.proprio, theirs.proprio)
    np.testing.assert_array_equal(ours.images["front"], theirs.images["front"])
    assert ours.instruction == theirs.instruction and here.mujoco_version == there.mujoco_version  # type: ignore[attr-defined]
    here.close()


def test_its_end_leaves_the_shared_memory_alone_and_another_takes_its_place(there: MujocoVecEnv) -> None:
    there.reset(seeds=[5, 6])
    chunk, before = np.zeros((2, 1, there.action_spec.dim), np.float32), there.worker_pids[0]
    os.kill(before, signal.SIGKILL)
    result = there.step_chunk(chunk)
    assert result.worker_restarted.all() and there.worker_pids[0] != before
    assert there.reset(seeds=[5, 6]).images["front"].any()
    assert not there.step_chunk(chunk).worker_restarted.any()


def test_an_error_arrives(there: MujocoVecEnv) -> None:
    with pytest.raises(ValueError, match="no task .fly."):
        there.reset(seeds=[5, 6], tasks=["fly", "fly"])


def test_an_environment_that_lacks_a_package_says_which(tmp_path: Path) -> None:
    bare = tmp_path / "python"  # the interpreter without the packages of its environment
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises((ValueError, RuntimeError), match="lacks (numpy|mujoco)|died .exit code 1."):
        MujocoVecEnv(SUITE, TabletopWorlds, 1, num_workers=1, render=RENDER, python=bare)


def test_jobs_are_done_by_its_processes() -> None:
    with pool_in(Path(sys.executable), 2) as workers:
        asked = [workers.submit(load_suite, name) for name in ("tabletop-pick", "tabletop-ten", "libero-goal")]
        assert [job.result().name for job in asked] == ["tabletop-pick", "tabletop-ten", "libero-goal"]
        with pytest.raises(ValueError, match="did you mean .*tabletop-pick"):
            workers.submit(load_suite, "tabletop-pik").result()
        pids = {workers.submit(eval, "__import__('os').getpid()").result() for _ in range(4)}
        assert os.getpid() not in pids and 1 <= len(pids) <= 2
        with pytest.raises(ChildProcessError, match="a worker process died"):
            workers.submit(eval, "__import__('os')._exit(9)").result()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
