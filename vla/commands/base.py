"""What every subcommand is."""

from __future__ import annotations

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


def load_policy(folder: Path) -> Any:
    """The policy in a checkpoint folder, or in one that `vla export` wrote."""
    from policies.load import load_policy

    return load_policy(folder)
