"""A policy in a process of its own, so that inference never holds the control loop's interpreter lock (GIL).

For a control loop: Python code that infers in another thread keeps the lock for milliseconds at a time. The pipe joins
a parent and the child it started, nothing else can write to it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.core.grounding import confidence_of
from vla.core.subprocesses import spawn
from vla.core.types import ActionChunk, Observation, Policy, PolicySpec, Prefix
from vla.language.talking import ACCOUNT, CANNOT, Said, Speech, speech

_log = logging.getLogger(__name__)
NICE = 5
"""The child yields to the control loop where they share a core."""


class PolicyProcess:
    """A `vla.core.types.Policy` that `make` builds in the child."""

    def __init__(self, make: Callable[[], Policy], *, timeout_s: float = 600.0, account_s: float | None = None) -> None:
        """Returns when the policy is loaded. `make` is pickled: a module's function, or a partial of one.
        `account_s`: seconds between two accounts that the policy gives of what it does; None: none.

        ValueError with what `make` said if that was one, ConnectionError if the child died of something else.
        """
        self.confidence: NDArray[np.float32] | None = None
        """The grounding confidence (B,), 0 to 1, that the child's policy had in its last `act`; None if it has none."""
        self.account: Said | None = None
        """The account that the policy gave of what it does since the `act` before the last, if any."""
        self._pipe, theirs = Pipe()
        self._process = spawn(_serve, (theirs, make, account_s), name="policy")
        theirs.close()
        atexit.register(self.close)
        try:
            self.spec: PolicySpec = self._receive(timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """The process id of the child, or None if it was never started."""
        return self._process.pid

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Reset the policy for the given environments (None: all). ConnectionError when its process is gone."""
        self._call("reset", env_ids)

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The action chunks (B, C, A) of the policy in the child. ConnectionError when its process is gone."""
        chunk, self.confidence, self.account = self._call("act", obs, **({} if prefix is None else {"prefix": prefix}))
        return chunk

    def answer(self, obs: Observation, questions: Sequence[str]) -> list[Said]:
        """Answers of the policy in the child to one question about each of B observations (`vla.language.talking`)."""
        return self._call("answer", obs, list(questions))

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        try:
            self._pipe.send((method, arguments, named))
        except OSError as error:
            raise ConnectionError("the policy's process is gone") from error
        return self._receive(None)

    def _receive(self, timeout_s: float | None) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                raise TimeoutError("the policy's process does not answer")
            good, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ConnectionError("the policy's process is gone") from error
        if not good:
            raise value
        return value

    def close(self) -> None:
        """End the child. Safe to call twice."""
        atexit.unregister(self.close)
        self._pipe.close()
        self._process.join(timeout=1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(timeout=5)


class _Accounts:
    """A policy's account of what it does, told between two requests, a token at a time."""

    def __init__(self, policy: Policy, every_s: float) -> None:
        self._policy, self._every_s, self._next_s = policy, every_s, time.monotonic()
        self._speech: Speech | None = None
        self._done: Said | None = None

    def see(self, obs: Observation) -> None:
        """An observation that was acted on: one to speak about, if it is time."""
        if self._speech is None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self._every_s
            with self._heard():
                self._speech = speech(self._policy, obs.select([0]), [ACCOUNT])

    def go_on(self, busy: Callable[[], bool]) -> None:
        """Speak until the account is told, or a request has come."""
        while self._speech is not None and not busy():
            with self._heard():
                if self._speech.step():
                    self._done, self._speech = self._speech.said()[0], None

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """Acting goes on, whatever talking comes to."""
        try:
            yield
        except Exception:
            _log.exception("the policy failed to say what it does")
            self._speech = None

    def take(self) -> Said | None:
        """The account that was told, once."""
        done, self._done = self._done, None
        return done


def _serve(pipe: Connection, make: Callable[[], Policy], account_s: float | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with contextlib.suppress(OSError):
        os.nice(NICE)
    try:
        policy = make()
        if account_s is not None and not policy.spec.talks:
            raise ValueError(CANNOT)
        accounts = None if account_s is None else _Accounts(policy, account_s)
        pipe.send((True, policy.spec))
        while True:
            if accounts is not None:
                accounts.go_on(pipe.poll)
            method, arguments, named = pipe.recv()
            try:
                value = getattr(policy, method)(*arguments, **named)
                told = None if accounts is None else accounts.take()
                answer = True, (value, confidence_of(policy), told) if method == "act" else value
            except Exception as error:
                answer = False, error
            pipe.send(answer)
            if accounts is not None and method == "act" and answer[0]:
                accounts.see(arguments[0])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send((False, error))
