"""Dynamic batching: requests that arrive while the policy is busy are answered together by the next forward pass.
Questions are answered in between, a token at a time: an action waits for no more than that.
"""

from __future__ import annotations

import asyncio
import http
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vla.core.grounding import confidence_of
from vla.core.types import Observation, Policy, PolicySpec
from vla.language.talking import Said, Speech, speech

STUCK_S = 30.0
"""Longer than an answer takes, but for the first of a policy that compiles before it: that one may be told as stuck."""


class HasPolicy(Protocol):
    """The holder of the served policy, which may be replaced between two batches."""

    policy: Policy
    spec: PolicySpec


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    actions: NDArray[np.float32]
    """(C, A) in environment units."""
    infer_ms: float
    """Inference time of the whole batch in ms."""
    batch_size: int
    confidence: float | None = None
    """How surely the policy sees what the instruction names (`vla.core.grounding`); None where it does not tell."""


@dataclass(eq=False)
class _Request:
    served: HasPolicy
    obs: Observation
    future: asyncio.Future[Answer]

    @property
    def kind(self) -> tuple[object, ...]:
        """Requests of one kind fit into one batch: same policy, same image sizes, same state."""
        pictures = *self.obs.images.items(), *(self.obs.depth or {}).items()
        shapes = tuple((camera, picture.shape) for camera, picture in pictures)
        return id(self.served), shapes, self.obs.proprio.shape


@dataclass(eq=False)
class _Question:
    served: HasPolicy
    obs: Observation
    text: str
    future: asyncio.Future[Said]
    speech: Speech | None = None

    def step(self) -> Said | None:
        """Go on by one token; the answer, once it is whole."""
        if self.speech is None:
            self.speech = speech(self.served.policy, self.obs, [self.text])
        return self.speech.said()[0] if self.speech.step() else None


