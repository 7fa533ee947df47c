"""Between a control loop, which keeps time, and a learner, which takes its time: one question and one answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from policies.control.playback import Answer
from vla.core.types import ActionChunk, Observation, Prefix


class Handover:
    """`policies.control.playback.Asking` whose questions somebody answers in another thread. Until they do, the loop
    holds the robot."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._question: tuple[Observation, int, float, float] | None = None
        self._answer: ActionChunk | None = None
        self._closed = False

    @property
    def busy(self) -> bool:
        """True while a question is out."""
        return self._question is not None

    def waiting_s(self) -> float:
        """Seconds since the question that is out was asked; 0 without one."""
        question = self._question
        return 0.0 if question is None else self._clock() - question[3]

    def ask(self, obs: Observation, *, step: int, seen_s: float, prefix: Prefix | None = None, scene: int = 0) -> None:
        """See `Asking.ask`."""
        with self._changed:
            self._question = (obs, step, seen_s, self._clock())
            self._changed.notify_all()

    def fetch(self) -> Answer | None:
        """See `Asking.fetch`."""
        with self._changed:
            if self._question is None or self._answer is None:
                return None
            (_, step, seen_s, asked_s), chunk = self._question, self._answer
            self._question = self._answer = None
            return Answer(chunk, None, step, seen_s, self._clock() - asked_s)

    def close(self) -> None:
        """The loop has ended: nobody asks any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """True when the loop has ended."""
        return self._closed

    def question(self) -> Observation | None:
        """The observation (B = 1) that waits for an answer, as soon as there is one; None when the loop has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._question is not None and self._answer is None))
            return None if self._closed or self._question is None else self._question[0]

    def answer(self, chunk_CA: ActionChunk) -> None:
        """Give the chunk (C, A) that the question waits for."""
        with self._changed:
            self._answer = chunk_CA
