"""The command line, and the only argument parser of the project. It sees every room, and imports one when needed."""

from __future__ import annotations

import atexit
import gc
import sys
from contextlib import ExitStack
from functools import partial

import tyro

from bascule.commands.base import Command, check_place
from bascule.commands.control import Control
from bascule.commands.convert import Convert
from bascule.commands.data import Demos, GroundData
from bascule.commands.deploy import LeRobot, Serve
from bascule.commands.doctor import Doctor
from bascule.commands.export import Export
from bascule.commands.learn import RL, Pretrain, Quickstart, Train
from bascule.commands.look import List, View
from bascule.commands.measure import Bench, Eval, Experiment
from bascule.commands.report import Report
from vla.core.config import unknown
from vla.runtime.devices import check_device
from vla.runtime.locks import locked

COMMANDS: dict[str, type[Command]] = {
    "quickstart": Quickstart,
    "demos": Demos,
    "train": Train,
    "rl": RL,
    "convert": Convert,
    "eval": Eval,
    "serve": Serve,
    "export": Export,
    "control": Control,
    "lerobot": LeRobot,
    "doctor": Doctor,
    "view": View,
    "list": List,
    "bench": Bench,
    "experiment": Experiment,
    "report": Report,
    "ground-data": GroundData,
    "pretrain": Pretrain,
}


def main(argv: list[str] | None = None) -> int:
    """Run `vla ARGV`; the exit code. 2: the user's error, in one line; 130: interrupted."""
    args = sys.argv[1:] if argv is None else argv
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
    command = tyro.cli(COMMANDS[name], args=rest, prog=f"vla {name}")
    # The interpreter's last collection of garbage looks at every object of torch: 1.3 s of CPU, for nothing.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    from vla.runtime.console import run_guarded

    return run_guarded(partial(_run_alone, command), kept=command.kept)


def _run_alone(command: Command) -> int | None:
    """Run it while no other run may write what it writes."""
    check_device(getattr(command, "device", None))
    with ExitStack() as stack:
        for path in command.writes():
            check_place(path)
            stack.enter_context(locked(path))
        return command.run()


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
