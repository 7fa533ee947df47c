"""What every subcommand is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any


class Command(ABC):
    """One subcommand: a frozen dataclass whose fields are its arguments. The docstring's first line is its help."""

    @abstractmethod
    def run(self) -> int | None:
        """Do it; the exit code, None for 0. User errors are raised as ValueError or OSError."""

    def writes(self) -> tuple[Path, ...]:
        """The folders and files that it writes: while it runs, no other command may write them."""
        found = (getattr(self, name, None) for name in ("out", "json", "log", "to_dataset"))
        return tuple(Path(path) for path in found if isinstance(path, str | Path))

    def kept(self) -> str:
        """After Ctrl-C: what is left, and how to go on."""
        return "nothing was written"


def given(**values: object) -> dict[str, Any]:
    """Only the values a user gave."""
    return {name: value for name, value in values.items() if value is not None}


def check_numbers(command: Command, **bounds: tuple[float, float]) -> None:
    """ValueError naming the flag and its range for a number outside of it. Flags that were not given (None) are well;
    of a tuple, every number is looked at."""
    for name, (low, high) in bounds.items():
        value = getattr(command, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or low <= number <= high:
                continue
            bound = f"at most {high:,.16g}" if number > high else f"at least {low:g}"
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}, got {number}")


def check_file(flag: str, path: Path | None) -> None:
    """ValueError if `path` is a folder where a file is to be written: said before the work whose result it holds."""
    if path is not None and path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file in it")


def check_place(path: Path) -> None:
    """ValueError unless `path`, a file or a folder that need not exist yet, can be made where it is to be."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is a file, not a folder")
    if not path.exists() and not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: this user may not write in {folder}")
