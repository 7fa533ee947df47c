"""`vla bench startup`: CPU seconds until a command has answered, best of several runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from bascule.bench.measuring import Row, default_policy, row
from vla.model.config import DEFAULT_BACKBONE

RUNS = 3
_IMPORTS = ("vla", "bascule", "envs")
_COMMANDS = (
    ("--help",),
    ("list", "suites"),
    ("list", "tasks"),
    ("list", "recipes"),
    ("eval", "no-such-policy"),
    ("train", "--dataset", "no-such-data"),
)


def bench() -> list[Row]:
    """Rows in CPU seconds (user and system) of whole processes that do next to nothing; a server is stopped as soon as
    it listens."""
    rows = []
    for name in _IMPORTS:
        rows.append(row(f"import {name}", _best(lambda name=name: _run("-c", f"import {name}")), "CPU s"))
    for words in _COMMANDS:
        rows.append(row(f"vla {' '.join(words)}", _best(lambda words=words: _run("-m", "bascule", *words)), "CPU s"))
    with TemporaryDirectory() as folder:
        default_policy().vla.save(Path(folder) / "policy")
        seconds = _best(lambda: _serve(str(Path(folder) / "policy")))
    rows.append(row("vla serve, until it listens", seconds, "CPU s", config=f"backbone {DEFAULT_BACKBONE}"))
    return rows


def _best(once: Callable[[], None]) -> float:
    """The least CPU time that child processes took in one call of `once`."""
    taken = []
    for _ in range(RUNS):
        before = _cpu_of_children()
        once()
        taken.append(_cpu_of_children() - before)
    return min(taken)


def _cpu_of_children() -> float:
    used = os.times()
    return used.children_user + used.children_system


def _run(*args: str) -> None:
    subprocess.run([sys.executable, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _serve(policy: str) -> None:
    command = [sys.executable, "-m", "bascule", "serve", policy, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        server.kill()
    if not line.startswith("serving"):
        raise RuntimeError(f"vla serve did not start: run {' '.join(command[1:])}")
