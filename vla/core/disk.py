"""A full disk in one line that names it, and temporary files that do not outlive the process that wrote them."""

from __future__ import annotations

import errno
import glob
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EFBIG, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else [])}
_SAID = ("no space left", "os error 28", "disk quota exceeded", "os error 122", "file too large", "os error 27")
_LITTLE = 1 << 20
_numbers = itertools.count()


class DiskFull(OSError):
    """One line: which folder lies on the full device, how much is free there, and how much was to be written."""


@contextmanager
def writing(path: str | os.PathLike[str], what: str = "", value: object = None) -> Iterator[None]:
    """While a block writes to `path`, any error a library raises because the device is full becomes `DiskFull`.

    `what` ("this checkpoint") is `value`, which says how much room it needs: nested arrays, or a
    number of bytes.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise full(path, what, value if isinstance(value, int) else nbytes_of(value)) from error


def full(path: str | os.PathLike[str], what: str = "", nbytes: int = 0) -> DiskFull:
    """The error to raise where `path` could not be written."""
    free = free_bytes(path)
    needs = f", {what} needs {size_words(nbytes)}" if what and nbytes else ""
    # Space there is, but not for us: a quota, or a limit on the size of files.
    limit = " (a quota or the limit on the size of a file may be less)" if free > max(nbytes, _LITTLE) else ""
    found = DiskFull(f"no space left on the device holding {os.fspath(path)}: {size_words(free)} free{needs}{limit}")
    found.errno = errno.ENOSPC
    return found


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Room on the device that holds `path`, or will hold it."""
    return shutil.disk_usage(_existing(Path(path))).free


def is_full(error: BaseException) -> bool:
    """Does this error, or one that it came from, stem from a full device?"""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _FULL:
            return True
        if any(words in str(found).lower() for words in _SAID):
            return True
        found = found.__cause__ or found.__context__
    return False


def nbytes_of(value: object) -> int:
    """Bytes of the arrays, tensors and texts in nested mappings and sequences. Tied tensors, which are written once,
    count once."""
    found: dict[object, int] = {}
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part
        else:
            size = len(part) if isinstance(part, bytes | str) else int(getattr(part, "nbytes", 0))
            place = part.data_ptr() if hasattr(part, "data_ptr") else id(part)
            found[place, size] = size
    return sum(found.values())


def temporary(path: str | os.PathLike[str]) -> Path:
    """A new name beside `path`, for what will be renamed to it. What processes that were killed have left under such
    names of the same `path` is removed."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        made = re.fullmatch(r"(\d+)(\.\d+)?", left.name[len(path.name) + 2 : -len(".tmp")])
        if made and not _alive(int(made[1])):
            remove(left)
    return path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}.tmp")


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds, if it is there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def reserve(path: Path) -> None:
    """Give a file that was only made long the room it promises. OSError now, instead of a killed process (SIGBUS) when
    a memory-mapped page finds none."""
    if hasattr(os, "posix_fallocate") and (size := path.stat().st_size):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # asking Windows this way would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def size_words(nbytes: int) -> str:
    """A number of bytes as one reads it, such as 4.1 GB."""
    units: tuple[tuple[int, str], ...] = ((10**9, "GB"), (10**6, "MB"))
    for unit, name in units:
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes / 10**6:.1f} MB" if nbytes >= 10**5 else f"{nbytes / 1000:.0f} kB"
