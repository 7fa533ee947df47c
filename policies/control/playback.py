"""The action plan that a controller executes between two action chunks, and the threads that request new chunks."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from policies.chunking.merge import Blend, Join
from policies.control.guards import Kind
from vla.core.grounding import confidence_of
from vla.core.late_chunks import catch_up
from vla.core.types import ActionChunk, Observation, Policy, Prefix
from vla.language.talking import Said


class Plan:
    """A chunk on the way: `ticks_per_step` robot ticks to each of the policy's actions, and a count of actions played.

    Chunk N+1 is computed while N is played. When it comes, the actions it holds for steps that were meanwhile *played*
    are left out (counted, not estimated from clocks), and `join` says how the rest takes over. Displacements left out
    were meant to bring the robot somewhere, and those played instead brought it elsewhere: the difference is made up
    for over the next `catch_up_steps` actions.
    """

    def __init__(
        self,
        kinds: tuple[Kind, ...],
        *,
        ticks_per_step: Fraction | int,
        rest: tuple[float, ...],
        join: Join | None = None,
        catch_up_steps: int = 0,
        bounds: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        """`join` None: switch at once. `rest`: the action before the first, positions move away from it. `bounds`: of
        the robot's action, lowest and highest; what is made up for stays within them."""
        self._position = np.array([kind == "position" for kind in kinds])
        self._displacement = np.array([kind == "displacement" for kind in kinds])
        self._switch = np.array([kind == "switch" for kind in kinds])
        self._tick = 1 / Fraction(ticks_per_step)  # how much of an action one tick plays
        self._played = Fraction(0)  # how much of the current one is played
        self._join = join or Blend(0)
        self._actions = np.empty((0, len(kinds)), np.float64)
        self._before = np.array(rest, dtype=np.float64)
        self._past: deque[NDArray[np.float64]] = deque(maxlen=256)  # what was played, the latest last
        self._catch_up_steps = catch_up_steps
        # A displacement is that of a whole action here, and a robot's bounds are those of a tick.
        self._low, self._high = (
            np.full(len(kinds), sign * np.inf) if bounds is None else np.array(bounds[end]) * float(ticks_per_step)
            for end, sign in ((0, -1), (1, 1))
        )
        self.step = 0
        """Policy actions executed so far."""
        self.seen_s = -np.inf
        """Time of the observation from which the plan was computed, in seconds."""

    def clear(self) -> None:
        """Drop all actions of the plan."""
        self._actions, self.seen_s, self._played = self._actions[:0], -np.inf, Fraction(0)

    def restart(self, rest: tuple[float, ...]) -> None:
        """Drop everything: the robot was moved by somebody else, to `rest`."""
        self.clear()
        self._before = np.array(rest, dtype=np.float64)
        self._past.clear()

    @property
    def remaining(self) -> int:
        """Number of actions still to be executed, including the current one."""
        return len(self._actions)

    def left(self, delay: int) -> Prefix:
        """The remaining actions as a `Prefix` (1, T, A) for a policy whose next chunk comes `delay` actions later."""
        actions = self._actions.astype(np.float32)[None]
        return Prefix(actions, np.array([len(self._actions)]), np.array([delay]))

    def install(self, chunk_CA: NDArray[np.floating], *, asked_at_step: int, seen_s: float) -> int:
        """Join a chunk (C, A), whose first action is for policy step `asked_at_step`, to the plan.

        Returns the number of its actions that arrived too late to be executed.
        """
        late = self.step - asked_at_step
        fresh = np.array(chunk_CA[late:], dtype=np.float64)
        if len(fresh):
            joined = np.where(self._switch, fresh, self._join(self._actions, fresh, step=self.step))
            if self._catch_up_steps and late <= len(self._past):
                meant = np.sum(chunk_CA[:late], axis=0) - np.sum(list(self._past)[len(self._past) - late :], axis=0)
                if isinstance(self._join, Blend):  # it too plays other displacements than the chunk's, for a while
                    meant = meant + np.sum(fresh - joined, axis=0)
                self._catch_up(joined, meant)
            self._actions, self.seen_s = joined, seen_s
        return late

    def _catch_up(self, fresh_SA: NDArray[np.float64], debt_A: NDArray[np.float64]) -> None:
        """Add `debt` to the displacements, in equal parts where the bounds allow it, later where they do not."""
        debt = np.where(self._displacement, debt_A, 0.0)
        if not np.isfinite(debt).all():
            return  # the chunk is damaged: the guards stop the robot when it is played
        catch_up(fresh_SA, debt, self._low, self._high, steps=self._catch_up_steps)

    def wanted(self) -> tuple[float, ...] | None:
        """This tick's action, at the robot's rate; None when the plan is over.

        Positions lie on the line from one action to the next. Of a displacement, a tick gets the part that falls into
        it (of two, where an action ends within it). Switches are as they are at the tick's end.
        """
        if not len(self._actions):
            return None
        end = self._played + self._tick
        following = 1 if end > 1 and len(self._actions) > 1 else 0
        action = self._actions[following]
        before = self._actions[0] if following else self._before
        position = before + (action - before) * float(min(end - following, Fraction(1)))
        displacement = self._actions[0] * float(min(end, Fraction(1)) - self._played)
        if following:
            displacement = displacement + action * float(end - 1)
        value = np.where(self._position, position, np.where(self._displacement, displacement, action))
        return tuple(value.astype(np.float32).tolist())

    def advance(self) -> None:
        """Advance by one tick after the action of `wanted` was executed."""
        self._played += self._tick
        if self._played >= 1:
            self._past.append(self._actions[0])
            self._before, self._actions = self._actions[0], self._actions[1:]
            self._played = self._played - 1 if len(self._actions) else Fraction(0)
            self.step += 1


