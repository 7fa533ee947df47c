"""The command line, and the only argument parser of the project. It sees every room, and imports one when needed."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from importlib import import_module
from itertools import pairwise

from bascule.commands.base import Command, check_place
from vla.core.config import unknown

_HOMES = {
    "quickstart": "learning.quickstart.Quickstart",
    "demos": "data.Demos",
    "check": "data.Check",
    "train": "learning.train.Train",
    "rl": "learning.rl.RL",
    "convert": "convert.Convert",
    "eval": "measuring.evaluate.Eval",
    "serve": "deploy.Serve",
    "export": "export.Export",
    "control": "control.Control",
    "ask": "talk.Ask",
    "lerobot": "deploy.LeRobot",
    "franka-cell": "franka_cell.FrankaCell",
    "doctor": "doctor.Doctor",
    "view": "look.View",
    "list": "look.List",
    "bench": "measuring.bench.Bench",
    "experiment": "measuring.experiment.Experiment",
    "report": "report.Report",
    "ground-data": "data.GroundData",
    "talk-data": "talk.TalkData",
    "pretrain": "learning.pretrain.Pretrain",
}
"""Module of `bascule.commands` and class of every command, in the order in which the help lists them."""


class _Commands(Mapping[str, type[Command]]):
    """The commands by name; a command's module is imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Command]:
        module, _, cls = _HOMES[name].rpartition(".")
        return getattr(import_module(f"bascule.commands.{module}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)


COMMANDS = _Commands()


def main(argv: list[str] | None = None) -> int:
    """Run `vla ARGV`; the exit code. 2: the user's error, in one line; 130: interrupted."""
    args = sys.argv[1:] if argv is None else argv
    _open_streams()
    if (problem := _unfit(args)) is not None:
        print(f"vla: error: {problem}", file=sys.stderr)
        return 2
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(version("bascule"))
        return 0
    name, *rest = args
    if name not in COMMANDS:
        print(f"vla: error: {unknown(name, COMMANDS, 'command')}", file=sys.stderr)
        return 2
    from bascule.usage import UsageError, parse

    prog = f"vla {name}"
    try:
        chosen, left = COMMANDS[name].variant(rest)
        prog = " ".join([prog, *rest[: len(rest) - len(left)]])
        command = parse(chosen, left, prog)
    except (UsageError, ValueError) as error:
        print(f"{prog}: error: {error}; see {prog} --help", file=sys.stderr)
        return 2
    except BrokenPipeError:
        from vla.runtime.console import reader_left

        return reader_left()
    # The interpreter's last collection of garbage looks at every object of torch: 1.3 s of CPU, for nothing.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    from vla.runtime.console import run_guarded

    return run_guarded(partial(_run_alone, command, rest), kept=command.kept)


def _open_streams() -> None:
    """Let what a supervisor or a shell (`>&-`) has closed lead nowhere: else the first files that are opened take its
    place, and whatever is printed goes into them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _unfit(args: list[str]) -> str | None:
    """The problem with where and with what the command was called, if no command can do anything with it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the present folder no longer exists: cd to one that does"
    for arg in args:
        if any("\ud800" <= sign <= "\udfff" for sign in arg):
            name = os.fsencode(arg).decode(errors="backslashreplace")
            return f"the argument {name} is no UTF-8 text: rename it, or call the command with LC_ALL=C.UTF-8"
    return None


def _run_alone(command: Command, args: list[str]) -> int | None:
    """Run it while no other run may write what it writes."""
    from vla.runtime.devices import check_device
    from vla.runtime.locks import locked

    check_device(getattr(command, "device", None))
    _check_named(command, args)
    with ExitStack() as stack:
        for path in command.writes():
            check_place(path)
            stack.enter_context(locked(path))
        return command.run()


def _check_named(command: Command, args: list[str]) -> None:
    """ValueError for a file or folder without a name, as of a variable that is not set: it would mean this very folder;
    and for a file that is to be written and is named a second time: what was in it would be lost."""
    parts = [part for arg in args for part in _parts(arg)]
    named = {f"--{field.name.replace('_', '-')}" for field in fields(command) if "Path" in str(field.type)}
    named |= {"--backbone", "--policy"}  # a folder, too, where they are none of the known names
    written = ("--out", "--json", "--log", "--to-dataset", "--page", "--fix")
    flag = ""
    for part in parts:
        if part.startswith("--"):
            flag = part
        elif not part.strip() and flag in (*named, *written):
            what = "what is to be written" if flag in written else "a file or folder"
            raise ValueError(f"{flag} is empty: name {what}; . is the present folder")
    for place, (flag, value) in enumerate(pairwise(parts)):
        if flag in ("--json", "--log", "--page") and os.path.splitext(value)[1] and not value.startswith("/dev/"):
            others = [*parts[: place + 1], *parts[place + 2 :]]
            files = {os.path.realpath(file) for other in others for file in (other, other.partition("=")[2]) if file}
            if os.path.realpath(value) in files:
                raise ValueError(f"{flag} {value} is named twice in this command: write it to another file")


def _parts(arg: str) -> tuple[str, ...]:
    """A flag and its value, also where they are joined by "="."""
    flag, joined, value = arg.partition("=")
    return (flag.replace("_", "-"), value) if joined and arg.startswith("--") else (arg,)


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vla COMMAND [ARGS]    (vla COMMAND --help explains its arguments)",
            "",
            *lines,
            "",
            "Errors are one line; BASCULE_TRACEBACK=1 shows where they come from.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
