"""A connection to a rosbridge server: operations out, messages of subscribed topics in.

rosbridge v2 protocol: JSON objects with a field `op`, and CBOR for subscriptions that ask for it (RFC 8949, typed
arrays as in RFC 8746), https://github.com/RobotWebTools/rosbridge_suite/blob/ros2/ROSBRIDGE_PROTOCOL.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

COMPRESSION = "cbor" if importlib.util.find_spec("cbor2") else "none"
"""How pictures are asked for: CBOR holds them as bytes, JSON as base64, a third more."""
_TYPED_ARRAYS = {
    64: "u1", 69: "<u2", 70: "<u4", 71: "<u8", 72: "i1", 77: "<i2", 78: "<i4", 79: "<i8", 84: "<f2", 85: "<f4",
    86: "<f8", 65: ">u2", 66: ">u4", 67: ">u8", 73: ">i2", 74: ">i4", 75: ">i8", 80: ">f2", 81: ">f4", 82: ">f8",
}  # fmt: skip
"""Tags of RFC 8746."""

Heard = Callable[[str, Mapping[str, Any], float], None]
"""Takes topic, message and when it came (`time.monotonic`)."""


class Link:
    """An open connection. A thread receives; `send` may be called from another one."""

    def __init__(self, url: str, heard: Heard, *, open_s: float) -> None:
        """ConnectionError if nothing answers within `open_s` seconds."""
        self.url, self.lost, self.complaint = url, "", ""
        """`lost`: why the connection ended, "" while it stands. `complaint`: the last error that the server told."""
        self._heard = heard
        self._open = contextlib.ExitStack()
        try:
            # no limit: a picture of 4K in base64 has 33 MB
            opening = connect(url, open_timeout=open_s, max_size=None, compression=None)
            self._socket: ClientConnection = self._open.enter_context(opening)
        except (OSError, TimeoutError, WebSocketException) as error:
            said = str(error) or type(error).__name__
            raise ConnectionError(f"no rosbridge answers at {url}: {said}") from error
        self._thread = threading.Thread(target=self._receive, name="rosbridge", daemon=True)
        self._thread.start()

    def send(self, op: str, **fields: Any) -> None:
        """Send one operation. ConnectionError if the connection has ended."""
        if self.lost:
            raise ConnectionError(f"rosbridge at {self.url}: {self.lost}")
        try:
            self._socket.send(json.dumps({"op": op, **fields}, allow_nan=False))
        except (OSError, WebSocketException) as error:
            self.lost = f"the connection ended: {error}"
            raise ConnectionError(f"rosbridge at {self.url}: {self.lost}") from error

    def close(self) -> None:
        """End the connection. May be called twice."""
        with contextlib.suppress(OSError, WebSocketException):
            self._open.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=1)

    def _receive(self) -> None:
        try:
            while True:
                self._take(self._socket.recv())
        except (OSError, WebSocketException) as error:
            self.lost = self.lost or f"the connection ended: {error}"
        except Exception as error:  # a server that speaks otherwise
            self.lost = f"it sent what is not understood: {type(error).__name__}: {error}"

    def _take(self, frame: str | bytes) -> None:
        came_s = time.monotonic()
        message = json.loads(frame) if isinstance(frame, str) else _of_cbor(frame)
        match message.get("op"):
            case "publish":
                self._heard(message["topic"], message["msg"], came_s)
            case "status" if message.get("level") == "error":
                self.complaint = " ".join(str(message.get("msg")).split())


def _of_cbor(data: bytes) -> Any:
    import cbor2

    def array(decoder: Any, tag: Any) -> Any:
        return np.frombuffer(tag.value, _TYPED_ARRAYS[tag.tag]) if tag.tag in _TYPED_ARRAYS else tag.value

    return cbor2.loads(data, tag_hook=array)