class Batcher:
    """Runs policies on one thread, one batch at a time. No batching delay: a batch is whatever is queued.

    All of it but the policies themselves belongs to the event loop's thread.
    """

    def __init__(self, *, max_batch: int = 16) -> None:
        """`max_batch` 1 answers one request at a time, in order: for policies with internal state."""
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        self._max_batch = max_batch
        self._waiting: deque[_Request] = deque()
        self._questions: deque[_Question] = deque()
        self._busy = False
        self._since = 0.0  # when the thread began what it is busy with
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._waiting)

    def health(self) -> tuple[http.HTTPStatus, str]:
        """For health checks: 503 with the reason while the policies' thread is stuck, though the port still answers."""
        if self._busy and (stuck_s := time.monotonic() - self._since) > STUCK_S:
            return http.HTTPStatus.SERVICE_UNAVAILABLE, f"the policy has not answered for {stuck_s:.0f} s\n"
        return http.HTTPStatus.OK, "OK\n"

    async def act(self, served: HasPolicy, obs: Observation) -> Answer:
        """The policy's answer to one observation (B = 1). Raises the exception that the policy raises on it."""
        request = _Request(served, obs, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._next()
        return await request.future

    async def ask(self, served: HasPolicy, obs: Observation, question: str) -> Said:
        """The policy's answer to a question about one observation. Raises the exception that the policy raises on
        it."""
        asked = _Question(served, obs, question, asyncio.get_running_loop().create_future())
        self._questions.append(asked)
        self._next()
        return await asked.future

    async def run(self, job: Callable[[], None]) -> None:
        """Run `job` on the policies' thread, between two batches."""
        await asyncio.get_running_loop().run_in_executor(self._worker, job)

    def close(self) -> None:
        """Accept no more requests and cancel the queued ones."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        for request in (*self._waiting, *self._questions):
            request.future.cancel()
        self._waiting.clear()
        self._questions.clear()

    def _next(self) -> None:
        if self._busy:
            return
        group = self._take()
        if not group:
            self._go_on()
            return
        self._busy, self._since = True, time.monotonic()
        work = asyncio.get_running_loop().run_in_executor(self._worker, _answer, group)

        def deliver(done: asyncio.Future[list[Answer | Exception]]) -> None:
            self._busy = False
            if done.cancelled():
                return
            for request, answer in zip(group, done.result(), strict=True):
                if request.future.done():  # the client has disconnected
                    continue
                if isinstance(answer, Exception):
                    request.future.set_exception(answer)
                else:
                    request.future.set_result(answer)
            self._next()

        work.add_done_callback(deliver)

    def _go_on(self) -> None:
        """The next token of the question that has waited longest."""
        while self._questions and self._questions[0].future.done():  # the client has disconnected
            self._questions.popleft()
        if not self._questions:
            return
        self._busy, self._since, asked = True, time.monotonic(), self._questions[0]
        work = asyncio.get_running_loop().run_in_executor(self._worker, asked.step)

        def deliver(done: asyncio.Future[Said | None]) -> None:
            self._busy = False
            if done.cancelled():
                return
            problem = done.exception()
            if problem is not None or done.result() is not None:
                self._questions.popleft()
                if not asked.future.done():
                    asked.future.set_exception(problem) if problem else asked.future.set_result(done.result())
            self._next()

        work.add_done_callback(deliver)

    def _take(self) -> list[_Request]:
        """The longest waiting request, and those behind it that fit."""
        group: list[_Request] = []
        left: deque[_Request] = deque()
        while self._waiting:
            request = self._waiting.popleft()
            if request.future.done():
                continue
            if len(group) < self._max_batch and (not group or request.kind == group[0].kind):
                group.append(request)
            else:
                left.append(request)
        self._waiting = left
        return group


def _answer(group: Sequence[_Request]) -> list[Answer | Exception]:
    """One answer or error for each request of one kind."""
    try:
        start = time.perf_counter()
        chunk, confidence = _act(group[0].served, [request.obs for request in group])
        took_ms = (time.perf_counter() - start) * 1e3
    except Exception as error:
        if len(group) == 1:
            return [error]
        # One bad request must not fail the others: run each alone to find it.
        return [answer for request in group for answer in _answer([request])]
    answers: list[Answer | Exception] = []
    for actions, sure in zip(chunk, confidence, strict=True):
        if np.isfinite(actions).all():
            answers.append(Answer(actions, took_ms, len(group), sure))
        else:
            answers.append(RuntimeError("its actions hold NaN or infinity; nothing was sent"))
    return answers


def _act(
    served: HasPolicy, observations: Sequence[Observation]
) -> tuple[NDArray[np.float32], list[float] | list[None]]:
    """Actions (B, C, A) and B confidences."""
    obs = observations[0] if len(observations) == 1 else _join(observations)
    chunk = np.asarray(served.policy.act(obs), dtype=np.float32)
    batch, width = len(observations), served.spec.action_spec.dim
    if chunk.ndim != 3 or chunk.shape[0] != batch or chunk.shape[1] == 0 or chunk.shape[2] != width:
        raise RuntimeError(f"expected actions of shape ({batch}, C, {width}), got {chunk.shape}")
    confidence = confidence_of(served.policy)
    return chunk, [None] * batch if confidence is None else confidence.tolist()


def _join(observations: Sequence[Observation]) -> Observation:
    first = observations[0]

    def joined(name: str) -> dict[str, NDArray[Any]] | None:
        if (cameras := getattr(first, name)) is None:
            return None
        return {camera: np.concatenate([getattr(obs, name)[camera] for obs in observations]) for camera in cameras}

    return Observation(
        images=joined("images") or {},
        depth=joined("depth"),
        intrinsics=joined("intrinsics"),
        extrinsics=joined("extrinsics"),
        proprio=np.concatenate([obs.proprio for obs in observations]),
        instruction=[text for obs in observations for text in obs.instruction],
        env_ids=None if first.env_ids is None else np.concatenate([obs.env_ids for obs in observations]),
    )
