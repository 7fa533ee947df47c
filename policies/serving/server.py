"""Serve policies over openpi's websocket protocol, so stock openpi clients and `policies.serving.client` drive them
unchanged.

On connect the server sends one binary frame, the metadata map. After that every binary frame is an observation and gets
one answer: a binary frame {"actions": (C, A) float32 in environment units, "policy_timing", "server_timing"}, or a text
frame, which is a one-line error. A policy that tells how surely it sees what the prompt names adds "grounding":
{"confidence", "threshold", "below"} (`vla.core.grounding`); a prompt that is cut, or has words without a meaning, gets
"warnings", a line each. Unlike openpi's server, a bad observation does not cost the connection. C is the
`n_action_steps` of the metadata; who sends "whole_chunk": true, as a controller on a slow link, gets `chunk_size`.
Who sends "ask": a question, gets {"answer": {"text", "confidence"}} from a policy that talks, and no actions.
`GET /healthz` answers 200, or 503 while a policy is stuck, and `GET /metrics` Prometheus on the same port.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import logging
import signal
import ssl
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from policies.serving import wire
from policies.serving.batching import Batcher
from policies.serving.layouts import Layout
from policies.serving.network import HTTPConnection, is_loopback, other_method, plain
from policies.serving.policy_slot import ASK, PolicySlot
from policies.serving.prometheus import CONTENT_TYPE, Metrics
from policies.serving.sessions import Sessions
from vla.core.types import Policy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits of one client. Times are in seconds."""

    clients: int = 64
    handshake_s: float = 5.0
    """To send the HTTP request."""
    message_s: float = 10.0
    """From an observation's first fragment to its last, and to take an answer."""
    idle_s: float = 3600.0
    """Without any observation."""
    ping_s: float = 20.0
    """A client that answers no ping for this long is dropped: its cable was pulled, or it drips one frame for ever."""


