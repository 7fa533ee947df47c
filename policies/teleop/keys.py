"""The keyboard e-stop: any key in the terminal that means nothing else."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def key_pressed(
    fd: int | None = None, *, others: Callable[[bytes], bool] = lambda key: False
) -> Iterator[Callable[[], bool]]:
    """A function that says whether a key was pressed in the terminal `fd` (standard input). Never, without a terminal.

    `others` is given every key first, in another thread, and says True of one that means something else. Ctrl-C is not
    a key here: it interrupts the command, which lets go of the robot too.
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
            if select.select([fd], [], [], 0.05)[0] and (key := os.read(fd, 1)) and not others(key):
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


class Key:
    """The emergency stop under any key, listened to from the first question on: a robot that is being connected may
    ask for keys of its own, as LeRobot's calibration does."""

    def __init__(self, open_ones: contextlib.ExitStack, *, others: Callable[[bytes], bool] = lambda key: False) -> None:
        """`open_ones` closes the terminal at its end; `others` as for `key_pressed`."""
        self._open_ones, self._others = open_ones, others
        self._pressed: Callable[[], bool] | None = None

    def __call__(self) -> bool:
        """True when a key was pressed."""
        if self._pressed is None:
            self._pressed = self._open_ones.enter_context(key_pressed(others=self._others))
        return self._pressed()
