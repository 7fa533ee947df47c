"""What a run will need before it starts: weights, gradients, optimiser, activations; pixels and features.

Activations are measured, not guessed: the tensors that autograd keeps for one frame and for two give the cost of any
batch. Temporary buffers of the backward pass and the allocator's slack come on top: expect 10 to 30 percent more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.data import DemoSet
from vla.features import Features
from vla.mixture import members_of
from vla.model import VLA
from vla.optim import checkpoint_layers
from vla.source import Batch, LiveDemos
from vla.train_config import TrainConfig


@dataclass(frozen=True)
class Budget:
    """Bytes. `device`: where the model is; the rest is main memory."""

    weights: int
    gradients: int
    optimiser: int
    """Two moments per trainable parameter, and the average if there is one."""
    activations: int
    """Of one accumulated part of a batch, on one process."""
    pixels: int
    """Images held in memory."""
    features: int
    """Of a frozen backbone, all frames; 0 where it runs at every step."""
    features_on_disk: bool
    on_cpu: bool
    trainable: int
    """Parameters that learn, of `parameters`."""
    parameters: int

    @property
    def model(self) -> int:
        """On the model's device."""
        return self.weights + self.gradients + self.optimiser + self.activations

    @property
    def memory(self) -> int:
        """Main memory."""
        held = self.pixels + (0 if self.features_on_disk else self.features)
        return held + (self.model if self.on_cpu else 0)

    def lines(self) -> list[str]:
        """For a console."""
        parts = (("weights", self.weights), ("gradients", self.gradients), ("optimiser", self.optimiser))
        model = ", ".join(f"{name} {_size(size)}" for name, size in (*parts, ("activations", self.activations)))
        place = "on disk" if self.features_on_disk else "in memory"
        data = f"images in memory {_size(self.pixels)}"
        if self.features:
            data += f", features {place} {_size(self.features)}"
        return [
            f"{self.trainable / 1e6:.2f} M of {self.parameters / 1e6:.2f} M parameters learn",
            f"model {_size(self.model)}: {model}",
            f"data: {data}",
        ]

    def problem(self) -> str | None:
        """What will not fit, and what to do about it; None if all fits."""
        if not self.on_cpu:
            free, _ = torch.cuda.mem_get_info()
            if self.model > free:
                return f"the model needs {_size(self.model)}, the GPU has {_size(free)} free: {_REMEDY}"
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        # The images are there already.
        if (needed := self.memory - self.pixels) > free:
            return f"the run needs {_size(needed)} more memory, {_size(free)} are free: {_REMEDY}"
        return None


_REMEDY = "a smaller --batch-size, more --accumulate, --checkpointing, --tune lora, or --keep-features"


def estimate(cfg: TrainConfig, vla: VLA, demos: DemoSet | Mapping[str, DemoSet], *, processes: int = 1) -> Budget:
    """Of this run, `vla` as it is placed now. Runs it on two frames; changes nothing."""
    members = members_of(vla, demos)
    trainable = [p for p in vla.parameters() if p.requires_grad]
    learns = sum(p.nbytes for p in trainable)
    # DDP keeps its own copy of the gradients in buckets.
    copies = 1 if processes == 1 or cfg.shard else 2
    share = processes if cfg.shard else 1
    live = vla.backbone_learns or cfg.augment is not None
    processor, first = next(iter(members.values()))
    one, two, per_frame = _kept(cfg, vla, LiveDemos(processor, first, vla.chunk_size))
    rows = max(1, cfg.batch_size // (cfg.accumulate * processes))
    frames = sum(part.num_frames for _, part in members.values())
    return Budget(
        weights=sum(t.nbytes for t in (*vla.parameters(), *vla.buffers())) // share,
        gradients=learns * copies // share,
        optimiser=learns * (3 if cfg.ema_decay else 2) // share,
        activations=max(0, one + (two - one) * (rows - 1)),
        pixels=sum(image.nbytes for _, part in members.values() for image in part.images.values()),
        features=0 if live else per_frame * frames,
        features_on_disk=cfg.keep_features or processes > 1,
        on_cpu=vla.device.type == "cpu",
        trainable=sum(p.numel() for p in trainable),
        parameters=sum(p.numel() for p in vla.parameters()),
    )


def _kept(cfg: TrainConfig, vla: VLA, source: LiveDemos) -> tuple[int, int, int]:
    """Bytes that autograd keeps for one frame and for two, and those of one frame's features in the cache."""
    was_training = vla.training
    vla.train()
    try:
        with torch.random.fork_rng(devices=[]), checkpoint_layers(vla.backbone, cfg.checkpointing):
            batches = [source.take(torch.zeros(count, dtype=torch.int64)).to(vla.device) for count in (1, 2)]
            one, two = (_saved(vla, batch) for batch in batches)
            if vla.backbone_learns:
                return one, two, 0
            with torch.no_grad():
                features = vla.encode(batches[0].seen).to(dtype=torch.float16)
            return one, two, features.nbytes - features.coords_NE.nbytes
    finally:
        vla.train(was_training)


def _saved(vla: VLA, batch: Batch) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*vla.parameters(), *vla.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features: Features = vla.encode(batch.seen)
        loss, _ = vla.loss(features, batch.proprio_BP, batch.action_BCA, batch.mask)
    size = sum(kept.values()) + (0 if vla.backbone_learns else features.nbytes)
    del loss
    return size


def _size(count: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"
