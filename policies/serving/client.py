"""Client of a policy server: needs numpy, msgpack and websockets only, so it runs on a robot without torch.

    with PolicyClient("ws://127.0.0.1:8000") as policy:
        answer = policy.infer({"images": {"front": image_HWC}, "state": state_P, "prompt": "pick up the cup"})
        actions_CA = answer["actions"]

Speaks openpi's protocol; `policies.serving.server` and stock openpi servers both answer.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from policies.serving import wire
from vla.core.types import ActionChunk, ActionSpec, Observation, PolicySpec, Prefix
from vla.language.talking import Said, checked_question
from vla.processing.cameras.camera_map import CameraMap

if TYPE_CHECKING:
    import ssl

    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import ClientConnection

_BACKOFF_S = (0.05, 1.0)
"""First and longest pause between two attempts to connect; each pause is twice the one before."""


_LASTING = ("action_spec", "cameras", "proprio_dim", "proprio_names", "depth", "memory_frames", "episodes")
"""Metadata that stay as they were when a server comes back: a client has made itself ready for them."""
_MOST_WARNINGS = 100
_FORGOTTEN = (
    "the connection was lost in the middle of an episode, and with it what the policy had kept of it: it goes on as if "
    "the episode began now; begin anew if that matters"
)
_log = logging.getLogger(__name__)


class PolicyClient:
    """vla.core.types.Policy over a websocket. Every call answers, or raises, within about `timeout_s` seconds.

    A dropped connection is opened again, with back-off, inside the same budget of time, and the observation sent again
    (inference has no side effects). ConnectionError: no answer to be had; RuntimeError: the server's own words about a
    bad observation or a failed policy (the connection stays usable). Calls from several threads take turns.
    """

    def __init__(
        self,
        uri: str,
        api_key: str | None = None,
        timeout_s: float = 5.0,
        *,
        tls: ssl.SSLContext | None = None,
        whole_chunks: bool = True,
        cameras: CameraMap = CameraMap(),
    ) -> None:
        """`uri` ws://HOST:PORT, wss:// with TLS, /NAME behind it for one of several policies. `tls` for certificates
        that the system does not know. `whole_chunks`: `act` gives all actions of a chunk, as every policy does;
        False: only those that are meant to be executed, which saves bandwidth on a slow link. `cameras`: the
        robot's names of the cameras that the server's policy reads, used in `spec` and `act`."""
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.uri = uri if "://" in uri else f"ws://{uri}"
        try:
            _ = urlsplit(self.uri).port  # the property checks it
        except ValueError as problem:
            raise ValueError(f"{uri!r} is not a websocket address: {wire.one_line(problem)}") from None
        self.timeout_s = timeout_s
        self.latencies_ms: collections.deque[float] = collections.deque(maxlen=10_000)
        """Round-trip times of the latest answered requests in ms: send, inference, receive."""
        self.metadata: dict[str, Any] = {}
        """The server's metadata: for our server `action_spec`, `cameras`, `observation_keys` and more."""
        self.whole_chunks = whole_chunks
        self.confidence: np.ndarray | None = None
        """How surely the policy saw, in the last `act`, what each instruction names (B,); None where the server does
        not tell."""
        self._tls, self._cameras = tls, cameras
        self._going_on: set[int] = set()
        self._warned: list[Any] = []
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key is not None else {}
        self._connection: ClientConnection | None = None
        self._connected = 0
        """Connections so far."""
        self._resources = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._closed = False
        with self._lock:
            self._exchange(None)  # so that a wrong address fails here, and the metadata is known
        if cameras:
            self._check_cameras(cameras)

    @property
    def spec(self) -> PolicySpec:
        """The policy's spec from the server's metadata; None for fields it does not send (stock openpi servers)."""
        told = self.metadata
        action, cameras, names = told.get("action_spec"), told.get("cameras"), told.get("proprio_names")
        return PolicySpec(
            _action_spec(action) if isinstance(action, dict) else None,
            _count(told.get("chunk_size")),
            _count(told.get("n_action_steps")),
            tuple(filter(None, self._cameras.laid(cameras))) if _are_names(cameras) else None,
            _count(told.get("proprio_dim")),
            tuple(names) if _are_names(names) else None,
            grounding_threshold=_fraction(told.get("grounding"), "threshold"),
            picture_size=_count(told.get("picture_size")),
            depth=told.get("depth") is True or None,
            talks=told.get("talks") is True,
            memory_frames=_count(told.get("memory_frames")),
            routes=told.get("episodes") is True and "memory_frames" not in told,
        )

    def _check_cameras(self, cameras: CameraMap) -> None:
        """Close the connection and raise ValueError where they do not fit what the server says of its policy."""
        try:
            if not _are_names(reads := self.metadata.get("cameras")):
                raise ValueError(f"--cameras: the server at {self.uri} does not say which cameras its policy reads")
            cameras.laid(reads)
            if self.metadata.get("depth") is True and None in cameras.robots.values():
                raise ValueError(
                    f"--cameras: the policy at {self.uri} reads depth, and the server must know of a camera that is "
                    "lacking: give it to `vla serve`"
                )
        except ValueError:
            self.close()
            raise

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """One observation (unbatched) -> the server's answer, its "actions" being (C, A) in environment units.
        ValueError for what is no dict."""
        if not isinstance(observation, Mapping):
            raise ValueError(
                f"infer takes one observation as a dict of images, state and prompt, got {type(observation).__name__}; "
                "act takes an Observation"
            )
        frame = wire.pack(dict(observation))
        with self._lock:
            reply = self._exchange(frame)
        return self._read(reply)

    def ask(self, question: str, observation: Mapping[str, Any]) -> Said:
        """The policy's answer to a question about an observation (as `infer` takes it). RuntimeError with the server's
        words for a policy that cannot talk."""
        told = self.infer({**observation, "ask": checked_question(question)}).get("answer")
        sure = _fraction(told, "confidence")
        if sure is None or not isinstance(told.get("text"), str):
            raise RuntimeError(f"policy server at {self.uri} does not answer questions: it took this one for an order")
        return Said(told["text"], sure)

    def answer(self, obs: Observation, questions: Sequence[str]) -> list[Said]:
        """Answers to one question about each of B observations (`vla.language.talking.ask`), in B round trips."""
        return [self.ask(question, self._message(obs, i)) for i, question in enumerate(questions)]

    def _message(self, obs: Observation, i: int) -> dict[str, Any]:
        images = {camera: image[i] for camera, image in obs.images.items()}
        views = _views(obs, i) if self.metadata.get("depth") is True else {}
        if self._cameras:
            reads = self.metadata["cameras"]
            named = self._cameras.renamed(images, reads)
            black = np.zeros_like(next(iter(named.values())))
            images = {camera: named.get(camera, black) for camera in reads}
            views = {what: self._cameras.renamed(part, reads) for what, part in views.items()}
        return {"images": images, **views, "state": obs.proprio[i], "prompt": obs.instruction[i]}

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Action chunks (B, C, A) for B observations. The protocol has no batches, so this takes B round trips."""
        chunks, sure = [], []
        for i in range(obs.batch_size):
            # Only servers that speak of chunk sizes know the key; others (openpi's) send whole chunks anyway.
            whole = {"whole_chunk": True} if self.whole_chunks and "chunk_size" in self.metadata else {}
            session, connected = self._session(obs, i), self._connected
            answer = self.infer(self._message(obs, i) | whole | session)
            if session and "reset" not in session and self._connected != connected:
                _log.warning("policy server at %s: %s", self.uri, _FORGOTTEN)
            actions = answer.get("actions")
            if problem := _no_actions(actions, answer):
                raise RuntimeError(f"policy server at {self.uri}: {problem}")
            chunks.append(actions.astype(np.float32, copy=False))
            sure.append(_fraction(answer.get("grounding"), "confidence"))
            self._warn(answer.get("warnings"))
        self.confidence = None if None in sure else np.array(sure, np.float32)
        return np.stack(chunks)

    def _warn(self, warnings: Any) -> None:
        """Log what the server says about an instruction, each line once."""
        for line in warnings if isinstance(warnings, list) else []:
            if line not in self._warned and len(self._warned) < _MOST_WARNINGS:
                self._warned.append(line)
                _log.warning("policy server at %s: %s", self.uri, wire.one_line(line))

    def _session(self, obs: Observation, i: int) -> dict[str, Any]:
        """Tells a server whose policy is episodic of row `i` whose episode it is of, and whether it begins."""
        if not self.spec.episodic:
            return {}
        row = i if obs.env_ids is None else int(obs.env_ids[i])
        if row in self._going_on:
            return {"row": row}
        self._going_on.add(row)
        return {"row": row, "reset": True}

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Begin new episodes. openpi's protocol has no such message: the next observation tells a server whose policy
        remembers; other policies need not know."""
        self._going_on.difference_update(list(self._going_on) if env_ids is None else map(int, env_ids))

    def close(self) -> None:
        """Close the connection. Later calls raise ConnectionError; closing twice is allowed."""
        self._closed = True
        self._hang_up()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _exchange(self, frame: bytes | None) -> bytes | str:
        """Connect if need be, send `frame`, return the reply; without a frame, only connect."""
        from websockets.exceptions import InvalidStatus, InvalidURI, WebSocketException

        deadline = time.monotonic() + self.timeout_s
        pause_s, longest_pause_s = _BACKOFF_S
        while True:
            if self._closed:
                raise ConnectionError(f"policy client of {self.uri} is closed")
            try:
                connection = self._connection or self._connect(deadline)
                if frame is None:
                    return b""
                self._drop_late(connection)
                start = time.perf_counter()
                connection.send(frame)
                reply = connection.recv(timeout=_left(deadline))
                self.latencies_ms.append((time.perf_counter() - start) * 1e3)
                return reply
            except BaseException as error:
                # Whatever cut the exchange short (Ctrl-C too): its late reply must not be taken for the next one's.
                self._hang_up()
                if not isinstance(error, OSError | EOFError | WebSocketException):
                    raise
                failure = error
            if isinstance(failure, InvalidURI):
                raise ValueError(f"{self.uri!r} is not a websocket address: expected ws://HOST:PORT") from failure
            said = _said(failure) if isinstance(failure, InvalidStatus) else ""
            if isinstance(failure, InvalidStatus) and failure.response.status_code in (401, 403):
                raise ConnectionError(
                    f"policy server at {self.uri} refused this client ({said}): "
                    "pass the api_key that `vla serve` was given"
                ) from failure
            if isinstance(failure, InvalidStatus) and failure.response.status_code < 500:  # waiting will not help
                raise ConnectionError(
                    f"{self.uri} is not where a policy is served ({said}): check its port and the name behind it"
                ) from failure
            if type(failure).__name__ == "SSLCertVerificationError":  # no import of ssl for those who need none
                raise ConnectionError(
                    f"policy server at {self.uri}: {wire.one_line(failure)}: pass its certificate as tls"
                ) from failure
            if type(failure).__name__ == "SSLEOFError" or "WRONG_VERSION_NUMBER" in str(failure):
                raise ConnectionError(
                    f"what listens at {self.uri} does not speak TLS: write ws:// instead of wss://, or give the "
                    "server a certificate (vla serve --tls-cert)"
                ) from failure
            if _left(deadline) <= pause_s:
                reason = said or wire.one_line(failure) or type(failure).__name__
                there = "it is there, but takes nobody now" if said else "is `vla serve` running there?"
                raise ConnectionError(
                    f"no answer from a policy server at {self.uri} in {self.timeout_s:g} s ({reason}): {there}"
                ) from failure
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_pause_s)

    def _drop_late(self, connection: ClientConnection) -> None:
        """Throw away what came without a question: taken for the next answer it would be one to an old observation,
        and every later answer, too."""
        with contextlib.suppress(TimeoutError):
            while True:
                connection.recv(timeout=0)
                self._warn(["sends answers that nobody asked for (a relay that repeats them?); they are not used"])

    def _connect(self, deadline: float) -> ClientConnection:
        # Imported here: websockets brings ssl and asyncio, two thirds of what importing this module would cost.
        from websockets.sync.client import connect

        self._connection = connection = self._resources.enter_context(
            connect(
                self.uri,
                additional_headers=self._headers,
                compression=None,
                max_size=wire.MAX_FRAME_BYTES,
                open_timeout=max(_left(deadline), 1e-3),
                close_timeout=0.5,
                **({} if self._tls is None else {"ssl": self._tls}),
                proxy=None,  # a robot talks to its policy directly, whatever http_proxy says
            )
        )
        self._connected += 1
        _limit_send_time(connection.socket, self.timeout_s)
        metadata = self._read(connection.recv(timeout=_left(deadline)))
        self.check_same(metadata)
        self.metadata = metadata
        return connection

    def check_same(self, metadata: Mapping[str, Any]) -> None:
        """RuntimeError where a server that came back has another policy."""
        for name in _LASTING:
            if self.metadata and metadata.get(name) != self.metadata.get(name):
                raise RuntimeError(
                    f"policy server at {self.uri} came back with another policy ({name} changed): "
                    "make a new PolicyClient"
                )

    def _read(self, reply: bytes | str) -> dict[str, Any]:
        if isinstance(reply, str):  # openpi: a text frame is an error
            raise RuntimeError(f"policy server at {self.uri}: {wire.one_line(reply)}")
        try:
            answer = wire.unpack(reply)
        except wire.WireError as error:
            raise RuntimeError(f"policy server at {self.uri} sent a frame this client cannot read: {error}") from error
        if not isinstance(answer, dict):
            raise RuntimeError(f"policy server at {self.uri} sent a {type(answer).__name__}, expected a map")
        return answer

    def _hang_up(self) -> None:
        """Drop the connection without waiting for a peer that may be gone."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(Exception):  # the connection is given up: how it fails to close changes nothing
            self._resources.close()


def _views(obs: Observation, i: int) -> dict[str, dict[str, np.ndarray]]:
    """Depth and calibration of one robot's cameras, as far as the observation has them; the server names what is
    missing."""
    parts = {"depth": obs.depth, "intrinsics": obs.intrinsics, "extrinsics": obs.extrinsics}
    return {name: {camera: part[i] for camera, part in (given or {}).items()} for name, given in parts.items()}


def _action_spec(told: Mapping[str, Any]) -> ActionSpec:
    return ActionSpec(tuple(told["names"]), tuple(told["low"]), tuple(told["high"]), float(told["control_hz"]))


def _count(told: Any) -> int | None:
    return told if isinstance(told, int) and told > 0 else None


def _fraction(told: Any, name: str) -> float | None:
    value = told.get(name) if isinstance(told, dict) else None
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


def _are_names(told: Any) -> bool:
    return isinstance(told, list | tuple) and all(isinstance(name, str) for name in told)


def _no_actions(actions: Any, answer: Mapping[str, Any]) -> str | None:
    """The reason why an answer holds no valid action chunk; None if it does."""
    if "actions" not in answer:
        return f"its answer holds no 'actions', only {wire.one_line(', '.join(map(str, answer)) or 'nothing')}"
    if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "iuf":
        got = actions.dtype if isinstance(actions, np.ndarray) else type(actions).__name__
        return f"actions: expected an array (C, A) of numbers, got {got}"
    if actions.ndim != 2 or actions.size == 0:
        return f"actions: expected shape (C, A), got {actions.shape}"
    if not np.isfinite(actions).all():
        return f"actions: its answer of shape {actions.shape} holds NaN or infinity"
    return None


def _said(refusal: InvalidStatus) -> str:
    """A server's own words behind an HTTP status, in full."""
    body = wire.one_line((refusal.response.body or b"").decode(errors="replace"))
    return f"HTTP {refusal.response.status_code}" + (f": {body}" if body else "")


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)


def _limit_send_time(sock: socket.socket, timeout_s: float) -> None:
    """Bound a blocking send: websockets bounds receiving only, and a peer that stops reading would stall us."""
    if os.name != "posix":  # elsewhere the option takes another struct
        return
    seconds = int(timeout_s)
    timeval = struct.pack("ll", seconds, max(int((timeout_s - seconds) * 1e6), 1))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
