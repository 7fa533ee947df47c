"""The base class of all subcommands, and checks of their arguments."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation


class Command(ABC):
    """One subcommand: a frozen dataclass whose fields are its arguments. The docstring's first line is its help."""

    @classmethod
    def variant(cls, args: list[str]) -> tuple[type[Command], list[str]]:
        """The command that these arguments are for, and those that are left for it: this one and all, unless its
        first argument chooses among several. ValueError for one that names none."""
        return cls, args

    @abstractmethod
    def run(self) -> int | None:
        """Run the command. Returns the exit code, None for 0. User errors are raised as ValueError or OSError."""

    def writes(self) -> tuple[Path, ...]:
        """The folders and files that it writes; they are locked against other commands while it runs."""
        found = (getattr(self, name, None) for name in ("out", "json", "log", "to_dataset"))
        return tuple(Path(path) for path in found if isinstance(path, str | Path))

    def kept(self) -> str:
        """The message after Ctrl-C: what was kept, and how to continue."""
        return "nothing was written"


def stays(place: Path, message: str) -> str:
    """`message`, of what was kept at `place`, if there is anything."""
    there = any(place.iterdir()) if place.is_dir() else place.exists()
    return message if there else "nothing is kept, it had only begun"


def given(**values: object) -> dict[str, Any]:
    """The values that are not None, which are those the user gave."""
    return {name: value for name, value in values.items() if value is not None}


def from_flags[Config](make: type[Config], command: Command, **others: Any) -> Config:
    """A configuration of the class `make`: its fields are the command's flags of the same name, and `others`. A field
    that is neither keeps its default."""
    flags = {field.name: getattr(command, field.name) for field in fields(make) if field.name in vars(command)}
    return make(**flags | others)


def check_numbers(command: object, **bounds: tuple[float, float]) -> None:
    """Raise ValueError naming the flag and its range for a number outside of it. None (not given) passes; every number
    of a tuple is checked. `command`: it, or a configuration whose fields are flags."""
    for name, (low, high) in bounds.items():
        value = getattr(command, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or low <= number <= high:
                continue
            bound = f"at most {high:,}" if number > high else f"at least {low:g}"
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}, got {number}")


def chosen_perturbation(perturb: tuple[str, ...], randomise: tuple[str, ...] = ()) -> Perturbation | None:
    """The perturbation that --perturb or --randomise asks for; None for neither. ValueError for both."""
    if perturb and randomise:
        raise ValueError("--perturb shows the tests' looks and --randomise training's: give one of them")
    if not (perturb or randomise):
        return None
    from envs.perturb.perturbation import parse, randomisation

    return parse(perturb) if perturb else randomisation(randomise)


def refuse_others(command: Command, option: str, why: str, *taken: str) -> None:
    """ValueError naming a flag that was given beside `option`, where only the fields `taken` have an effect. `why`: a
    clause about the option."""
    others = (flag.name for flag in fields(command) if flag.name not in taken)  # type: ignore[arg-type]
    refuse_idle(command, f"beside {option}, {why}", *others)


def refuse_idle(command: Command, where: str, *names: str) -> None:
    """ValueError naming the first of these flags that was given. `where`: why it changes nothing, in words."""
    for flag in fields(command):  # type: ignore[arg-type]
        usual = flag.default if flag.default_factory is MISSING else flag.default_factory()
        if flag.name in names and getattr(command, flag.name) != usual:
            raise ValueError(f"--{flag.name.replace('_', '-')} changes nothing {where}: leave it out")


def check_file(flag: str, path: Path | None) -> None:
    """Raise ValueError if `path` is a folder, before the work whose result is to be written to that file."""
    if path is not None and path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file in it")


def check_place(path: Path) -> None:
    """Raise ValueError unless `path`, a file or folder that need not exist yet, can be created, outside of datasets."""
    from vla.runtime.locks import refuse_inside_dataset

    refuse_inside_dataset(path)
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise ValueError(
                f"{path} cannot be written: {part} is a link to {os.readlink(part)}, which is not there: is its disk "
                "unplugged? Bring it back, or choose another place"
            )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is a file, not a folder")
    if not path.exists() and not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: this user may not write in {folder}")
