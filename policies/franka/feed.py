"""Pictures over a socket: what a test cell, or a camera on another machine, shows to whoever asks for it.

A client sends one line of JSON, {"do": "camera", "name": NAME}. It is answered by a line, {"height": H, "width": W} or
{"error": TEXT}, and then by pictures, each 8 bytes of time (little-endian double, s) and H * W * 3 bytes of RGB.
{"do": "cameras"} is answered by {NAME: [H, W], ..}.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import threading
import time
from typing import Any

import numpy as np
from lerobot.cameras.camera import Camera
from numpy.typing import NDArray

from policies.franka.config_franka import FeedCameraConfig

TIME = struct.Struct("<d")
_ANSWER_S = 5.0


def address_of(text: str) -> tuple[str, int]:
    """("127.0.0.1", 7000) of "127.0.0.1:7000". ValueError for another form."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"an address is HOST:PORT, got '{text}'")
    return host, int(port)


def ask(address: str, request: dict[str, Any], timeout_s: float = _ANSWER_S) -> dict[str, Any]:
    """The answer to one request. ConnectionError if there is none, ValueError for one that says "error"."""
    with _connected(address, timeout_s) as link:
        return _asked(link, address, request)


def cameras_of(address: str) -> dict[str, FeedCameraConfig]:
    """All cameras of a feed by name. ConnectionError if it does not answer."""
    sizes = ask(address, {"do": "cameras"})
    return {
        name: FeedCameraConfig(address=address, name=name, height=int(size[0]), width=int(size[1]))
        for name, size in sizes.items()
    }


class FeedCamera(Camera):
    """One camera of a feed as LeRobot's `Camera`: a thread keeps the latest picture."""

    def __init__(self, config: FeedCameraConfig) -> None:
        super().__init__(config)
        address_of(config.address)
        self.config = config
        self._link: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._latest: tuple[NDArray[np.uint8], float] | None = None
        self._unread = False
        self._new = threading.Condition()

    @staticmethod
    def find_cameras() -> list[dict[str, Any]]:
        """None: a feed is known by its address."""
        return []

    @property
    def is_connected(self) -> bool:
        """True while pictures may come."""
        return self._link is not None and self._thread is not None and self._thread.is_alive()

    def connect(self, warmup: bool = True) -> None:
        """Ask for the camera; `warmup`: wait for its first picture. ConnectionError without one, ValueError for a
        camera that is not there or shows pictures of another size than configured."""
        address, name = self.config.address, self.config.name or ""
        link = _connected(address, _ANSWER_S)
        try:
            size = _asked(link, address, {"do": "camera", "name": name})
            shape = (int(size["height"]), int(size["width"]), 3)
            if shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"camera '{name}' of {address} shows {shape[1]}x{shape[0]} pixels, not {self.width}x{self.height}: "
                    "give its width and height"
                )
        except BaseException:
            link.close()
            raise
        self._link, self._latest, self._unread = link, None, False
        self._thread = threading.Thread(target=self._receive, args=(link, shape), name=f"camera {name}", daemon=True)
        self._thread.start()
        if warmup:
            try:
                self.async_read(1000 * _ANSWER_S)
            except TimeoutError as error:
                self.disconnect()
                raise ConnectionError(str(error)) from error

    def read(self) -> NDArray[np.uint8]:
        """The next picture (H, W, 3). TimeoutError without one."""
        self._unread = False
        return self.async_read(1000 * _ANSWER_S)

    def async_read(self, timeout_ms: float = 200) -> NDArray[np.uint8]:
        """A picture that was not read before, within so many ms. TimeoutError without one."""
        until = time.monotonic() + timeout_ms / 1000
        with self._new:
            while not self._unread and self.is_connected and (left := until - time.monotonic()) > 0:
                self._new.wait(left)
            if not self._unread or self._latest is None:
                raise TimeoutError(f"camera '{self.config.name}' of {self.config.address} shows nothing")
            self._unread = False
            return self._latest[0]

    def read_latest(self, max_age_ms: int = 500) -> NDArray[np.uint8]:
        """The latest picture, read before or not. TimeoutError for one that came longer ago than `max_age_ms`."""
        with self._new:
            picture, came_s = self._latest or (None, -math.inf)
        if picture is None or 1000 * (time.monotonic() - came_s) > max_age_ms:
            raise TimeoutError(f"camera '{self.config.name}' of {self.config.address} shows nothing new")
        return picture

    def disconnect(self) -> None:
        """Let the feed go. May be called twice."""
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        if self._thread is not None:
            self._thread.join(timeout=1)

    def _receive(self, link: socket.socket, shape: tuple[int, int, int]) -> None:
        length = TIME.size + math.prod(shape)
        with contextlib.suppress(OSError, ConnectionError):
            link.settimeout(None)
            while True:
                data = _exactly(link, length)
                picture = np.frombuffer(data, np.uint8, offset=TIME.size).reshape(shape)
                with self._new:
                    self._latest, self._unread = (picture, time.monotonic()), True
                    self._new.notify_all()
        with self._new:
            self._new.notify_all()


def _connected(address: str, timeout_s: float) -> socket.socket:
    try:
        return socket.create_connection(address_of(address), timeout=timeout_s)
    except OSError as error:
        raise ConnectionError(f"nothing answers at {address}: {error.strerror or error}") from error


def _asked(link: socket.socket, address: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        link.sendall(json.dumps(request).encode() + b"\n")
        line = bytearray()
        while not line.endswith(b"\n"):  # a byte at a time: what comes behind it is pictures
            line += _exactly(link, 1)
    except OSError as error:
        raise ConnectionError(f"{address} does not answer: {error}") from error
    answer = json.loads(line)
    if "error" in answer:
        raise ValueError(f"{address}: {answer['error']}")
    return answer


def _exactly(link: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = link.recv(count - len(data))
        if not part:
            raise ConnectionError("it ended the connection")
        data += part
    return bytes(data)
