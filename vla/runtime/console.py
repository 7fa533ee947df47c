"""Terminal output: tables, progress bars, one-line errors. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from vla.core.disk import DiskFull, full

if TYPE_CHECKING:  # rich is imported where something is printed with it
    from rich.console import Console
    from rich.table import Table

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

USER_ERRORS = (ValueError, OSError, FloatingPointError)
"""Errors with a one-line message for the user. OSError covers missing files, busy ports and lost connections;
FloatingPointError a model whose actions or gradients are not finite."""

Update = Callable[..., None]
"""update(completed, note="", total=None): move a progress bar to `completed` units and show a short note."""


def stdout() -> Console:
    """The console for results. Made at call time, so that a redirected sys.stdout is the one written to."""
    from rich.console import Console

    # In a pipe or a file there is no window to fit: do not fold lines at 80 columns.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def stderr() -> Console:
    """The console for progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line about what is happening, on stderr; names and errors quoted in it may hold line breaks."""
    from rich.text import Text

    stderr().print(Text(" ".join(message.splitlines())), soft_wrap=True)


_LONG_QUOTE = re.compile(r"""(['"])([^'"]{400,})\1""")
"""A quotation of this length is cut: it would bury what is wrong with it."""


_REFUSED = {
    PermissionError: "may not be read or written by this user: change its permissions (chmod, chown)",
    FileExistsError: "is there already: choose another place",
    IsADirectoryError: "is a folder, not a file",
    NotADirectoryError: "lies below a file, not in a folder",
}
"""Errors of the system that name a path, as Python words them only for its developers."""


def one_line(error: BaseException) -> str:
    """The error as one line: what is wrong and, where the raiser said so, how to mend it."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        text = f"no such file or folder: {os.fsdecode(error.filename)!r}"
    elif type(error) in _REFUSED and error.filename is not None:
        text = f"{os.fsdecode(error.filename)!r} {_REFUSED[type(error)]}"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC and not isinstance(error, DiskFull):
        text = str(full(os.fsdecode(error.filename))) if error.filename else f"a device is full: {error}"
    else:
        text = str(error)
    text = " ".join(text.split()) or type(error).__name__
    return _LONG_QUOTE.sub(lambda found: f"{found[1]}{found[2][:100]}...{found[2][-20:]}{found[1]}", text)


def run_guarded(body: Callable[[], int | None], *, kept: Callable[[], str]) -> int:
    """Run a command's body; its exit code.

    User errors become one line on stderr and exit code 2; Ctrl-C, SIGTERM and a closed terminal become one line saying
    what was `kept`, or what the interrupt itself says, and exit code 130. BASCULE_TRACEBACK=1 shows the traceback as
    well. Any other error is a defect of ours and keeps its traceback.
    """
    try:
        with signals_interrupt():
            return body() or 0
    except KeyboardInterrupt as ended:
        with suppress(OSError):  # the terminal may be gone
            print(f"vla: interrupted; {_said(ended) or kept()}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return reader_left()
    except USER_ERRORS as error:
        if os.environ.get("BASCULE_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"vla: error: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (MemoryError, RuntimeError, ImportError) as error:
        if not _out_of_memory(error):
            raise
        if os.environ.get("BASCULE_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"vla: error: out of memory: {one_line(error)}; ask for less (smaller batches, fewer worlds, shorter "
              "chunks) or free some", file=sys.stderr)  # fmt: skip
        return EXIT_USER_ERROR


def _said(ended: BaseException | None) -> str:
    """The words of the first of several interrupts, which came while one was being handled; "" for none."""
    told = ""
    while ended is not None:
        told = str(ended) if isinstance(ended, KeyboardInterrupt) and str(ended) else told
        ended = ended.__context__
    return told


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP (a closed terminal) are a KeyboardInterrupt like Ctrl-C: robots are let go, workers
    and servers ended. One that is ignored, as under nohup, stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    ours = os.getpid()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != ours:  # a forked child: it ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for each in taken:
            signal.signal(each, signal.SIG_IGN)  # a second one must not cut the end short
        raise KeyboardInterrupt

    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Inside, the function given tells whether Ctrl-C, or what `signals_interrupt` makes one, has come: a driver that
    catches every exception swallows the KeyboardInterrupt. Ctrl-C (SIGINT) is heard by a command that was started in
    the background of a script, too, whose shell has it ignored: nothing else would let its robot go."""
    come = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield come.is_set  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "SIGHUP"):
        before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)

    def handle(number: int, frame: FrameType | None) -> None:
        come.set()
        if callable(then := before[number]):
            then(number, frame)
        raise KeyboardInterrupt

    noted = [number for number, then in before.items() if callable(then) or number == signal.SIGINT]
    for number in noted:
        signal.signal(number, handle)
    try:
        yield come.is_set
    finally:
        for number in noted:
            signal.signal(number, before[number])


