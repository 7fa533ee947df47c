"""Round-trip latency of three servers of the same policy, each in a process of its own.

    .venv/bin/python -m bascule.bench.other_servers [--requests 300] [--json FILE]

- ours: `vla serve` and its client;
- LeRobot's asynchronous server (gRPC; install grpcio beside it): its `PolicyServer` unchanged, but with our policy
  type registered, and without its minimum response time (`inference_latency`, 33 ms by default). The client calls
  its two procedures one after the other, as its robot client does;
- the way openpi serves: one frame in, the policy called in the server's loop, one frame out, no limits and no batches.
  Written here after its protocol, since openpi itself is in no package index.

The policy has random weights; two images of 224 px; one thread each; the servers are queried in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vla.core.config import save_json

CAMERAS, PIXELS, WARM_UP = ("front", "wrist"), 224, 20


def serve_lerobot(folder: str, port: int) -> None:
    """Run LeRobot's `PolicyServer` on 127.0.0.1:`port`; the client names the policy's folder."""
    import lerobot_policy_bascule  # noqa: F401 (registers the policy type)
    from lerobot.async_inference import policy_server
    from lerobot.async_inference.configs import PolicyServerConfig

    policy_server.SUPPORTED_POLICIES.append("bascule")
    print("ready", flush=True)
    policy_server.serve.__wrapped__(PolicyServerConfig(host="127.0.0.1", port=port, inference_latency=0.0))


def serve_plainly(folder: str, port: int) -> None:
    """Serve the policy in `folder` as openpi does: one frame in, one forward pass, one frame out, without batching."""
    from websockets.asyncio.server import serve

    from policies.serving.wire import pack, unpack
    from vla.core.types import Observation
    from vla.model.policy import VLAPolicy

    policy = VLAPolicy.load(folder)

    async def answer(socket: Any) -> None:
        await socket.send(pack({}))
        async for frame in socket:
            sent = unpack(frame)
            images = {camera: sent["images"][camera][None] for camera in CAMERAS}
            actions = policy.act(Observation(images, sent["state"][None], [sent["prompt"]]))[0]
            await socket.send(pack({"actions": actions}))

    async def run() -> None:
        async with serve(answer, "127.0.0.1", port, compression=None, max_size=None) as server:
            print("ready", flush=True)
            await server.serve_forever()

    asyncio.run(run())


SERVERS = {"lerobot": serve_lerobot, "plain": serve_plainly}


@contextmanager
def process(kind: str, folder: Path, port: int, cwd: Path) -> Iterator[None]:
    """Run a server of this kind in a process of its own, with one thread, until the context ends."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "bascule.bench.other_servers", "--serve", kind, str(folder), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env, cwd=cwd)
    try:
        assert server.stdout is not None and server.stdout.readline().strip() == "ready", f"{kind} did not start"
        yield
    finally:
        server.terminate()
        server.wait(timeout=20)


def ask_lerobot(folder: Path, port: int, message: dict[str, Any]) -> Callable[[], Any]:
    """Connect to LeRobot's server and set up its policy. Returns a function that makes one request with `message`."""
    import grpc
    from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
    from lerobot.transport import services_pb2, services_pb2_grpc
    from lerobot.transport.utils import grpc_channel_options, send_bytes_in_chunks

    stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(f"127.0.0.1:{port}", grpc_channel_options()))
    stub.Ready(services_pb2.Empty(), wait_for_ready=True)
    names = [f"joint_{axis}" for axis in range(len(message["state"]))]
    features: dict[str, Any] = {"observation.state": {"dtype": "float32", "shape": (len(names),), "names": names}}
    for camera in CAMERAS:
        shape = (PIXELS, PIXELS, 3)
        features[f"observation.images.{camera}"] = {"dtype": "image", "shape": shape, "names": ["h", "w", "c"]}
    config = RemotePolicyConfig("bascule", str(folder), features, actions_per_chunk=8)
    stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(config)))
    raw = {**dict(zip(names, map(float, message["state"]), strict=True)), **message["images"]}
    raw["task"] = message["prompt"]
    asked = 0

    def ask() -> Any:
        nonlocal asked
        asked += 1
        data = pickle.dumps(TimedObservation(time.time(), asked, raw, must_go=True))
        stub.SendObservations(send_bytes_in_chunks(data, services_pb2.Observation))
        actions = stub.GetActions(services_pb2.Empty()).data
        assert actions, "LeRobot's server answered with nothing"
        return pickle.loads(actions)

    return ask


def measure(requests: int) -> dict[str, Any]:
    """Round-trip times {server: {"p50_ms", "p99_ms"}} over `requests` requests to each server, after a warm-up."""
    import torch

    from bascule.bench.measuring import default_policy, timed_in_turns
    from bascule.bench.serving import message as make_message
    from bascule.bench.serving import serving
    from policies.lerobot.exchange import to_lerobot
    from policies.serving.client import PolicyClient
    from vla.core.types import Observation

    torch.set_num_threads(1)
    policy, sent = default_policy(), make_message(PIXELS)
    obs = Observation({c: sent["images"][c][None] for c in CAMERAS}, sent["state"][None], [sent["prompt"]])
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        policy.vla.save(work / "ours")
        to_lerobot(work / "ours", work / "theirs")
        stack.enter_context(process("lerobot", work / "theirs", 18080, work))
        stack.enter_context(process("plain", work / "ours", 18081, work))
        ours = stack.enter_context(serving(str(work / "ours")))
        client = stack.enter_context(PolicyClient(ours.uri, timeout_s=30))
        plain = stack.enter_context(PolicyClient("ws://127.0.0.1:18081", timeout_s=30))
        asks: dict[str, Callable[[], Any]] = {
            "forward pass alone": lambda: policy.act(obs),
            "ours": lambda: client.infer(sent),
            "LeRobot's gRPC server": ask_lerobot(work / "theirs", 18080, sent),
            "openpi's way": lambda: plain.infer(sent),
        }
        times = timed_in_turns(asks, requests, warm_up=WARM_UP)
    return {name: {f"p{p}_ms": round(float(np.percentile(t, p)), 2) for p in (50, 99)} for name, t in times.items()}


def main() -> None:
    """Measure and print a row for each server; with --serve, run one of the servers instead."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=3, metavar=("KIND", "FOLDER", "PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        kind, folder, port = args.serve
        SERVERS[kind](folder, int(port))
        return
    results = measure(args.requests)
    base = results["forward pass alone"]["p50_ms"]
    for name, row in results.items():
        print(f"{name:24} p50 {row['p50_ms']:7.2f} ms  p99 {row['p99_ms']:7.2f} ms  {row['p50_ms'] / base:.2f}x")
    if args.json:
        save_json(args.json, results)


if __name__ == "__main__":
    main()
