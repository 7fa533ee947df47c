"""Serve any Policy over openpi's websocket protocol, so stock openpi clients and `policies.client` drive it unchanged.

On connect the server sends one binary frame, the metadata map. After that every binary frame is an observation and gets
one answer: a binary frame {"actions": (C, A) float32 in environment units, "policy_timing", "server_timing"}, or a text
frame, which is a one-line error. Unlike openpi's server, a bad observation does not cost the connection.
`GET /healthz` answers 200 on the same port.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import ipaddress
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from policies import wire
from vla.types import ActionChunk, ActionSpec, Observation, Policy

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MAX_PROMPT_CHARS = 2000
_PING_S = 20.0
"""A client that answers no ping for this long is dropped (its cable was pulled)."""


def libero_key_map(cameras: Sequence[str]) -> dict[str, str]:
    """openpi's LIBERO observation layout -> ours; the first camera is the scene view, the second the wrist."""
    if not 1 <= len(cameras) <= 2:
        raise ValueError(f"the LIBERO layout has 1 or 2 cameras, this policy has {len(cameras)}: {', '.join(cameras)}")
    image_keys = ("observation/image", "observation/wrist_image")
    pairs = [(key, f"images/{camera}") for key, camera in zip(image_keys, cameras, strict=False)]
    return dict([*pairs, ("observation/state", "state"), ("prompt", "prompt")])


class ObservationReader:
    """Checks one client's observation map and makes it an Observation of one world. Every fault names its key.

    Native keys: "images/<camera>" (H, W, 3) uint8, "state" (P,) numbers, "prompt" str; "a/b" may be a flat key or
    nested maps. `key_map` {key on the wire: native key} adds aliases; the native keys keep working. Unknown keys are
    ignored.
    """

    def __init__(
        self, cameras: Sequence[str], *, proprio_dim: int | None = None, key_map: Mapping[str, str] | None = None
    ) -> None:
        self._cameras = tuple(cameras)
        self._proprio_dim = proprio_dim
        native = [*(f"images/{camera}" for camera in cameras), "state", "prompt"]
        for alias, name in (key_map or {}).items():
            if name not in native:
                raise ValueError(f"key_map sends {alias!r} to unknown key {name!r}; known: {', '.join(native)}")
        # Aliases first, so that the error for a missing key speaks the client's language.
        aliases = dict(key_map or {})
        self.keys = {name: [*(a for a in aliases if aliases[a] == name and a != name), name] for name in native}
        """Native key -> every key under which it is accepted."""

    def read(self, message: object) -> Observation:
        """The observation in `message`, batch size 1; ValueError with one line where it is not one."""
        if not isinstance(message, dict):
            raise ValueError(f"expected an observation map, got {type(message).__name__}")
        images = {camera: self._image(message, f"images/{camera}") for camera in self._cameras}
        return Observation(images=images, proprio=self._state(message), instruction=[self._prompt(message)])

    def _image(self, message: dict[Any, Any], name: str) -> np.ndarray:
        key, value = self._find(message, name)
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{key}: expected an array (H, W, 3) of uint8, got {type(value).__name__}")
        if value.ndim != 3 or value.shape[2] != 3 or value.size == 0 or value.dtype != np.uint8:
            channels_first = value.ndim == 3 and value.shape[0] == 3 != value.shape[2]
            hint = "; send height, width, channel order" if channels_first else ""
            raise ValueError(f"{key}: expected (H, W, 3) uint8, got {value.shape} {value.dtype}{hint}")
        return value[None]

    def _state(self, message: dict[Any, Any]) -> np.ndarray:
        key, value = self._find(message, "state")
        width = "P" if self._proprio_dim is None else str(self._proprio_dim)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"{key}: expected an array ({width},) of numbers, got {got}")
        if value.ndim != 1 or value.size == 0 or self._proprio_dim not in (None, value.size):
            raise ValueError(f"{key}: expected shape ({width},), got {value.shape}")
        with np.errstate(over="ignore"):
            state = value.astype(np.float32)
        if not np.isfinite(state).all():
            raise ValueError(f"{key}: value {int(np.flatnonzero(~np.isfinite(state))[0])} is NaN or infinite")
        return state[None]

    def _prompt(self, message: dict[Any, Any]) -> str:
        key, value = self._find(message, "prompt")
        if not isinstance(value, str):
            raise ValueError(f"{key}: expected a string, got {type(value).__name__}")
        if len(value) > MAX_PROMPT_CHARS:
            raise ValueError(f"{key}: {len(value)} characters, at most {MAX_PROMPT_CHARS} allowed")
        return value

    def _find(self, message: dict[Any, Any], name: str) -> tuple[str, object]:
        for key in self.keys[name]:
            found, value = _lookup(message, key)
            if found:
                return key, value
        raise ValueError(f"missing key {' or '.join(map(repr, self.keys[name]))}; got {_list_keys(message)}")


