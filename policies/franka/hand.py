"""The Franka Hand without waiting for it: its calls block until the fingers stand still, so a thread makes them."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

_READ_S = 0.01
_GRIP_ANY_M = 0.1
"""Whatever width the fingers come to rest at, they hold something or nothing: no grasp counts as failed."""


class Hand:
    """A gripper that is opened and closed. `trouble` is what went wrong last, None while nothing does."""

    def __init__(self, gripper: Any, *, speed_m_s: float, force_n: float) -> None:
        """`gripper`: a connected `franky.Gripper`, or what behaves like one."""
        self._gripper, self._speed, self._force = gripper, speed_m_s, force_n
        self.trouble: str | None = None
        self._changed = threading.Condition()
        self._wanted: bool | None = None
        self._moving = self._closed = False
        state = gripper.state
        self._width, self.widest_m = float(state.width), float(state.max_width)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._act, self._watch)]
        for thread in self._threads:
            thread.start()

    @property
    def width_m(self) -> float:
        """Between the fingers, as last read."""
        return self._width

    @property
    def open(self) -> bool | None:
        """The last command; None before the first."""
        return self._wanted

    def command(self, open_: bool) -> None:
        """Open or close it. Returns at once; a movement towards the other side is broken off."""
        with self._changed:
            if open_ == self._wanted:
                return
            self._wanted, moving = open_, self._moving
            self._changed.notify_all()
        if moving:
            threading.Thread(target=self._stop, daemon=True).start()  # which answers as late as a movement

    def close(self) -> None:
        """End the threads; a movement that lasts is broken off."""
        with self._changed:
            self._closed, moving = True, self._moving
            self._changed.notify_all()
        if moving:
            self._stop()
        for thread in self._threads:
            thread.join(timeout=1)

    def _stop(self) -> None:
        with contextlib.suppress(Exception):
            self._gripper.stop()

    def _act(self) -> None:
        done: bool | None = None
        while True:
            with self._changed:
                while not self._closed and self._wanted == done:
                    self._changed.wait()
                if self._closed:
                    return
                wanted, self._moving = self._wanted, True
            try:
                if wanted:
                    self._gripper.move(self.widest_m, self._speed)
                else:
                    self._gripper.grasp(0.0, self._speed, self._force, _GRIP_ANY_M, _GRIP_ANY_M)
                self.trouble = None
            except Exception as error:
                if wanted == self._wanted:  # else it was broken off
                    self.trouble = f"the gripper does not {'open' if wanted else 'close'}: {error}"
            done, self._moving = wanted, False

    def _watch(self) -> None:
        while not self._closed:
            try:
                self._width = float(self._gripper.state.width)
            except Exception as error:
                self.trouble = f"the gripper does not tell its width: {error}"
            time.sleep(_READ_S)
