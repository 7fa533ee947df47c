"""`vla bench model`: the bridge against the released Pro block, and the whole model against a naive call."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bascule.experiments.ablations import lean_bridge
from vla.backbones.features import Features
from vla.model.bridge import Bridge
from vla.model.config import BridgeConfig, FaithfulConfig
from vla.model.released_bridge import FaithfulBridge

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


def head_rows(row: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed and memory of the head alone, each against the released Pro block in the same run."""
    arms: dict[str, Callable[[], nn.Module]] = {
        "released Pro": released_pro,
        "lean bridge": lambda: ours(lean_bridge()),
        "lean bridge, every 2nd layer": lambda: ours(lean_bridge(taps="every:2")),
        "default bridge": lambda: ours(BridgeConfig(width=WIDTH, heads=8, point_stem=False)),
    }
    rows, size = [], f"{LAYERS} layers, width {WIDTH}, {RAW} raw tokens, {QUERIES} queries, chunk {CHUNK}, fp32"
    seconds: dict[str, float] = {}
    for name, make in arms.items():
        seconds[name] = step_seconds(make(), HEAD_BATCH, 2)
        rows.append(
            row(
                f"head forward+backward, {name}",
                HEAD_BATCH / seconds[name],
                "samples/s",
                config=f"{size}, batch {HEAD_BATCH}, 1 thread, best of 2",
                baseline=None if name == "released Pro" else "released Pro",
                base=HEAD_BATCH / seconds["released Pro"],
            )
        )
    for batch in (HEAD_BATCH, TRAINING_BATCH):
        base = training_bytes(released_pro, batch)
        for name, make in arms.items():
            rows.append(
                row(
                    f"head training memory, {name}, batch {batch}",
                    training_bytes(make, batch) / 2**20,
                    "MiB",
                    config=f"{size}; parameters + gradients + tensors kept for backward",
                    baseline=None if name == "released Pro" else "released Pro",
                    base=base / 2**20,
                )
            )
    return rows


def call_rows(
    row: Callable[..., dict[str, Any]], policy: Any, obs: Any, others: dict[str, Any]
) -> list[dict[str, Any]]:
    """Decisions/s at batch 1, taken in turns so that a busy machine slows all alike; medians.

    `others`: by name, more policies that decide the same.
    """
    processor = policy.vla.processor

    def naive() -> None:
        processor._tokens.clear()
        inp = processor.prepare(obs)
        action = policy.vla.act(policy.vla.encode(inp), inp.proprio_BP)
        processor.unnormalise_action(action.detach().numpy())

    arms = {"naive": naive, "policy": lambda: policy.act(obs)}
    arms |= {name: partial(other.act, obs) for name, other in others.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(63):
        for name, call in arms.items():
            begin = time.perf_counter()
            call()
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - begin))
    middle = {name: sorted(each)[len(each) // 2] for name, each in times.items()}
    config = (
        "embedded backbone, 2 cameras of 84 px, batch 1, fp32, 1 thread, median of 60; naive: tokenised anew, text "
    )
    config += "padded to its limit, gradients recorded"
    return [
        row(
            f"one decision, {name}",
            1e3 / value,
            "calls/s",
            config=config,
            baseline=None if name == "naive" else "naive",
            base=1e3 / middle["naive"],
        )
        for name, value in middle.items()
    ]
