"""`vla bench model`: the bridge against the released Pro block, and the whole model against a naive call."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bascule.bench.measuring import EMBEDDED, Row, best_rate, default_policy, random_observation, row, timed_in_turns
from bascule.experiments.ablations import lean_bridge
from policies.export.aot_inductor import compiler
from policies.export.exported_policy import ExportedPolicy
from policies.export.exporter import export
from vla.backbones.features import Features
from vla.core.types import Observation, Policy
from vla.model.bridge import Bridge
from vla.model.config import BridgeConfig, FaithfulConfig
from vla.model.policy import VLAPolicy
from vla.model.released.bridge import FaithfulBridge

WIDTH, LAYERS, RAW, QUERIES, CHUNK, PROPRIO = 896, 24, 512, 64, 8, 8
"""The released policy's size (reference: Qwen2.5-0.5B, two views of 256 patches)."""
HEAD_BATCH, TRAINING_BATCH = 2, 16


def inputs(batch: int) -> tuple[Features, Tensor]:
    """Random conditions of the released size, and proprio."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(batch, LAYERS, RAW, WIDTH, generator=generator)
    queries = torch.randn(batch, LAYERS, QUERIES, WIDTH, generator=generator)
    return Features(raw, None, queries, None, torch.zeros(RAW, 3)), torch.zeros(batch, PROPRIO)


def ours(config: BridgeConfig) -> Bridge:
    """Bascule's bridge for the released feature width, layers and proprio size."""
    return Bridge(config, chunk_size=CHUNK, feature_width=WIDTH, num_layers=LAYERS, proprio_dim=PROPRIO)


def released_pro() -> FaithfulBridge:
    """Without its dead FiLM weights, which would only help the comparison."""
    config = FaithfulConfig("pro", width=WIDTH, num_blocks=LAYERS)
    return FaithfulBridge(config, chunk_size=CHUNK, feature_width=WIDTH, num_layers=LAYERS, proprio_dim=PROPRIO).train()


def training_bytes(make: Callable[[], nn.Module], batch: int) -> int:
    """Bytes that one training step needs at the end of its forward pass: parameters, their gradients, and every storage
    that autograd keeps for the backward pass, counted once; the inputs, which the backbone owns, are left out.

    Counted on fake tensors, so nothing is computed. Short-lived buffers within an operation are not counted.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        module = make()
        features, proprio = (Features(
            torch.empty(batch, LAYERS, RAW, WIDTH), None, torch.empty(batch, LAYERS, QUERIES, WIDTH), None,
            torch.empty(RAW, 3),
        ), torch.empty(batch, PROPRIO))  # fmt: skip
        given = [features.raw_BLND, features.queries_BLQD, features.coords_NE, proprio]
        known = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers(), *given]}
        kept: dict[int, tuple[int, Tensor]] = {}  # the tensor keeps its storage, and so its address, alive

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(features, proprio)
        weights = sum(parameter.nbytes for parameter in module.parameters())
        return 2 * weights + sum(size for size, _ in kept.values())


def step_seconds(module: nn.Module, batch: int, repeats: int) -> float:
    """Best of `repeats` forward and backward passes."""
    features, proprio = inputs(batch)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        module(features, proprio).square().sum().backward()
        best = min(best, time.perf_counter() - begin)
        module.zero_grad(set_to_none=False)
    return best


def head_rows() -> list[Row]:
    """Speed and memory of the head alone, each against the released Pro block in the same run."""
    released = "released Pro"
    arms: dict[str, Callable[[], nn.Module]] = {
        released: released_pro,
        "lean bridge": lambda: ours(lean_bridge()),
        "lean bridge, every 2nd layer": lambda: ours(lean_bridge(taps="every:2")),
        "default bridge": lambda: ours(BridgeConfig(width=WIDTH, heads=8, point_stem=False)),
    }
    size = f"{LAYERS} layers, width {WIDTH}, {RAW} raw tokens, {QUERIES} queries, chunk {CHUNK}, fp32"
    speed = {name: HEAD_BATCH / step_seconds(make(), HEAD_BATCH, 2) for name, make in arms.items()}
    config = f"{size}, batch {HEAD_BATCH}, 1 thread, best of 2"
    rows = _beside(released, speed, "head forward+backward, {}", "samples/s", config)
    for batch in (HEAD_BATCH, TRAINING_BATCH):
        memory = {name: training_bytes(make, batch) / 2**20 for name, make in arms.items()}
        config = f"{size}; parameters + gradients + tensors kept for backward"
        rows += _beside(released, memory, f"head training memory, {{}}, batch {batch}", "MiB", config)
    return rows


def call_rows(policy: VLAPolicy, obs: Observation, others: Mapping[str, Policy]) -> list[Row]:
    """Median decisions/s at batch 1. `others`: by name, more policies that decide the same."""
    processor = policy.vla.processor

    def naive() -> None:
        processor._tokens.clear()
        inp = processor.prepare(obs)
        action = policy.vla.act(policy.vla.encode(inp), inp.proprio_BP)
        processor.unnormalise_action(action.detach().numpy())

    arms = {"naive": naive, "policy": lambda: policy.act(obs)}
    arms |= {name: partial(other.act, obs) for name, other in others.items()}
    times = timed_in_turns(arms, 60, warm_up=3)
    rates = {name: 1e3 / sorted(each)[len(each) // 2] for name, each in times.items()}
    config = (
        f"{EMBEDDED}, batch 1, fp32, 1 thread, median of 60; naive: tokenised anew, text "
        "padded to its limit, gradients recorded"
    )
    return _beside("naive", rates, "one decision, {}", "calls/s", config)


def _beside(baseline: str, values: Mapping[str, float], name: str, unit: str, config: str) -> list[Row]:
    """A row for each arm, with its ratio to the arm `baseline`; `name` has a place for the arm's."""
    return [
        row(name.format(arm), value, unit, config, None if arm == baseline else baseline, values[baseline])
        for arm, value in values.items()
    ]


def bench() -> list[Row]:
    """The default policy on this machine's CPU: decisions/s at batch 1 and 24 (a decision is a chunk of 8 actions); one
    decision against a naive call; and the bridge against the released Pro block at the released size. About two
    minutes."""
    torch.set_num_threads(1)
    policy = default_policy()
    rates = {}
    for batch in (1, 24):
        obs = random_observation(batch)

        def once(obs: Observation = obs, batch: int = batch) -> int:
            policy.act(obs)
            return batch

        once()
        rates[batch] = best_rate(once)
    config = f"{EMBEDDED}, fp32, 1 thread"
    with tempfile.TemporaryDirectory() as folder:
        policy.vla.save(f"{folder}/checkpoint")
        exported = {}
        for name, format in {"ONNX": "onnx", **({"AOTInductor": "aoti"} if compiler() else {})}.items():
            export(f"{folder}/checkpoint", f"{folder}/{format}", format=format)
            exported[f"exported policy ({name})"] = ExportedPolicy.load(f"{folder}/{format}", threads=1)
    return [
        *call_rows(policy, random_observation(1), exported),
        *head_rows(),
        row("replans, batch 1", rates[1], "replans/s", config),
        row("actions, batch 1", 8 * rates[1], "actions/s", config),
        row("replans, batch 24", rates[24], "replans/s", config, "batch 1", rates[1]),
    ]