def reader_left() -> int:
    """The exit code after the reader of our output has left (`vla list recipes | head`). Nothing more is written, since
    Python would complain again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _out_of_memory(error: BaseException) -> bool:
    """torch has an error of its own for the GPU, and none for main memory; a library that finds no room is an import
    that fails."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, ImportError):
        return any(words in str(error) for words in ("failed to map segment", "annot allocate memory"))
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def progress(title: str, total: float | None = None, *, unit: str = "") -> Iterator[Update]:
    """A progress bar on stderr while the block lasts; yields its `Update`. No bar when stderr is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("eta", style="dim"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    console = stderr()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, note="")

        def update(completed: float, note: str = "", total: float | None = None) -> None:
            bar.update(task, completed=completed, note=note, **({} if total is None else {"total": total}))

        yield update


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table; columns after the first that hold only numbers are aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        cells = [row[index] for row in rows]
        numeric = index > 0 and cells and all(isinstance(cell, int | float) for cell in cells)
        result.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(f"{cell:g}" if isinstance(cell, float) else str(cell)) for cell in row))
    return result


def format_rate(result: Mapping[str, Any]) -> str:
    """`{"successes", "episodes", "wilson95"}` as "190/200 = 95.0% [91.0, 97.3]"; the interval is Wilson's, 95%."""
    lo, hi = result["wilson95"]
    successes, episodes = result["successes"], result["episodes"]
    return f"{successes}/{episodes} = {100 * successes / max(episodes, 1):.1f}% [{100 * lo:.1f}, {100 * hi:.1f}]"


def eval_table(report: Mapping[str, Any]) -> Table:
    """An evaluation (field names of `vla eval --json`) as a table: overall, per task, per phrasing, controls."""
    rows: list[tuple[str, str]] = [("all", format_rate(report))]
    for group in ("per_task", "per_phrasing"):
        rows += [(f"{group[4:]} {name!r}", format_rate(part)) for name, part in report.get(group, {}).items()]
    rows += [(f"group {name}", f"{100 * rate:.1f}%") for name, rate in report.get("group_rates", {}).items()]
    rows += [(f"control {name}", format_rate(part)) for name, part in report.get("controls", {}).items()]
    if (held := report.get("held")) is not None:
        rows.append(("held, nothing named in sight", f"{held['episodes']} of {report['episodes']} episodes, "
                     f"{held['held_decisions']} of {held['decisions']} decisions"))  # fmt: skip
    return table(f"{report['policy']} on {report['suite']}", ("what", "success, Wilson 95%"), rows)


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """The quickstart's stages: name, seconds and the other figures of each one."""
    rows = []
    for stage in stages:
        known = ("name", "seconds", "state", "reason", "warning")
        facts = [f"{key} {value}" for key, value in stage.items() if key not in known]
        if "warning" in stage:
            facts.append(f"warning: {stage['warning']}")
        if (state := stage.get("state", "done")) != "done":
            facts.insert(0, f"{state}: {stage['reason']}" if stage.get("reason") else state)
        rows.append((stage["name"], f"{stage['seconds']:.1f}", ", ".join(facts)))
    rows.append(("total", f"{sum(stage['seconds'] for stage in stages):.1f}", ""))
    return table("stages", ("stage", "seconds", ""), rows)


def bench_table(report: Mapping[str, Any]) -> Table:
    """A benchmark (field names of `vla bench --json`) as a table."""
    rows = []
    for result in report["results"]:
        baseline, ratio = result.get("baseline"), result.get("ratio")
        versus = "" if ratio is None else f"{ratio:.2f}x of {baseline}"
        rows.append((result["name"], f"{result['value']:,.6g}", result["unit"], versus))
    return table(f"{report['bench']} on {report['machine']}", ("what", "value", "unit", "against"), rows)
