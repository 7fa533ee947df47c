"""The quickstart's policy server: its own process, which starts, answers and ends within bounds, or says why not."""

from __future__ import annotations

import contextlib
import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LISTEN_TIMEOUT_S = 300.0
"""Torch and a checkpoint load in 5 s on an idle machine; this is for a busy one."""
_END_TIMEOUT_S = 15.0
_LAST_WORDS = 400


@contextmanager
def policy_server(
    checkpoint: Path, log: Path, *, listen_timeout_s: float = LISTEN_TIMEOUT_S, command: list[str] | None = None
) -> Iterator[str]:
    """`vla serve CHECKPOINT` in a process of its own; yields its address. Its stderr goes to the file `log`.

    ConnectionError when it ends before it listens or while it is used, TimeoutError when it does not listen in time;
    both end with its last line. It is ended in bounded time whatever it does, and ends itself if this process is
    killed. `command` runs another program than the server.
    """
    starter = "from bascule.quickstart.serve import serve_until_orphaned; serve_until_orphaned()"
    command = command or [sys.executable, "-c", starter, "serve", str(checkpoint), "--port", "0"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    try:
        yield _address(server, log, listen_timeout_s)
    except (OSError, EOFError) as problem:
        code = _ended(server)
        if code is None or isinstance(problem, _ServerError):
            raise
        raise ConnectionError(f"the policy server ended (exit code {code}){_last_line(log)}") from problem
    finally:
        end(server)


def end(process: subprocess.Popen[bytes], *, patience_s: float = _END_TIMEOUT_S) -> None:
    """Ask a process to end, then kill it; never waits longer than twice `patience_s`."""
    process.terminate()
    for last_resort in (process.kill, lambda: None):
        try:
            process.wait(timeout=patience_s)
            break
        except subprocess.TimeoutExpired:  # on a busy machine an interpreter's exit alone may take 10 s
            last_resort()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def serve_until_orphaned() -> None:
    """`vla serve` with this process's arguments, ended when the process that started it is gone (stdin closes)."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1 << 16):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_END_TIMEOUT_S)
        os._exit(1)

    threading.Thread(target=watch, name="orphan-watch", daemon=True).start()
    runpy.run_module("bascule", run_name="__main__", alter_sys=True)


class _ServerError(ConnectionError):
    """Says already what became of the server."""


def _address(server: subprocess.Popen[bytes], log: Path, timeout_s: float) -> str:
    """The address that `vla serve` prints once it listens."""
    assert server.stdout is not None
    words: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_words, args=(server.stdout, words), daemon=True).start()
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            word = words.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"the policy server did not listen within {timeout_s:g} s{_last_line(log)}") from None
        if word is None:
            code = _ended(server)
            how = "" if code is None else f" (exit code {code})"
            raise _ServerError(f"the policy server ended before it listened{how}{_last_line(log)}")
        if word.startswith("ws://"):
            return word.rstrip(".,;")


def _read_words(pipe: BinaryIO, words: queue.Queue[str | None]) -> None:
    """Read to the end, also after the address has come: a full pipe would stop the server."""
    with pipe:
        for line in pipe:
            for word in line.decode("utf-8", "replace").split():
                words.put(word)
    words.put(None)


def _ended(server: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a server that is gone or about to go, None of one that lives."""
    try:
        return server.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return f": {lines[-1][-_LAST_WORDS:]}" if lines else ""
