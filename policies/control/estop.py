"""The keyboard e-stop: any key in the terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def key_pressed(fd: int | None = None) -> Iterator[Callable[[], bool]]:
    """A function that says whether a key was pressed in the terminal `fd` (standard input). Never, without a terminal.

    Ctrl-C is not a key here: it interrupts the command, which lets go of the robot too.
    """
    if fd is None:
        fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    if fd is None:
        yield lambda: False
        return
    import termios
    import tty

    pressed, over = threading.Event(), threading.Event()

    def listen() -> None:
        # The control loop only asks an event: it never waits for a terminal.
        while not over.is_set():
            if select.select([fd], [], [], 0.05)[0] and os.read(fd, 1):
                pressed.set()
                return

    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)  # a key counts when it is pressed, not when the line ends
    thread = threading.Thread(target=listen, name="e-stop", daemon=True)
    thread.start()
    try:
        yield pressed.is_set
    finally:
        over.set()
        thread.join()
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
