"""The cell's port for everybody but the arm's controller: pictures to those who look, answers to the operator."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.franka.feed import TIME

_LONGEST_LINE = 4096
_IMPATIENT_S = 5.0


class Windows:
    """A server with a thread for each client. `show` never waits for one: a slow client misses pictures."""

    def __init__(
        self,
        host: str,
        port: int,
        cameras: Sequence[str],
        image_size: int,
        answer: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        """`answer` is asked for everything but pictures. OSError for a port that is taken."""
        self._cameras, self._size, self._answer = tuple(cameras), image_size, answer
        self._latest: tuple[NDArray[np.uint8], float] | None = None
        self._shown = 0
        self._new = threading.Condition()
        self._closed = False
        self.watched = 0
        """Clients that are shown pictures."""
        self._socket = socket.create_server((host, port))
        self.address = "{}:{}".format(*self._socket.getsockname()[:2])
        threading.Thread(target=self._accept, name="windows", daemon=True).start()

    def show(self, images_VHWC: NDArray[np.uint8], at_s: float) -> None:
        """The pictures of all cameras, which must not be written to any more."""
        with self._new:
            self._latest, self._shown = (images_VHWC, at_s), self._shown + 1
            self._new.notify_all()

    def close(self) -> None:
        """Let every client go."""
        with self._new:
            self._closed = True
            self._new.notify_all()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # else the thread that waits for clients keeps it open
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError, ValueError):
            link.settimeout(_IMPATIENT_S)
            request = json.loads(_line(link))
            if not isinstance(request, dict):
                raise ValueError("a request is a JSON object")
            if request.get("do") == "camera":
                self._stream(link, request.get("name"))
            elif request.get("do") == "cameras":
                _say(link, dict.fromkeys(self._cameras, [self._size, self._size]))
            else:
                _say(link, self._answer(request))

    def _stream(self, link: socket.socket, name: Any) -> None:
        if name not in self._cameras:
            _say(link, {"error": f"there is no camera '{name}': {', '.join(self._cameras)}"})
            return
        _say(link, {"height": self._size, "width": self._size})
        view, seen = self._cameras.index(name), -1
        self.watched += 1
        try:
            while True:
                with self._new:
                    while (self._latest is None or seen == self._shown) and not self._closed:
                        self._new.wait()
                    if self._closed or self._latest is None:
                        return
                    (images, at_s), seen = self._latest, self._shown
                link.sendall(TIME.pack(at_s) + images[view].tobytes())
        finally:
            self.watched -= 1


def _say(link: socket.socket, answer: dict[str, Any]) -> None:
    link.sendall(json.dumps(answer).encode() + b"\n")


def _line(link: socket.socket) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        part = link.recv(1)
        if not part or len(line) > _LONGEST_LINE:
            raise ValueError("a request is one short line")
        line += part
    return bytes(line)
