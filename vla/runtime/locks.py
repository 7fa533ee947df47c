"""One run at a time writes to a folder or file: a second one is refused in one line that names the first.

The lock is the kernel's (`flock`) on a file `.NAME.lock` beside what is written, so it ends with the process however
that ends, also by a kill. The file itself is removed when the run ends in good order; one that a kill left behind means
nothing and is taken over.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vla.core.disk import is_full

try:
    import fcntl
except ImportError:  # Windows has no flock: there nothing is locked
    fcntl = None  # type: ignore[assignment]

_held: dict[Path, int] = {}
"""Paths that this process has locked, with the thread that holds each: a command and the functions it calls may both
lock the same path."""
_guard = threading.Lock()


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep every other process from writing to `path`, a folder or a file that need not exist yet.

    ValueError, naming the process that holds it, when another one does. The same thread may lock a path again. Of the
    processes that a launcher such as torchrun started for one run, the first locks for all.
    """
    target, thread = Path(path).resolve(), threading.get_ident()
    with _guard:
        holder = _held.get(target)
        if holder not in (None, thread):
            raise ValueError(_refusal(path, "another thread of this process"))
        again = holder is not None
        if not again:
            _held[target] = thread
    try:
        if again or fcntl is None or os.environ.get("RANK", "0") != "0" or _is_device(target):
            yield
            return
        made = _missing_parents(target)
        handle, file = _acquire(target, path)
        try:
            yield
        finally:
            # Removed while it is still locked: who opens the old file meanwhile sees below that it is gone.
            file.unlink(missing_ok=True)
            os.close(handle)
            with suppress(OSError):  # of a run that wrote nothing
                for folder in made:
                    folder.rmdir()
    finally:
        if not again:
            with _guard:
                del _held[target]


_RUNS = {"config.json": "a policy", "last/config.json": "a run of `vla rl`", "quickstart.json": "a quickstart"}
"""A file in a run's folder, and the kind of run that leaves it."""


def refuse_used(marker: Path, out: str | os.PathLike[str], what: str, *, resume: bool | None) -> bool:
    """True if the run in `out` is to be continued: it left `marker`, and that was asked for.

    The rule of every command with --resume: it continues the run in OUT if there is one and begins it otherwise, so
    that a script may always pass it. Without it, ValueError for a folder that holds a run; and either way for one that
    holds a dataset. `resume` is None where a run cannot be continued.
    """
    refuse_inside_dataset(out)
    used = marker.exists()
    if used and not resume:
        mend = "" if resume is None else "resume it (--resume), or "
        raise ValueError(f"{os.fspath(out)} already holds {what}: {mend}choose another folder (--out)")
    if not used:
        refuse_foreign(out)
        for name, other in _RUNS.items() if marker in [Path(out) / run for run in _RUNS] else ():
            if (Path(out) / name).exists():  # both would write metrics.jsonl
                raise ValueError(f"{os.fspath(out)} already holds {other}: choose another folder (--out)")
    return used


def refuse_foreign(out: str | os.PathLike[str]) -> None:
    """ValueError where results would be mixed with a dataset, or need a folder where a file is."""
    refuse_inside_dataset(out)
    place = Path(out)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{os.fspath(out)} is a file, not a folder: choose another --out")
    if any((place / name).exists() for name in ("meta/info.json", "recording/request.json")):
        raise ValueError(f"{os.fspath(out)} is a dataset of demonstrations: choose another folder (--out)")


def refuse_inside_dataset(path: str | os.PathLike[str]) -> None:
    """ValueError for a file or folder among a dataset's own: a policy's stats.json would replace the recording's."""
    place = Path(path).resolve()
    for root in place.parents:
        part = place.relative_to(root).parts[0]
        if part in ("data", "images", "meta", "videos") and (root / "meta/info.json").is_file():
            raise ValueError(f"{os.fspath(path)} is a part of the dataset {root}: write it to another place")


def command_line() -> str:
    """This process's command as a user would type it."""
    program, *rest = sys.argv or [""]
    name = "vla" if Path(program).name in ("vla", "cli.py") else Path(program).name
    return shlex.join([name, *rest])


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_dir() and not path.is_file()


def _missing_parents(path: Path) -> list[Path]:
    """The folders above `path` that are not there, innermost first."""
    return [folder for folder in path.parents if not folder.exists()]


def _acquire(target: Path, shown: str | os.PathLike[str]) -> tuple[int, Path]:
    """The locked file's handle, and its path."""
    while True:
        handle, file = _open(target, shown)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise ValueError(_refusal(shown, holder)) from None
        except OSError:  # a file system without locks: nobody can be kept out
            return handle, file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                os.ftruncate(handle, 0)
                entry = {"pid": os.getpid(), "host": socket.gethostname(), "command": command_line()}
                with suppress(OSError):  # a full disk: the lock holds without its words
                    os.write(handle, json.dumps(entry).encode())
                return handle, file
        os.close(handle)  # its last holder has just removed it


def _open(target: Path, shown: str | os.PathLike[str]) -> tuple[int, Path]:
    flags = os.O_RDWR | os.O_CREAT
    file = target.with_name(f".{target.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, flags, 0o666), file
    except PermissionError:
        if not target.is_dir():
            raise
        file = target / ".lock"  # a mounted folder, say, in a parent that is not ours
        return os.open(file, flags, 0o666), file
    except OSError as problem:
        if is_full(problem):
            raise
        # The user named the target, not the lock beside it.
        raise ValueError(f"{os.fspath(shown)} cannot be written: {problem.strerror} in {file.parent}") from problem


def _holder(handle: int) -> str:
    try:
        entry = json.loads(os.pread(handle, 1 << 16, 0))
        where = "" if entry["host"] == socket.gethostname() else f" on {entry['host']}"
        words = entry["command"]
        return f"process {entry['pid']}{where}: {words[:200]}{'...' if len(words) > 200 else ''}"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        return "another process"


def _refusal(path: str | os.PathLike[str], holder: str) -> str:
    return f"{os.fspath(path)} is being written by another run ({holder}): wait for it to end, or choose another --out"
