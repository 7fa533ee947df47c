"""One run at a time writes to a folder: two commands at once, nested calls, threads, kills, and what is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from bascule import main as cli
from vla.runtime.locks import locked, refuse_used

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys
from vla.runtime.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(path, **environment):
    """Another process writes to `path`."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, env={**os.environ, **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "held\n"
        yield other
    finally:
        other.communicate(timeout=20)


def test_a_second_process_is_refused_in_one_line_that_names_the_first(tmp_path):
    out = tmp_path / "runs" / "x"
    with held_elsewhere(out) as other:
        with pytest.raises(ValueError, match=rf"x is being written by another run \(process {other.pid}: .*--out") as e:
            with locked(out):
                pass
        assert "\n" not in str(e.value)
        with locked(tmp_path / "runs" / "y"):
            pass
    with locked(out):  # it has ended
        pass
    assert list(tmp_path.iterdir()) == []  # nothing is left behind where nothing was written


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    with held_elsewhere(tmp_path / "x") as other:
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=20)
    assert (tmp_path / ".x.lock").exists()
    with locked(tmp_path / "x"):
        assert json.loads((tmp_path / ".x.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_other_ranks_of_one_run_are_let_in(tmp_path, monkeypatch):
    with held_elsewhere(tmp_path / "x", RANK="0", WORLD_SIZE="2"):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path / "x"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ValueError, match="another run"), locked(tmp_path / "x"):
            pass


def test_a_command_and_what_it_calls_lock_together_but_two_threads_do_not(tmp_path):
    refused = []

    def other():
        try:
            with locked(tmp_path / "x"):
                pass
        except ValueError as error:
            refused.append(str(error))

    with locked(tmp_path / "x"):
        with locked(tmp_path / "x"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with pytest.raises(OSError, match="temporarily unavailable"):  # still held after the inner one ended
            import fcntl

            with (tmp_path / ".x.lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(refused) == 1 and "another thread" in refused[0]


@pytest.mark.parametrize(
    "args",
    [
        ("quickstart", "--out", "x"),
        ("demos", "tabletop-pick", "--out", "x"),
        ("train", "--dataset", "d", "--out", "x"),
        ("rl", "tabletop-pick", "--init", "p", "--out", "x"),
        ("pretrain", "--out", "x"),
        ("ground-data", "--out", "x"),
        ("convert", "p", "--backbone", "tiny", "--out", "x"),
        ("export", "p", "--out", "x"),
        ("lerobot", "p", "x"),
        ("view", "tabletop-pick", "--out", "x"),
        ("experiment", "ablation", "--out", "x"),
        ("eval", "expert", "--json", "x"),
        ("bench", "model", "--json", "x"),
        ("control", "p", "--log", "x"),
        ("control", "p", "--to-dataset", "x"),
    ],
    ids=" ".join,
)
def test_every_command_that_writes_is_alone(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vla.runtime.locks.fcntl.flock", busy)
    assert cli.main(list(args)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "x is being written by another run" in error, error


def busy(*_):
    raise BlockingIOError


def test_what_a_command_writes_is_paths_only():
    from bascule.commands.doctor import Doctor
    from bascule.commands.measuring.experiment import command_of

    assert Doctor(json=True).writes() == ()
    assert command_of("ablation")(json=Path("x")).writes() == (Path("runs/experiment"), Path("x"))
    assert cli.COMMANDS["demos"]("tabletop-pick").writes() == (Path("runs/demos/tabletop-pick"),)


def test_resume_is_one_rule(tmp_path):
    marker = tmp_path / "config.json"
    assert refuse_used(marker, tmp_path, "a run", resume=True) is False  # it begins
    assert refuse_used(marker, tmp_path, "a run", resume=False) is False
    marker.touch()
    assert refuse_used(marker, tmp_path, "a run", resume=True) is True
    with pytest.raises(ValueError, match="already holds a run: .*--resume.*--out"):
        refuse_used(marker, tmp_path, "a run", resume=False)


def test_results_are_not_mixed_with_a_dataset_and_need_a_folder(tmp_path, capsys):
    (tmp_path / "data" / "meta").mkdir(parents=True)
    (tmp_path / "data" / "meta" / "info.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for name, words in (("data", "is a dataset of demonstrations"), ("file", "is a file, not a folder")):
        code = cli.main(["train", "--dataset", str(tmp_path / "data"), "--out", str(tmp_path / name), "--steps", "1"])
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2 and words in line and "--out" in line
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["meta"]


@pytest.mark.parametrize(
    ("command", "flag", "place"),
    [
        (["train", "--dataset", "."], "--out", "meta"),  # a policy has a stats.json too
        (["train", "--dataset", ".", "--resume"], "--out", "data/policy"),
        (["eval", "zero", "--episodes", "1"], "--json", "meta/info.json"),
        (["control", "policy"], "--log", "videos/front/run.jsonl"),
    ],
)
def test_nothing_is_written_among_a_dataset_s_own_files(tmp_path, capsys, monkeypatch, command, flag, place):
    """A policy written into meta/ would replace the recording's statistics without a word."""
    (tmp_path / "meta").mkdir()
    for name in ("info.json", "stats.json"):
        (tmp_path / "meta" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, flag, place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"vla: error: {place} is a part of the dataset {tmp_path}: write it to another place"
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "meta", "meta/info.json", "meta/stats.json",
    ]  # fmt: skip


def test_a_folder_beside_a_dataset_s_own_is_free(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    assert refuse_used(tmp_path / "policy" / "config.json", tmp_path / "policy", "a run", resume=None) is False


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder in which nobody may make files")
def test_a_place_without_room_for_the_lock_is_named_as_it_was_given():
    with pytest.raises(ValueError, match=r"^/proc/x\.jsonl cannot be written: .* in /proc$"), locked("/proc/x.jsonl"):
        pass


def test_a_folder_in_a_parent_that_is_not_ours_is_locked_inside(tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    really = os.open

    def forbidden(path, *args):
        if Path(path).name == ".mounted.lock":
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *args)

    monkeypatch.setattr("vla.runtime.locks.os.open", forbidden)
    with locked(tmp_path / "mounted"):
        assert (tmp_path / "mounted" / ".lock").exists()
    assert list((tmp_path / "mounted").iterdir()) == []
    with locked("/dev/null"):  # a device is nobody's
        pass


@pytest.mark.parametrize(
    ("args", "marker", "words"),
    [
        (("train", "--dataset", "d"), "config.json", "already holds a checkpoint: resume it (--resume)"),
        (("rl", "tabletop-pick", "--init", "p"), "last/config.json", "already holds a run: resume it (--resume)"),
        (("quickstart",), "quickstart.json", "already holds a quickstart: resume it (--resume)"),
        (("pretrain",), "bascule.json", "already holds a backbone: resume it (--resume), or choose another folder"),
        (
            ("convert", ".", "--backbone", "tiny"),
            "config.json",
            "already holds a policy: choose another folder (--out)",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_an_earlier_run_left_is_never_overwritten(args, marker, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint", "trained"):
        monkeypatch.setattr(f"bascule.catalogue.{name}", lambda name, *_: Path(name), raising=False)
    (tmp_path / "x" / marker).parent.mkdir(parents=True)
    (tmp_path / "x" / marker).write_text("{}")
    assert cli.main([*args, "--out", "x"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error, error
    assert [path.name for path in (tmp_path / "x").rglob("*") if path.is_file()] == [Path(marker).name]
