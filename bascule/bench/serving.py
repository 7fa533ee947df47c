"""`vla bench serve`: round-trip latency against the forward pass alone, and a load test with many clients."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bascule.bench.measuring import EMBEDDED, Row, default_policy, row
from vla.model.config import DEFAULT_BACKBONE, DEFAULT_PIXELS
from vla.runtime.machine import resident_bytes

if TYPE_CHECKING:
    from vla.model.policy import VLAPolicy

PIXELS = 224
_REQUESTS = 300
_WARM_UP = 20


@dataclass
class Server:
    """`vla serve` as its own process."""

    process: subprocess.Popen[str]
    uri: str

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self.process.pid


@contextmanager
def serving(folder: str, *options: str) -> Iterator[Server]:
    """A server of a checkpoint folder on any free port, with one thread for its policy."""
    command = [sys.executable, "-m", "bascule.main", "serve", folder, "--port", "0", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " at ws" in line), None)
        if line is None:
            raise RuntimeError("the server ended before it listened")
        yield Server(process, line.split(" at ")[1].split()[0])
    finally:
        process.terminate()
        process.wait(timeout=20)
        if process.stdout is not None:
            process.stdout.close()


def message(pixels: int, seed: int = 0) -> dict[str, Any]:
    """An observation as a client sends it."""
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8) for camera in ("front", "wrist")}
    return {"images": images, "state": rng.normal(size=8).astype(np.float32), "prompt": "pick up the red cube"}


def bench(*, clients: int | None = None, seconds: float = 20.0) -> list[Row]:
    """Round trips through server and client on loopback, against the forward pass alone in the same run; with
    `clients`, a load test with that many clients for `seconds` instead."""
    import torch

    torch.set_num_threads(1)
    policy = default_policy()
    if clients is not None:
        return load(policy, clients=clients, seconds=seconds)
    return [*round_trips(policy), import_time()]


def round_trips(policy: VLAPolicy) -> list[Row]:
    """The bare decision and the served one, in turns. What a round trip adds is counted for each request by itself: the
    wait at the client less the forward pass that the server reports for it."""
    from policies.serving.client import PolicyClient
    from vla.core.types import Observation

    sent = message(PIXELS)
    images = {camera: image[None] for camera, image in sent["images"].items()}
    obs = Observation(images, sent["state"][None], [sent["prompt"]])
    times: dict[str, list[float]] = {"bare forward pass": [], "served": [], "added by serving": []}
    with tempfile.TemporaryDirectory() as folder:
        policy.vla.save(folder)
        with serving(folder) as server, PolicyClient(server.uri, timeout_s=30) as client:
            for turn in range(_REQUESTS + _WARM_UP):
                begin = time.perf_counter()
                policy.act(obs)
                middle = time.perf_counter()
                answer = client.infer(sent)
                end = time.perf_counter()
                if turn >= _WARM_UP:
                    served = 1e3 * (end - middle)
                    times["bare forward pass"].append(1e3 * (middle - begin))
                    times["served"].append(served)
                    times["added by serving"].append(served - answer["policy_timing"]["infer_ms"])
    pictures = f"backbone {DEFAULT_BACKBONE}, 2 images of {PIXELS} px"
    config = f"{pictures}, loopback, own process, 1 thread each, {_REQUESTS} in turns"
    return [
        row(
            f"{name}, p{percentile}",
            float(np.percentile(each, percentile)),
            "ms",
            config=config,
            baseline=None if name == "bare forward pass" else "bare forward pass",
            base=float(np.percentile(times["bare forward pass"], percentile)),
        )
        for name, each in times.items()
        for percentile in (50, 99)
    ]


def import_time() -> Row:
    """Best of five fresh processes, less what Python and numpy take by themselves."""

    def seconds(code: str) -> float:
        best = float("inf")
        for _ in range(5):
            timed = f"import time, numpy; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
            done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
            best = min(best, float(done.stdout))
        return best

    value = 1e3 * seconds("import policies.serving.client")
    return row("import of the client", value, "ms", config="after numpy, best of 5 processes")


@dataclass
class _Load:
    """Latencies in ms and errors, as the clients of a load test measured them."""

    waits_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def load(policy: VLAPolicy, *, clients: int, seconds: float) -> list[Row]:
    """Load test: `clients` clients send requests back to back; latency, errors and growth of the server's memory."""
    from policies.serving.client import PolicyClient

    seen, stop = _Load(), threading.Event()

    def drive(uri: str, index: int) -> None:
        sent = message(DEFAULT_PIXELS, seed=index)
        try:
            with PolicyClient(uri, timeout_s=60) as client:
                while not stop.is_set():
                    begin = time.perf_counter()
                    answer = client.infer(sent)
                    seen.waits_ms.append(1e3 * (time.perf_counter() - begin))
                    if not np.isfinite(answer["actions"]).all():
                        seen.errors.append("actions that are not finite")
        except Exception as error:
            seen.errors.append(f"{type(error).__name__}: {error}")

    memory: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        policy.vla.save(folder)
        with serving(folder, "--max-clients", str(clients)) as server:
            threads = [threading.Thread(target=drive, args=(server.uri, i), daemon=True) for i in range(clients)]
            for thread in threads:
                thread.start()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(min(1.0, seconds / 20))
                memory.append(resident_bytes(server.pid))
            stop.set()
            for thread in threads:
                thread.join(60)
    if not seen.waits_ms:
        raise RuntimeError(f"no request was answered; first error: {(seen.errors or ['none'])[0]}")
    tenth = max(1, len(memory) // 10)
    before, after = np.mean(memory[tenth : 2 * tenth]), np.mean(memory[-tenth:])
    config = f"{clients} clients for {seconds:g} s, {EMBEDDED}, as fast as they are answered"
    if seen.errors:
        config += f"; first error: {seen.errors[0][:120]}"
    return [
        row("requests", len(seen.waits_ms) / seconds, "requests/s", config=config),
        row("errors", float(len(seen.errors)), "errors", config=config),
        row("wait, p50", float(np.percentile(seen.waits_ms, 50)), "ms", config=config),
        row("wait, p99", float(np.percentile(seen.waits_ms, 99)), "ms", config=config),
        row(
            "server memory at the end",
            float(after) / 2**20,
            "MiB",
            config=f"{config}; beside its second tenth",
            baseline="second tenth",
            base=float(before) / 2**20,
        ),
    ]