@dataclass(frozen=True)
class Answer:
    """The result of one request: an action chunk (C, A), or the exception the policy raised."""

    chunk: ActionChunk | None
    error: Exception | None
    asked_at_step: int
    seen_s: float
    seconds: float
    confidence: float | None = None
    """How surely the policy saw what the instruction names; None where it does not tell."""
    instruction: str = ""
    account: Said | None = None
    """The policy's own account of what it does, if it gave one meanwhile."""


class Asking(Protocol):
    """The source of a controller's action chunks. Answers are returned in the order of the requests."""

    @property
    def busy(self) -> bool:
        """True when no further request may be made: the limit of open or unfetched requests is reached."""

    def waiting_s(self) -> float:
        """Seconds since the oldest open request was made; 0 without one."""

    def ask(self, obs: Observation, *, step: int, seen_s: float, prefix: Prefix | None = None, scene: int = 0) -> None:
        """Request an action chunk for `obs`. `prefix`: the actions still to be executed, for a policy that can continue
        them. `scene`: number of the robot's episode; the policy is reset before the first answer of another."""

    def fetch(self) -> Answer | None:
        """The answer to the oldest open request, returned once; None while it is not there."""

    def close(self) -> None:
        """Stop making requests."""


Driver = Literal["policy", "human", "hand_over"]
"""Who drives at a tick. hand_over: a person has taken over and the robot is not where they point yet, or has handed
back and the policy's new chunk is not there or not reached yet."""


class Person(Protocol):
    """Somebody who may take over from the policy and hand back (`policies.teleop.takeover`). None of these methods
    raises: what fails is in `error`, and a guard holds the robot."""

    drives: bool
    """True between taking over and handing back."""
    driver: Driver
    """Who drove at the tick for which `command` was called last."""
    error: str | None
    """Why the teleoperator could not be read, in words; None where it could."""

    def connect(self) -> bool:
        """Connect to the teleoperator. False if that failed."""
        ...

    def look(self, last: tuple[float, ...], now_s: float) -> None:
        """Read the teleoperator: who drives from now on? `last`: the action (A,) that was sent last."""

    def command(self, planned: tuple[float, ...] | None) -> tuple[float, ...] | None:
        """The action (A,) of whoever drives: the person's, or the one `planned`, led over from where the other left
        the robot. None where there is none."""

    def disconnect(self) -> None:
        """Let go of the teleoperator."""


