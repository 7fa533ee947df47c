"""Who stands beside a robot that practises: puts things back, and says when a task is done."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from vla.runtime.console import say

NOTHING, DONE, OUT_OF_REACH = 0, 1, 2
"""Words of an attendant on the present episode."""


class Attendant(Protocol):
    """Somebody beside the robot."""

    words: tuple[str, str] | None
    """The instructions of the task and of its undo; None: the robot says them with its observations."""
    robot_stays: bool
    """False: the robot is disconnected while things are put back, since somebody reaches in."""

    def put_back(self) -> None:
        """Put everything as the first task needs it."""

    def next_task(self, *, forward: bool) -> None:
        """An episode begins where the last one ended: of the first task, or of its undo."""

    def word(self) -> int:
        """NOTHING, DONE or OUT_OF_REACH: of the present episode, so far."""
        ...

    def key(self, key: bytes) -> bool:
        """True for a key of the terminal that tells the attendant's word, and is no emergency stop."""
        ...


class Person:
    """A person at the terminal. Space: the task is done; r: things must be put back; any other key stops the robot."""

    robot_stays = False
    MEANINGS = {b" ": DONE, b"r": OUT_OF_REACH}

    def __init__(self, words: tuple[str, str]) -> None:
        """ValueError where nobody sits at a terminal."""
        if sys.stdin is None or not sys.stdin.isatty():
            raise ValueError(
                "practice with a robot needs a person at a terminal who puts things back: run it in one (a class of "
                "your own can do that itself: docs/extend.md)"
            )
        self.words: tuple[str, str] | None = words
        self._word = NOTHING

    def put_back(self) -> None:
        """Ask for it, and wait until Enter is pressed. ConnectionError at the end of the input."""
        self._word = NOTHING
        say(f"put things back so that the robot can be told {self.words[0]!r}, step away, and press Enter")
        if not sys.stdin.readline():
            raise ConnectionError("nobody is at the terminal any more")
        say("space: the task is done; r: things must be put back; any other key: emergency stop")

    def next_task(self, *, forward: bool) -> None:
        """See `Attendant.next_task`."""
        self._word = NOTHING
        say(f"now: {self.words[0 if forward else 1]}")

    def word(self) -> int:
        """See `Attendant.word`."""
        return self._word

    def key(self, key: bytes) -> bool:
        """See `Attendant.key`."""
        if key not in self.MEANINGS:
            return False
        self._word = self.MEANINGS[key]
        return True


class Itself:
    """A robot that puts things back itself: the simulated one, or a class with `put_back()`, `next_task(forward)` and
    `word()`. It says its instructions with its observations."""

    words = None
    robot_stays = True

    def __init__(self, robot: Any) -> None:
        """ValueError naming a method that the robot lacks."""
        for name in ("put_back", "next_task", "word"):
            if not callable(getattr(robot, name, None)):
                raise ValueError(f"robot {type(robot).__name__} has no method {name}(): see docs/extend.md")
        self._robot = robot

    def put_back(self) -> None:
        """See `Attendant.put_back`."""
        self._robot.put_back()

    def next_task(self, *, forward: bool) -> None:
        """See `Attendant.next_task`."""
        self._robot.next_task(forward)

    def word(self) -> int:
        """See `Attendant.word`."""
        return int(self._robot.word())

    def key(self, key: bytes) -> bool:
        """See `Attendant.key`."""
        return False