class PolicyServer:
    """One policy behind one websocket port. `run()` blocks, `serve_in_thread(server)` does not; each server runs once.

    metadata    what clients get on connecting, beside `action_spec`, `cameras` and `observation_keys`
    host, port  port 0 takes any free port; `server.port` says which. Another machine can reach the server only when
                `api_key` is set: clients then send `Authorization: Api-Key KEY`. There is no TLS here: tunnel it.
    proprio_dim the width `state` must have; None leaves that check to the policy
    key_map     {key on the wire: native key}, see ObservationReader and `libero_key_map`

    The policy runs on one worker thread, one call at a time; the event loop keeps answering pings meanwhile. The
    protocol has no reset message, so the policy is reset when a client connects and no other is connected.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        action_spec: ActionSpec,
        cameras: Sequence[str],
        metadata: Mapping[str, Any] | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
        key_map: Mapping[str, str] | None = None,
        proprio_dim: int | None = None,
    ) -> None:
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ValueError("api_key must be printable ASCII without spaces, and not empty")
        if api_key is None and not _is_loopback(host):
            raise ValueError(
                f"host {host!r} lets other machines command this policy: set an api key (vla serve --api-key KEY) "
                "or bind 127.0.0.1 and tunnel"
            )
        # "localhost" may resolve to two addresses, on which port 0 would be two different ports.
        self.host = "127.0.0.1" if host == "localhost" else host
        self._port = port
        self._policy = policy
        self._action_dim = action_spec.dim
        self._api_key = api_key
        self._reader = ObservationReader(cameras, proprio_dim=proprio_dim, key_map=key_map)
        spec = {
            "names": list(action_spec.names),
            "low": list(action_spec.low),
            "high": list(action_spec.high),
            "control_hz": action_spec.control_hz,
        }
        self.metadata = {
            **(metadata or {}),
            "action_spec": spec,
            "cameras": list(cameras),
            "observation_keys": self._reader.keys,
        }
        self._metadata_frame = wire.pack(self.metadata)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._infer_lock = asyncio.Lock()
        self._clients = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None

    @property
    def port(self) -> int:
        """The port listened on (the real one, once running)."""
        return self._port

    @property
    def uri(self) -> str:
        """What a client on this machine connects to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ws://{host}:{self.port}"

    def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until `stop()`, Ctrl-C or SIGTERM; clients are then told 1001 (going away). OSError: port taken."""
        asyncio.run(self._run(on_ready))

    def stop(self) -> None:
        """Ask `run()` to return, from any thread; a second call, or one after the end, does nothing."""
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: already stopped
                self._loop.call_soon_threadsafe(self._stopping.set)

    async def _run(self, on_ready: Callable[[], None] | None) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        for number in numbers:
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C arrives as KeyboardInterrupt
                self._loop.add_signal_handler(number, self._stopping.set)
        try:
            async with await self._listen() as server:
                self._port = server.sockets[0].getsockname()[1]
                if on_ready is not None:
                    on_ready()
                await self._stopping.wait()
                for number in numbers:  # leaving waits for the inference under way; a second Ctrl-C does not
                    with contextlib.suppress(NotImplementedError):
                        self._loop.remove_signal_handler(number)
        finally:
            self._worker.shutdown(wait=False, cancel_futures=True)

    async def _listen(self) -> Server:
        try:
            return await serve(
                self._handle,
                self.host,
                self._port,
                # A web page may open a websocket to this machine, but only with an Origin header. Robots send none.
                origins=[None],
                process_request=self._gate,
                compression=None,  # images barely shrink, and deflate would cost more than the inference
                max_size=wire.MAX_FRAME_BYTES,
                max_queue=2,  # request and answer: who sends ahead waits in their own socket, not in our memory
                ping_interval=_PING_S,
                ping_timeout=_PING_S,
                close_timeout=2.0,
            )
        except OSError as error:
            where, reason = f"{self.host}:{self._port}", wire.one_line(error.strerror or error)
            raise OSError(f"cannot listen on {where} ({reason}); choose another --port (0: any free)") from error

    def _gate(self, connection: ServerConnection, request: Request) -> Response | None:
        """Before the websocket handshake: health check and api key."""
        if request.path.partition("?")[0] == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self._api_key is None:
            return None
        given = request.headers.get_all("Authorization")
        expected = f"Api-Key {self._api_key}".encode()
        if len(given) == 1 and hmac.compare_digest(given[0].encode("utf-8", "surrogateescape"), expected):
            return None
        return connection.respond(http.HTTPStatus.UNAUTHORIZED, "send the header Authorization: Api-Key KEY\n")

    async def _handle(self, connection: ServerConnection) -> None:
        self._clients += 1
        try:
            if self._clients == 1:
                await self._on_worker(self._policy.reset)
            await connection.send(self._metadata_frame)
            previous_total_ms: float | None = None
            async for frame in connection:
                start = time.perf_counter()
                await connection.send(await self._answer(frame, previous_total_ms))
                previous_total_ms = _ms_since(start)
        except ConnectionClosed:
            pass
        except Exception as error:
            _log.exception("the policy failed to reset")
            with contextlib.suppress(ConnectionClosed):
                await connection.send(wire.one_line(f"policy failed to reset: {type(error).__name__}: {error}"))
        finally:
            self._clients -= 1

    async def _answer(self, frame: bytes | str, previous_total_ms: float | None) -> bytes | str:
        """The answer to one frame: bytes, or the text of an error. Never raises on what a client or a policy does."""
        start = time.perf_counter()
        try:
            if isinstance(frame, str):
                raise wire.WireError("expected a binary msgpack frame, got a text frame")
            chunk, infer_ms = await self._infer(self._reader.read(wire.unpack(frame)))
            # Clients like openpi's ActionChunkBroker index every array by the control step: times must be plain floats.
            server_timing = {"infer_ms": _ms_since(start)}
            if previous_total_ms is not None:
                server_timing["prev_total_ms"] = previous_total_ms
            return wire.pack(
                {"actions": chunk[0], "policy_timing": {"infer_ms": infer_ms}, "server_timing": server_timing}
            )
        except ValueError as error:
            return wire.one_line(error)
        except Exception as error:
            _log.exception("the policy failed")
            return wire.one_line(f"policy failed: {type(error).__name__}: {error}")

    async def _infer(self, obs: Observation) -> tuple[ActionChunk, float]:
        """Actions (1, C, A) for one world, and the milliseconds the policy took.

        Every observation of every client passes here, one at a time: this is where batching across clients would go.
        """

        def act() -> tuple[ActionChunk, float]:
            start = time.perf_counter()
            chunk = np.asarray(self._policy.act(obs), dtype=np.float32)
            return chunk, _ms_since(start)

        chunk, infer_ms = await self._on_worker(act)
        if chunk.ndim != 3 or chunk.shape[0] != 1 or chunk.shape[1] == 0 or chunk.shape[2] != self._action_dim:
            raise RuntimeError(f"expected actions of shape (1, C, {self._action_dim}), got {chunk.shape}")
        if not np.isfinite(chunk).all():
            raise RuntimeError("its actions hold NaN or infinity; nothing was sent")
        return chunk, infer_ms

    async def _on_worker(self, job: Callable[[], _T]) -> _T:
        async with self._infer_lock:
            return await asyncio.get_running_loop().run_in_executor(self._worker, job)


@contextlib.contextmanager
def serve_in_thread(server: PolicyServer, *, start_timeout_s: float = 10.0) -> Iterator[PolicyServer]:
    """Run `server` on a background thread while the block lasts; it listens when the block starts."""
    ready = threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            server.run(on_ready=ready.set)
        except BaseException as error:
            failure.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="policy-server", daemon=True)
    thread.start()
    started = ready.wait(start_timeout_s)
    try:
        if failure:
            raise failure[0]
        if not started:
            raise TimeoutError(f"the policy server did not listen within {start_timeout_s:g} s")
        yield server
    finally:
        server.stop()
        thread.join(timeout=start_timeout_s)


def _lookup(message: Mapping[Any, Any], key: str) -> tuple[bool, object]:
    """`key` as a flat key, else "a/b" as a path through nested maps: (found, value)."""
    if key in message:
        return True, message[key]
    value: object = message
    for part in key.split("/"):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _list_keys(message: Mapping[Any, Any], limit: int = 12) -> str:
    names = []
    for key, value in message.items():
        children = value if isinstance(value, dict) and value else None
        names += [f"{key}/{child}" for child in children] if children else [str(key)]
    more = ", ..." if len(names) > limit else ""
    return (", ".join(sorted(names)[:limit]) + more) or "no keys"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name: it may resolve to anything
        return False


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