Question = tuple[Observation, int, float, Prefix | None, bool]
"""Observation, step, time and prefix as in `Asking.ask`, and True for the first of another scene."""


class Inference:
    """Runs a policy in threads beside the control loop; one thread per connection, so that several requests can be in
    flight."""

    def __init__(
        self,
        policy: Policy,
        *others: Policy,
        asynchronous: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`asynchronous=False` runs the policy inside `ask`, which blocks the loop. `others`: more connections to the
        same policy, each of which allows one more request in flight."""
        self._policy, self._clock, self._capacity = policy, clock, 1 + len(others)
        self._asked_s: dict[int, float] = {}  # the open requests, oldest first
        self._questions: deque[tuple[int, Question]] = deque()
        self._answers: dict[int, Answer] = {}
        self._count = 0
        self._scene = 0
        self._wake = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []
        if asynchronous:
            # Daemons: a policy that never returns must not keep a stopped robot's process alive.
            for i, one in enumerate((policy, *others)):
                thread = threading.Thread(target=self._work, args=(one,), name=f"inference {i}", daemon=True)
                self._threads.append(thread)
                thread.start()

    @property
    def busy(self) -> bool:
        """True when every connection has a request that is open or not yet fetched."""
        return len(self._asked_s) >= self._capacity

    def waiting_s(self) -> float:
        """Seconds since the oldest open request was made; 0 without one."""
        return self._clock() - min(self._asked_s.values()) if self._asked_s else 0.0

    def ask(self, obs: Observation, *, step: int, seen_s: float, prefix: Prefix | None = None, scene: int = 0) -> None:
        """Queue a request for a chunk; without threads the policy runs here. AssertionError when `busy`."""
        assert not self.busy, "no more questions than there are connections"
        number, self._count = self._count, self._count + 1
        self._asked_s[number] = self._clock()
        question, self._scene = (obs, step, seen_s, prefix, scene != self._scene), scene
        if not self._threads:
            self._answers[number] = self._run(self._policy, *question)
            return
        with self._wake:
            self._questions.append((number, question))
            self._wake.notify()

    def fetch(self) -> Answer | None:
        """The answer to the oldest open request, returned once; None while it is not there."""
        oldest = next(iter(self._asked_s), None)
        with self._wake:
            answer = self._answers.pop(oldest, None)  # type: ignore[arg-type]
        if answer is not None:
            del self._asked_s[oldest]  # type: ignore[arg-type]
        return answer

    def close(self) -> None:
        """End the threads; a policy call that is running is not interrupted."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _work(self, policy: Policy) -> None:
        while True:
            with self._wake:
                while not self._questions and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                number, question = self._questions.popleft()
            answer = self._run(policy, *question)
            with self._wake:
                self._answers[number] = answer

    def _run(
        self, policy: Policy, obs: Observation, step: int, seen_s: float, prefix: Prefix | None, begins: bool
    ) -> Answer:
        start, confidence = self._clock(), None
        try:
            if begins:
                policy.reset()
            chunks = policy.act(obs) if prefix is None else policy.act(obs, prefix=prefix)
            chunk, error = np.asarray(chunks)[0], None
            if (told := confidence_of(policy)) is not None:
                confidence = float(told[0])
        except Exception as problem:  # whatever it is, the robot must come to rest in good order
            chunk, error = None, problem
        account = getattr(policy, "account", None)
        return Answer(chunk, error, step, seen_s, self._clock() - start, confidence, obs.instruction[0], account)
