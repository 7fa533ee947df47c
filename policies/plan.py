"""What a controller plays between two answers of the policy: the plan, and the thread that asks for the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.guards import Kind
from vla.types import ActionChunk, Observation, Policy


class Plan:
    """A chunk on the way: `ticks_per_step` robot ticks to each of the policy's actions, and a count of actions played.

    Chunk N+1 is computed while N is played. When it comes, the actions it holds for steps that were meanwhile *played*
    are left out (counted, not estimated from clocks), and the next `blend_steps` pass gradually from old to new.
    """

    def __init__(
        self, kinds: tuple[Kind, ...], *, ticks_per_step: int, blend_steps: int, rest: tuple[float, ...]
    ) -> None:
        self._position = np.array([kind == "position" for kind in kinds])
        self._displacement = np.array([kind == "displacement" for kind in kinds])
        self._switch = np.array([kind == "switch" for kind in kinds])
        self._ticks, self._blend_steps = ticks_per_step, blend_steps
        self._actions = np.empty((0, len(kinds)), np.float64)
        self._before = np.array(rest, dtype=np.float64)
        self._tick = 0
        self.step = 0
        """Actions of the policy played so far."""
        self.seen_s = -np.inf
        """When the observation was taken that the plan answers."""

    @property
    def remaining(self) -> int:
        """Actions that can still be played, the current one included."""
        return len(self._actions)

    def install(self, chunk_CA: NDArray[np.floating], *, asked_at_step: int, seen_s: float) -> int:
        """Take over a chunk whose first action was for step `asked_at_step`. How many of its actions came too late."""
        late = self.step - asked_at_step
        fresh = np.array(chunk_CA[late:], dtype=np.float64)
        if not len(fresh):
            return late
        old = self._actions
        shared = min(self._blend_steps, len(old), len(fresh))
        for i in range(shared):
            weight = (i + 1) / (shared + 1)
            mixed = (1 - weight) * old[i] + weight * fresh[i]
            fresh[i] = np.where(self._switch, fresh[i], mixed)
        self._actions, self.seen_s = fresh, seen_s
        return late

    def wanted(self) -> tuple[float, ...] | None:
        """This tick's action, at the robot's rate; None when the plan is over.

        Positions lie on the line from the last action to this one, displacements come in equal parts, switches as are.
        """
        if not len(self._actions):
            return None
        action = self._actions[0]
        part = (self._tick + 1) / self._ticks
        value = np.where(self._position, self._before + (action - self._before) * part, action)
        value = np.where(self._displacement, action / self._ticks, value)
        return tuple(value.astype(np.float32).tolist())

    def advance(self) -> None:
        """The action just wanted was played."""
        self._tick += 1
        if self._tick == self._ticks:
            self._tick = 0
            self._before, self._actions = self._actions[0], self._actions[1:]
            self.step += 1


@dataclass(frozen=True)
class Answer:
    """What came back from the policy: a chunk (C, A), or the error."""

    chunk: ActionChunk | None
    error: Exception | None
    asked_at_step: int
    seen_s: float
    seconds: float


class Inference:
    """Runs a policy beside the control loop: one question at a time, the answer fetched when it is there."""

    def __init__(self, policy: Policy, *, asynchronous: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`asynchronous=False` answers inside `ask`, and the loop waits."""
        self._policy, self._clock = policy, clock
        self._question: tuple[Observation, int, float] | None = None
        self._answer: Answer | None = None
        self._asked_s: float | None = None
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if asynchronous:
            # A daemon: a policy that never returns must not keep a stopped robot's process alive.
            self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
            self._thread.start()

    @property
    def busy(self) -> bool:
        """A question is out, or an answer waits to be fetched."""
        return self._asked_s is not None

    def waiting_s(self) -> float:
        """How long the question that is out has been out; 0 without one."""
        return 0.0 if self._asked_s is None else self._clock() - self._asked_s

    def ask(self, obs: Observation, *, step: int, seen_s: float) -> None:
        assert not self.busy, "one question at a time"
        self._asked_s = self._clock()
        if self._thread is None:
            self._answer = self._run(obs, step, seen_s)
            return
        with self._wake:
            self._question = (obs, step, seen_s)
            self._wake.notify()

    def fetch(self) -> Answer | None:
        """The answer, once."""
        with self._wake:
            answer, self._answer = self._answer, None
        if answer is not None:
            self._asked_s = None
        return answer

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                while self._question is None and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                question, self._question = self._question, None
            answer = self._run(*question)
            with self._wake:
                self._answer = answer

    def _run(self, obs: Observation, step: int, seen_s: float) -> Answer:
        start = self._clock()
        try:
            chunk, error = np.asarray(self._policy.act(obs))[0], None
        except Exception as problem:  # whatever it is, the robot must come to rest in good order
            chunk, error = None, problem
        return Answer(chunk, error, step, seen_s, self._clock() - start)