def check_access(host: str, api_key: str | None) -> None:
    """ValueError for an API key that no client could send, or for an address open to other machines without a key."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ValueError("api_key must be printable ASCII without spaces, and not empty")
    if api_key is None and not is_loopback(host):
        raise ValueError(
            f"host {host!r} lets other machines command this policy: set an api key (vla serve --api-key KEY) "
            "or bind 127.0.0.1 and tunnel"
        )


class PolicyServer:
    """Policies behind one websocket port. `run()` blocks, `serve_in_thread(server)` does not; each server runs once.

    policy      one policy (`layout` and `metadata` as `PolicySlot`'s), or several by name, {name: PolicySlot}. A client
                chooses by path, ws://HOST:PORT/NAME, or with the key "policy" in an observation; the first is the
                default.
    host, port  port 0 takes any free port; `server.port` says which. Another machine can reach the server only when
                `api_key` is set: clients then send `Authorization: Api-Key KEY`.
    tls         a certificate for wss://; without one, tunnel whatever leaves the machine
    max_batch   most observations of different clients in one forward pass; 1 for policies with a state of their own
    reload_s    how often folders are looked at for a newer checkpoint; None: only `reload()` and SIGHUP do

    Policies run on one worker thread; the event loop keeps answering pings meanwhile. The protocol has no reset
    message: a policy is reset when its only client connects, one that remembers by a key of an observation (Sessions).
    """

    def __init__(
        self,
        policy: Policy | Mapping[str, PolicySlot],
        *,
        layout: Layout | None = None,
        metadata: Mapping[str, Any] | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        limits: Limits = Limits(),
        max_batch: int = 16,
        reload_s: float | None = None,
    ) -> None:
        check_access(host, api_key)
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be in 0..65535, got {port}")
        if not isinstance(policy, Mapping):
            policy = {"default": PolicySlot(policy, layout=layout, metadata=metadata)}
        self._served = dict(policy)
        if not self._served:
            raise ValueError("a server needs at least one policy")
        # "localhost" may resolve to two addresses, on which port 0 would be two different ports.
        self.host = "127.0.0.1" if host == "localhost" else host
        self._port = port
        self._api_key, self._tls, self._limits, self._reload_s = api_key, tls, limits, reload_s
        self.metrics, self._batcher = Metrics(), Batcher(max_batch=max_batch)
        self._sessions = Sessions(self._batcher)
        self._connections: weakref.WeakSet[ServerConnection] = weakref.WeakSet()
        self._clients: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._reloading: asyncio.Event | None = None

    @property
    def port(self) -> int:
        """The port listened on (the real one, once running)."""
        return self._port

    @property
    def uri(self) -> str:
        """The address for a client on this machine; /NAME behind it chooses a policy."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self._tls else 'ws'}://{host}:{self.port}"

    def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until `stop()`, Ctrl-C or SIGTERM; clients are then told 1001 (going away). OSError: port taken."""
        asyncio.run(self._run(on_ready))

    def stop(self) -> None:
        """Ask `run()` to return, from any thread; a second call, or one after the end, does nothing."""
        self._signal(self._stopping)

    def reload(self) -> None:
        """Load every folder's checkpoint again, from any thread. Clients stay connected; what fails is logged."""
        self._signal(self._reloading)

    def _signal(self, event: asyncio.Event | None) -> None:
        if self._loop is not None and event is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: already stopped
                self._loop.call_soon_threadsafe(event.set)

    async def _run(self, on_ready: Callable[[], None] | None) -> None:
        self._loop, self._stopping, self._reloading = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        events = {signal.SIGINT: self._stopping, signal.SIGTERM: self._stopping}
        if hasattr(signal, "SIGHUP"):
            events[signal.SIGHUP] = self._reloading
        if threading.current_thread() is not threading.main_thread():
            events = {}
        for number, event in events.items():
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C arrives as KeyboardInterrupt
                self._loop.add_signal_handler(number, event.set)
        watcher = asyncio.ensure_future(self._watch())
        try:
            async with await self._listen() as server:
                self._port = server.sockets[0].getsockname()[1]
                if on_ready is not None:
                    on_ready()
                await self._stopping.wait()
                for number in events:  # leaving waits for the inference under way; a second Ctrl-C does not
                    with contextlib.suppress(NotImplementedError):
                        self._loop.remove_signal_handler(number)
                self._drop_handshakes()
        finally:
            watcher.cancel()
            self._batcher.close()

    def _connection(self, *args: Any, **options: Any) -> ServerConnection:
        connection = HTTPConnection(*args, **options)
        self._connections.add(connection)
        return connection

    def _drop_handshakes(self) -> None:
        """Cut connections that have not asked a whole question yet: half an HTTP request would delay the end."""
        for connection in list(self._connections):
            if connection.state is State.CONNECTING and getattr(connection, "transport", None) is not None:
                connection.transport.abort()

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
                create_connection=self._connection,
                open_timeout=self._limits.handshake_s,
                ping_interval=self._limits.ping_s,
                ping_timeout=self._limits.ping_s,
                close_timeout=2.0,
                ssl=self._tls,
            )
        except OSError as error:
            where, reason = f"{self.host}:{self._port}", wire.one_line(error.strerror or error)
            raise OSError(f"cannot listen on {where} ({reason}); choose another --port (0: any free)") from error

    def _gate(self, connection: ServerConnection, request: Request) -> Response | None:
        """Before the websocket handshake: health check, api key, metrics, whether there is such a policy, and room."""
        if (refusal := other_method(connection, request)) is not None:
            return refusal
        path = request.path.partition("?")[0].strip("/")
        if path == "healthz":
            return connection.respond(*self._batcher.health())
        if not self._authorised(request):
            self.metrics.count("connections_total", outcome="unauthorised")
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "send the header Authorization: Api-Key KEY\n")
        if path == "metrics":
            text = self.metrics.text(clients=self._clients.total(), waiting_requests=self._batcher.waiting)
            return plain(text, CONTENT_TYPE)
        if "websocket" not in request.headers.get("Upgrade", "").lower():
            return None  # the library's own answer: 426
        if path and path not in self._served:
            self.metrics.count("connections_total", outcome="unknown_policy")
            known = ", ".join(self._served)
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"no policy is called so; known: {known}\n")
        if self._clients.total() >= self._limits.clients:
            self.metrics.count("connections_total", outcome="full")
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE, f"all {self._limits.clients} places are taken\n"
            )
        return None

    def _authorised(self, request: Request) -> bool:
        if self._api_key is None:
            return True
        given = request.headers.get_all("Authorization")
        expected = f"Api-Key {self._api_key}".encode()
        return len(given) == 1 and hmac.compare_digest(given[0].encode("utf-8", "surrogateescape"), expected)

    async def _handle(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        name = connection.request.path.partition("?")[0].strip("/") or next(iter(self._served))
        served = self._served[name]
        self._clients[name] += 1
        self.metrics.count("connections_total", outcome="accepted")
        try:
            if self._clients[name] == 1 and not served.spec.episodic:
                await self._batcher.run(served.policy.reset)
            await connection.send(wire.pack(self._metadata(served)))
            previous_total_ms: float | None = None
            async for frame in self._messages(connection):
                start = time.perf_counter()
                answer = await self._answer(frame, name, previous_total_ms, connection)
                async with asyncio.timeout(self._limits.message_s):
                    await connection.send(answer)
                previous_total_ms = _ms_since(start)
                self.metrics.observe("request_seconds", previous_total_ms / 1e3)
        except ConnectionClosed:
            pass
        except TimeoutError:
            self.metrics.count("closed_total")
            await connection.close(1008, "too slow, or idle for too long")
        except Exception as error:
            _log.exception("the policy failed to reset")
            with contextlib.suppress(ConnectionClosed):
                await connection.send(wire.one_line(f"policy failed to reset: {type(error).__name__}: {error}"))
        finally:
            self._clients[name] -= 1
            await self._sessions.end(connection, self._served.values())

    def _metadata(self, served: PolicySlot) -> dict[str, Any]:
        return {**served.metadata, **({"policies": list(self._served)} if len(self._served) > 1 else {})}

    async def _messages(self, connection: ServerConnection) -> AsyncIterator[bytes | str]:
        """Whole messages until the client hangs up. TimeoutError: none came for too long, or one took too long.

        Pings do not see who drips a message in ever new fragments, answering pings between them.
        """
        while True:
            parts: list[Any] = []
            async with asyncio.timeout(self._limits.idle_s) as limit:
                try:
                    async for part in connection.recv_streaming():
                        if not parts:
                            limit.reschedule(asyncio.get_running_loop().time() + self._limits.message_s)
                        parts.append(part)
                except ConnectionClosed:
                    return
            yield parts[0] if len(parts) == 1 else type(parts[0])().join(parts)

    async def _answer(self, frame: bytes | str, name: str, previous_total_ms: float | None, client: Any) -> bytes | str:
        """The answer to one frame: bytes, or the text of an error. Never raises on what a client or a policy does."""
        start = time.perf_counter()
        try:
            if isinstance(frame, str):
                raise wire.WireError("expected a binary msgpack frame, got a text frame")
            self.metrics.count("received_bytes_total", len(frame))
            message = wire.unpack(frame)
            name = self._chosen(message, name)
            served = self._served[name]
            obs = await self._sessions.address(client, message, served.reader.read(message), served)
            if ASK in message:
                said = await self._batcher.ask(served, obs, message[ASK])
                self.metrics.count("requests_total", policy=name, outcome="asked")
                return wire.pack({"answer": asdict(said)})
            answer = await self._batcher.act(served, obs)
            self.metrics.observe("inference_seconds", answer.infer_ms / 1e3)
            self.metrics.observe("batch_size", answer.batch_size)
            # Clients like openpi's ActionChunkBroker index every array by the control step: times must be plain floats.
            server_timing = {"infer_ms": _ms_since(start)}
            if previous_total_ms is not None:
                server_timing["prev_total_ms"] = previous_total_ms
            timing = {"policy_timing": {"infer_ms": answer.infer_ms}, "server_timing": server_timing}
            told = served.told(answer.confidence, obs, message)
            reply = wire.pack({"actions": served.sent(answer.actions, message), **timing, **told})
            outcome = "ok"
        except ValueError as error:
            reply, outcome = wire.one_line(error), "refused"
        except Exception as error:
            _log.exception("the policy failed")
            reply, outcome = wire.one_line(f"policy failed: {type(error).__name__}: {error}"), "failed"
        self.metrics.count("requests_total", policy=name, outcome=outcome)
        return reply

    def _chosen(self, message: object, name: str) -> str:
        """The policy that an observation asks for, else the connection's."""
        if not isinstance(message, dict) or "policy" not in message:
            return name
        wanted = message["policy"]
        if not isinstance(wanted, str) or wanted not in self._served:
            if wanted == self._served[name].metadata.get("policy", ""):
                return name  # as the metadata call it, where that is not its name in the address
            raise ValueError(
                f"policy: expected one of {', '.join(self._served)}, got {wire.one_line(wanted, limit=80)!r}"
            )
        return wanted

    async def _watch(self) -> None:
        """Serve newer checkpoints as they appear, or when told to look."""
        assert self._reloading is not None
        said: dict[str, str] = {}
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._reload_s):
                    await self._reloading.wait()
            asked = self._reloading.is_set()
            self._reloading.clear()
            for name, served in self._served.items():
                if lost := served.lost():
                    _log.error("policy '%s' is served on as it was loaded: %s", name, lost)
                if served.folder is None or not (asked or served.changed()):
                    continue
                try:
                    await asyncio.to_thread(served.refresh)
                    outcome, problem = "ok", ""
                    _log.info("policy '%s' was loaded again from %s", name, served.folder)
                except TypeError as error:
                    outcome, problem = "refused", wire.one_line(error)
                except Exception as error:  # perhaps half copied: the next look may find it whole
                    outcome, problem = "failed", wire.one_line(error)
                if problem and said.get(name) != problem:
                    _log.error("policy '%s' stays as it was: %s", name, problem)
                said[name] = problem
                self.metrics.count("reloads_total", policy=name, outcome=outcome)


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


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
