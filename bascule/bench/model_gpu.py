"""`vla bench gpu`: a policy of the published size (two towers, a decoder as Qwen2.5-0.5B): decisions and training.

Random weights: speed does not depend on them. Correctness comes first: the recorded graph must say what the plain call
says, or there are no figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bascule.bench.measuring import Row, row
from bascule.experiments.ablations import lean_bridge
from vla.backbones.backbone import Backbone
from vla.core.types import ActionSpec, Observation
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.processor import Stats

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "RTX 4090": 165.0}
"""Dense bf16 with fp32 accumulation, of the makers' data sheets."""
CAMERAS = ("front", "wrist")
SPEC = ActionSpec(
    ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"), (-1.0,) * 7, (1.0,) * 7, control_hz=20.0
)  # LIBERO's
PROPRIO = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of the backbone: DINOv2-L and SigLIP-so400m without their last blocks, Qwen2.5-0.5B (VLA-Adapter)."""

    dino: tuple[int, int, int] = (1024, 23, 16)
    """Width, layers, heads."""
    siglip: tuple[int, int, int, int] = (1152, 26, 16, 4304)
    """Width, layers, heads, feed-forward width."""
    decoder: tuple[int, int, int, int, int] = (896, 24, 14, 2, 4864)
    """Width, layers, heads, key-value heads, feed-forward width."""
    vocabulary: int = 151_936
    image_size: int = 224
    patch_size: int = 14
    bridge_heads: int = 8

    def backbone(self, device: torch.device) -> Backbone:
        """A backbone of these sizes on `device`, with random weights."""
        import transformers as hf

        from vla.backbones.loading import wrap
        from vla.backbones.prismatic import PrismaticConfig, PrismaticForConditionalGeneration
        from vla.backbones.tiny import train_tokenizer

        tokenizer = train_tokenizer(["pick up the red cube and put it on the blue plate"] * 3, vocab_size=400)
        picture = {"image_size": self.image_size, "patch_size": self.patch_size}
        width, layers, heads = self.dino
        dino = hf.Dinov2WithRegistersConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_register_tokens=4, **picture
        )
        width, layers, heads, wide = self.siglip
        siglip = hf.SiglipVisionConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=wide,
            vision_use_head=False, **picture,
        )  # fmt: skip
        width, layers, heads, shared, wide = self.decoder
        text = hf.Qwen2Config(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=shared,
            intermediate_size=wide, vocab_size=max(self.vocabulary, len(tokenizer)), tie_word_embeddings=True,
        )  # fmt: skip
        config = PrismaticConfig(dino, siglip, text, tie_word_embeddings=True)
        with torch.device(device):  # a billion random numbers are drawn where it is quick
            vlm = PrismaticForConditionalGeneration(config)
        return wrap(vlm.cpu(), tokenizer, num_views=len(CAMERAS)).to(device)

    def bridge(self) -> BridgeConfig:
        """The lean bridge for this decoder width."""
        return lean_bridge(width=self.decoder[0], heads=self.bridge_heads)


def make_vla(shape: Shape, device: torch.device, *, learns: bool) -> VLA:
    """Random weights, bf16 backbone, float32 bridge and head."""
    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(64, PROPRIO)), rng.uniform(-1, 1, (64, SPEC.dim)))
    config = VLAConfig(bridge=shape.bridge(), backbone_dtype="bfloat16", freeze_backbone=not learns)
    return VLA.build(
        config, stats=stats, action_spec=SPEC, cameras=CAMERAS, image_size=shape.image_size,
        backbone=shape.backbone(device),
    ).to(device)  # fmt: skip


def observations(shape: Shape, count: int) -> list[Observation]:
    """`count` random observations of batch size 1: uint8 images, proprio and an instruction."""
    rng = np.random.default_rng(0)
    size = (1, shape.image_size, shape.image_size, 3)
    return [
        Observation(
            {name: rng.integers(0, 256, size, dtype=np.uint8) for name in CAMERAS},
            rng.normal(size=(1, PROPRIO)).astype(np.float32),
            ["pick up the red cube"],
        )
        for _ in range(count)
    ]


def replan_rows(shape: Shape, device: torch.device, calls: int) -> list[Row]:
    """Decisions/s at batch 1, image bytes in, actions out, each waited for: called plainly, and by `VLAPolicy`."""
    vla = make_vla(shape, device, learns=False).eval()
    seen = observations(shape, 4)

    def plain(obs: Observation) -> np.ndarray:
        return vla.predict(vla.processor.prepare(obs))

    before = [plain(obs) for obs in seen]
    seconds = {"plain": _median_seconds(lambda k: plain(seen[k % 4]), calls)}
    fast = VLAPolicy(vla, dtype="bfloat16")
    worst = max(float(np.abs(fast.act(obs) - action).max()) for obs, action in zip(seen, before, strict=True))
    # Casting weights once instead of at every call rounds alike; what remains is the order of sums.
    if not worst < 0.05:
        raise RuntimeError(f"the recorded graph's actions differ from the plain call's by {worst:.3f}: no figures")
    moved = float(np.abs(before[0] - before[1]).max())
    if not moved > 0:
        raise RuntimeError("two observations gave the same action: the graph's inputs are not read")
    seconds["policy"] = _median_seconds(lambda k: fast.act(seen[k % 4]), calls)
    config = (
        f"{_millions(vla)}, {len(CAMERAS)} cameras of {shape.image_size} px, chunk 8, batch 1, bf16, median of {calls}"
    )
    return [
        row(
            f"replans, {name}", 1 / value, "replans/s", config=f"{config}; largest difference {worst:.4f}",
            baseline=None if name == "plain" else "plain", base=1 / seconds["plain"],
        )
        for name, value in seconds.items()
    ]  # fmt: skip


def training_rows(shape: Shape, device: torch.device, batches: tuple[int, ...], steps: int) -> list[Row]:
    """Samples/s of whole optimiser steps, everything learning, on pictures that lie on the device; and MFU."""
    vla = make_vla(shape, device, learns=True).train()
    optimiser = torch.optim.AdamW(vla.trainable(), lr=1e-5, fused=device.type == "cuda")
    rows = []
    for batch in batches:
        inp, action, mask = _training_batch(vla, shape, batch, device)

        def step(inp: Any = inp, action: Tensor = action, mask: Tensor = mask) -> None:
            loss, _ = vla.loss(vla.encode(inp), inp.proprio_BP, action, mask)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        with FlopCounterMode(display=False) as counter:
            step()
        seconds = _median_seconds(lambda _: step(), steps)
        done = counter.get_total_flops() / seconds / 1e12
        peak = next((value for name, value in PEAK_TFLOPS.items() if name in _device_name(device)), None)
        share = f", MFU {done / peak:.1%} of {peak:.0f} TFLOP/s" if peak else ""
        memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
        config = f"{_millions(vla)}, all learn, bf16 backbone, AdamW: {done:.1f} TFLOP/s{share}{memory}"
        rows.append(row(f"training, batch {batch}", batch / seconds, "samples/s", config=config))
    return rows


def bench(
    *,
    device: str = "cuda",
    shape: Shape | None = None,
    calls: int = 200,
    batches: tuple[int, ...] = (16, 32),
    steps: int = 20,
) -> list[Row]:
    """All rows. ValueError without the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("vla bench gpu needs a CUDA device, and torch sees none")
    place, shape = torch.device(device), shape or Shape()
    torch.manual_seed(0)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    rows = replan_rows(shape, place, calls)
    return [*rows, *training_rows(shape, place, batches, steps)]


def _training_batch(vla: VLA, shape: Shape, batch: int, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    parts = observations(shape, batch)
    whole = Observation(
        {name: np.concatenate([one.images[name] for one in parts]) for name in CAMERAS},
        np.concatenate([one.proprio for one in parts]),
        [one.instruction[0] for one in parts],
    )
    inp = vla.processor.prepare(whole).to(device)
    action = torch.rand(batch, vla.chunk_size, vla.action_dim, device=device) * 2 - 1
    return inp, action, torch.ones(batch, vla.chunk_size, device=device)


def _median_seconds(call: Callable[[int], Any], count: int) -> float:
    """Median seconds of `count` synchronised calls, after a tenth as many (at least 3) to warm up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for k in range(-max(3, count // 10), count):
        wait()
        begin = time.perf_counter()
        call(k)
        wait()
        if k >= 0:
            times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _millions(vla: VLA) -> str:
    return f"{sum(p.numel() for p in vla.parameters()) / 1e6:.0f} M parameters"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
