"""A full disk: one line, what was there stays whole, nothing half written is left. A killed save: swept by the next."""

import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from vla.core.checkpoint import load_checkpoint, save_checkpoint, save_files, save_tensors
from vla.core.config import save_json, write_atomic
from vla.core.disk import DiskFull, reserve, temporary, writing
from vla.model.stored import tokenizer_files
from vla.runtime import console
from vla.runtime.run_log import Metrics

ROOT = Path(__file__).resolve().parents[3]
MB = 10**6


@pytest.fixture(params=["tmpfs", "limit"])
def little(request, tmp_path):
    """(a folder, a context in which at most 1 MB more can be written to one of its files)."""

    @contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MB, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @contextmanager
    def filled():
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        (tmp_path / "filler").write_bytes(bytes(max(0, free - MB)))
        yield

    if request.param == "limit":
        yield tmp_path, limited
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk")
    try:
        yield tmp_path, filled
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name not in ("filler", "trainer"))


def save(folder, version, megabytes=0.1, trainer=0.1):
    def tensor(size):
        return torch.full((int(size * MB / 4),), float(version))

    weights, state = {"w": tensor(megabytes)}, {"m": tensor(trainer)}
    save_checkpoint(folder, config={"version": version}, tensors=weights, stats={}, trainer_state=state)


@pytest.mark.parametrize("sizes", [{"megabytes": 3}, {"trainer": 3}], ids=["weights", "trainer"])
def test_the_previous_checkpoint_stays_whole(little, sizes):
    folder, full = little
    save(folder / "run", 1)
    before = files(folder)
    with full(), pytest.raises(DiskFull, match=r"^no space left .* holding .*run: .* free, .* needs 3\.1 MB") as caught:
        save(folder / "run", 2, **sizes)
    assert "\n" not in str(caught.value)
    assert load_checkpoint(folder / "run").config["version"] == 1 and files(folder) == before
    (folder / "filler").unlink(missing_ok=True)
    save(folder / "run", 3, **sizes)
    assert load_checkpoint(folder / "run").config["version"] == 3


def test_whatever_else_is_written(little):
    """Figures, reports, single tensors, exports: the same line, and nothing half written."""
    folder, full = little
    save_json(folder / "report.json", {"whole": True})
    before = files(folder)
    with full():
        for write in (
            lambda: write_atomic(folder / "report.json", bytes(3 * MB)),
            lambda: save_tensors(folder / "one.safetensors", {"w": torch.zeros(MB)}, {}),
            lambda: save_files(folder, config={}, stats={}, files={"model.onnx": bytes(3 * MB)}),
        ):
            with pytest.raises(DiskFull, match="no space left on the device holding"):
                write()
    assert files(folder) == before


def test_the_log_of_figures(little):
    folder, full = little
    with full(), Metrics(folder) as metrics, pytest.raises(DiskFull, match=r"holding .*metrics\.jsonl"):
        for step in range(300):
            metrics.log(step, {"x" * 10_000: 1.0})


def test_memory_mapped_arrays_fail_before_a_page_does(little):
    folder, full = little
    with full():
        np.lib.format.open_memmap(folder / "sparse.npy", "w+", np.uint8, (MB // 2,)).flush()
        reserve(folder / "sparse.npy")
        with pytest.raises(OSError):
            np.lib.format.open_memmap(folder / "large.npy", "w+", np.uint8, (3 * MB,)).flush()
            reserve(folder / "large.npy")


def test_the_command_says_it_in_one_line(capsys):
    def other():
        raise OSError(28, "No space left on device", "/dev/full")

    assert console.run_guarded(other, kept=str) == 2
    assert capsys.readouterr().err.startswith("vla: error: no space left on the device holding /dev/full: ")


def test_only_a_full_disk_is_called_that(tmp_path):
    with pytest.raises(RuntimeError, match="another"), writing(tmp_path):
        raise RuntimeError("another reason")


def test_files_are_as_readable_as_any_other(tmp_path):
    before = os.umask(0o022)
    try:
        save(tmp_path, 1)
        save_tensors(tmp_path / "one.safetensors", {"w": torch.zeros(3)}, {})
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    finally:
        os.umask(before)
    assert set(modes.values()) == {0o644}, modes


def test_what_a_killed_save_left_is_swept_by_the_next(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; sys.path.insert(0, sys.argv[2]); "
        "from vla.core.checkpoint import save_checkpoint\n"
        "while True: save_checkpoint(sys.argv[1], config={}, tensors={'w': torch.zeros(4_000_000)}, stats={})"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(ROOT)])
    until = time.monotonic() + 120
    while not any(path.is_dir() for path in tmp_path.glob(".model.safetensors*.tmp")):
        assert time.monotonic() < until and killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / ".tmpAbC123").write_bytes(b"of a version that let safetensors choose the name")
    assert list(tmp_path.glob(".*"))
    save(tmp_path, 5)
    assert [name for name in files(tmp_path) if "tmp" in name or "next" in name] == []


def test_only_what_dead_processes_left_is_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {f".a.json.{dead.pid}.7.tmp", f".a.json.{dead.pid}.tmp", f".a.json.{os.getpid()}.0.tmp", ".a.json.mine.tmp"}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / f".b.json.{dead.pid}.7.tmp").mkdir()
    temporary(tmp_path / "a.json")
    assert set(os.listdir(tmp_path)) == {n for n in names if str(dead.pid) not in n} | {f".b.json.{dead.pid}.7.tmp"}


def test_a_full_folder_for_temporary_files_is_named(tmp_path, monkeypatch):
    """A tokenizer is copied through one, and its library raises no OSError."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Tokenizer:
        def save_pretrained(self, folder):
            raise Exception("File too large (os error 27)")

    with pytest.raises(DiskFull, match=f"no space left on the device holding {tmp_path}"):
        tokenizer_files(Tokenizer())
