"""Threads that wait spin for a moment only: set before torch loads by every package, inherited by every process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from bascule.commands.measuring.evaluate import Eval
from bascule.quickstart import job
from bascule.quickstart.config import QuickstartConfig
from vla.core.waiting import CHOSEN_BY_USER, WAITING, usable_cores
from vla.runtime import machine, process

ROOT = Path(__file__).resolve().parents[3]


def run(code, **variables):
    env = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER} | variables
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("package", ["vla", "envs", "policies", "rl", "bascule.main"])
def test_importing_any_package_sets_it(package):
    code = f"import {package}, os, sys; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    assert run(code).stdout == WAITING["GOMP_SPINCOUNT"] + "\n"


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux")
def test_torch_gets_it_though_the_modules_name_torch_first():
    shown = run("import vla.model.policy", OMP_DISPLAY_ENV="VERBOSE").stderr
    assert f"GOMP_SPINCOUNT = '{WAITING['GOMP_SPINCOUNT']}'" in shown


def test_what_the_user_has_set_stands_alone():
    code = "import vla, os; print({n: os.environ.get(n) for n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')})"
    assert run(code, OMP_WAIT_POLICY="ACTIVE").stdout == "{'OMP_WAIT_POLICY': 'ACTIVE', 'GOMP_SPINCOUNT': None}\n"


def test_processes_inherit_it():
    child = "import os; print(os.environ['GOMP_SPINCOUNT'], flush=True)"
    code = f"import vla, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert run(code).stdout == WAITING["GOMP_SPINCOUNT"] + "\n"


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_script_sets_it_for_what_it_runs(tmp_path):
    """With a `vla` in a finished environment that only tells what it was given."""
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (tmp_path / "plugins" / "lerobot_policy_bascule").mkdir(parents=True)
    for name in ("run", "pyproject.toml", "plugins/lerobot_policy_bascule/pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for name, body in {"vla": "echo $OMP_WAIT_POLICY $GOMP_SPINCOUNT $KMP_BLOCKTIME", "python": "exit 0"}.items():
        (venv / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (venv / "bin" / name).chmod(0o755)
    key = subprocess.run(
        "cat pyproject.toml plugins/lerobot_policy_bascule/pyproject.toml | cksum", shell=True, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    (venv / ".bascule-ready").write_text(f"{key} {tmp_path.resolve()}\n\n")

    def told(**variables):
        env = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER} | variables
        done = subprocess.run(["sh", "run", "list"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert told() == f"{WAITING['GOMP_SPINCOUNT']} {WAITING['KMP_BLOCKTIME']}\n"
    assert told(OMP_WAIT_POLICY="ACTIVE") == "ACTIVE\n"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "70000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.7),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota_counts(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    scheduled = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores(tmp_path) == (scheduled if cores is None else cores)


@pytest.mark.parametrize(("usable", "idle"), [(8.0, 1.0), (0.5, 0.5)])
def test_idle_cores_are_those_that_this_process_may_use(monkeypatch, usable, idle):
    monkeypatch.setattr(psutil, "cpu_percent", lambda window_s: 75.0)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine, "usable_cores", lambda: usable)
    assert machine.idle_cores(0.01) == idle


@pytest.mark.parametrize(("idle", "threads"), [(7.6, 4), (2.4, 2), (0.2, 1)])
def test_torch_gets_a_thread_per_idle_core(monkeypatch, idle, threads):
    monkeypatch.setattr(process, "idle_cores", lambda: idle)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with process.restored_threads():
        torch.set_num_threads(4)
        process.use_idle_cores()
        assert torch.get_num_threads() == threads
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        process.use_idle_cores()
        assert torch.get_num_threads() == 3


_FAULTS = """
import resource
import torch
from vla.runtime.process import keep_freed_memory
if KEEP:
    keep_freed_memory()
def work():
    [torch.ones(1 << 20) for _ in range(16)]  # 4 MiB each, all alive at once
for _ in range(3):  # the heap grows to its size
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator that is not glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    # Left alone, glibc raises its threshold by itself in some runs and not in others; set, it stays.
    fixed = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
    kept, returned = (int(run(f"KEEP = {keep}\n{_FAULTS}", **fixed).stdout) for keep in (True, False))
    assert kept < returned / 10 and returned > 5 * 10_000


def test_evaluation_and_the_quickstart_keep_freed_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(process, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Eval("zero", episodes=1, num_envs=1, workers=1).run()
    assert calls == ["kept"]
    with process.restored_threads():
        job._settle(QuickstartConfig(), 1)
    assert calls == ["kept"] * 2
