"""Systems other than Linux with a GPU of NVIDIA's: no /proc, no affinity, no float64 on Apple's GPUs, no EGL."""

import ast
import os
import sys
from pathlib import Path

import pytest
import torch

from bascule.commands import doctor
from rl.models.running_norm import RunningNorm
from rl.models.tokens import TokenChunk
from vla.core import waiting
from vla.runtime import devices, machine, rendering_backend

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("vla", "envs", "policies", "rl", "bascule")
LINUX_ALONE = {
    "os": {
        "sched_getaffinity", "sched_setaffinity", "memfd_create", "eventfd", "posix_fadvise", "posix_fallocate",
        "pidfd_open", "splice", "setns", "unshare", "O_TMPFILE", "O_DIRECT", "copy_file_range", "setresuid",
    },
    "signal": {"SIGRTMIN", "SIGRTMAX", "sigtimedwait", "sigwaitinfo", "SIGPWR", "SIGSTKFLT", "SIGPOLL"},
    "select": {"epoll"},
    "socket": {"AF_NETLINK", "AF_PACKET", "SO_BINDTODEVICE", "TCP_USER_TIMEOUT", "TCP_QUICKACK"},
    "time": {"CLOCK_BOOTTIME", "CLOCK_TAI"},
    "fcntl": {"F_SETPIPE_SZ", "F_ADD_SEALS", "F_OFD_SETLK"},
    "resource": {"prlimit", "RLIMIT_RTPRIO", "RUSAGE_THREAD"},
}  # fmt: skip


def linux_alone(source: str) -> list[str]:
    """Names of Linux alone that are used outside of code which has asked for them with hasattr."""
    tree = ast.parse(source)
    asked = {
        node.args[1].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "hasattr"
        and isinstance(node.args[1], ast.Constant)
    }
    return [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.attr in LINUX_ALONE.get(node.value.id, ())
        and node.attr not in asked
    ]


def test_no_call_that_linux_alone_knows():
    assert linux_alone("import os\nos.sched_getaffinity(0)") == ["os.sched_getaffinity"]  # the test itself can fail
    assert linux_alone("import os\nif hasattr(os, 'eventfd'):\n    os.eventfd(0)") == []
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 300
    assert {str(file): names for file in files if (names := linux_alone(file.read_text()))} == {}


def test_cores_and_processor_without_proc_and_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(waiting, "_read", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    monkeypatch.setattr(machine.Path, "is_file", lambda self: False)
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    assert waiting.usable_cores() == 6
    assert machine.machine().startswith("arm, 6 cores, ")


def test_a_mac_draws_with_its_own_library(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    rendering_backend.check()
    assert rendering_backend.name() == "" and "MUJOCO_GL" not in os.environ


def test_an_apple_gpu_is_used_when_asked_for_and_told_by_doctor(monkeypatch):
    with pytest.raises(ValueError, match="Apple's machines; --device cpu runs without one"):
        devices.check_device("mps")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="torch sees no Apple GPU"):
        devices.choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.choose_device("mps") == "mps" and devices.choose_device("auto") == "cpu"
    assert "--device mps" in doctor.gpu().found


def test_statistics_and_draws_where_the_device_has_no_float64(monkeypatch):
    """The device "meta" in the place of "mps": it computes shapes and devices alone."""
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", ("meta",))
    norm = RunningNorm(3)
    norm.update(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]))
    before = norm(torch.ones(2, 3))
    norm.to("meta")
    assert norm.mean.device.type == "cpu" and norm.mean.dtype == torch.float64
    assert norm(torch.ones(2, 3, device="meta")).dtype == torch.float32
    assert torch.equal(norm(torch.ones(2, 3)), before)
    assert torch.equal(devices.in_float64(torch.ones(2)), torch.ones(2, dtype=torch.float64))
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", ("mps",))
    assert RunningNorm(3).to("meta").mean.device.type == "meta"  # every other device holds them itself
    sample = TokenChunk(torch.zeros(1, 2, 3, 5)).sample(torch.Generator().manual_seed(0))
    assert sample.shape == (1, 2, 3) and sample.device.type == "cpu"
