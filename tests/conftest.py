"""Every test runs with: no display, one thread per worker, waiting threads that sleep, and no other machine."""

from __future__ import annotations

import gc
import os
import socket
import sys

import pytest

from vla.core.waiting import limit_spinning

limit_spinning()
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

_LOCAL = ("::1", "localhost")


def pytest_collection_finish() -> None:
    """Leave out of every search for garbage what the tests' modules have imported: two million objects that stay. A
    control loop begins with such a search, and each would take a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Tests must pass without a network: connecting to another machine fails at once instead of sometimes."""
    connect = socket.socket.connect

    def local_only(sock, address):
        far = sock.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL
        if far and not address[0].startswith("127."):
            raise AssertionError(f"a test connected to {address}: tests are offline")
        return connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
