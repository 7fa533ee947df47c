"""A policy in a process of its own: what it computes takes no time from whoever asks, the interpreter's lock included.

For a control loop: Python code that infers in another thread keeps the lock for milliseconds at a time. The pipe joins
a parent and the child it started, nothing else can write to it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from policies.chunking.merge import Prefix
from vla.core.compatibility import Side, side_of
from vla.core.subprocesses import spawn
from vla.core.types import ActionChunk, ActionSpec, Observation

NICE = 5
"""The child yields to the control loop where they share a core."""


class PolicyProcess:
    """A `vla.core.types.Policy` that `make` builds in the child. It must have an `action_spec`."""

    def __init__(self, make: Callable[[], Any], *, timeout_s: float = 600.0) -> None:
        """Returns when the policy is loaded. `make` is pickled: a module's function, or a partial of one.

        ValueError with what `make` said if that was one, ConnectionError if the child died of something else.
        """
        self._pipe, theirs = Pipe()
        self._process = spawn(_serve, (theirs, make), name="policy")
        theirs.close()
        atexit.register(self.close)
        try:
            facts = self._receive(timeout_s)
        except BaseException:
            self.close()
            raise
        self.action_spec: ActionSpec = facts["action_spec"]
        self.n_action_steps: int | None = facts["n_action_steps"]
        self.cameras: tuple[str, ...] | None = facts["cameras"]
        self.proprio_dim: int | None = facts["proprio_dim"]
        self.side: Side = facts["side"]
        if facts["goes_on"]:
            self.act_after = self._act_after  # only a policy that can has it: that is how one asks

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        self._call("reset", env_ids)

    def act(self, obs: Observation) -> ActionChunk:
        """As the policy's own. ConnectionError when its process is gone."""
        return self._call("act", obs)

    def _act_after(self, obs: Observation, prefix: Prefix) -> ActionChunk:
        return self._call("act_after", obs, prefix)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((method, arguments))
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


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with contextlib.suppress(OSError):
        os.nice(NICE)
    try:
        policy = make()
        goes_on = hasattr(policy, "act_after")
        cameras, processor = getattr(policy, "cameras", None), getattr(policy, "processor", None)
        facts = {
            "action_spec": policy.action_spec,
            "n_action_steps": getattr(policy, "n_action_steps", None),
            "cameras": None if cameras is None else tuple(cameras),
            "proprio_dim": None if processor is None else processor.config.proprio_dim,
            "goes_on": goes_on,
            "side": side_of(policy),
        }
        pipe.send((True, facts))
        while True:
            method, arguments = pipe.recv()
            try:
                answer = True, getattr(policy, method)(*arguments)
            except Exception as error:
                answer = False, error
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send((False, error))
