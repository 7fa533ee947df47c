"""Memory estimate of a run before it starts: weights, gradients, optimiser, activations; pixels and features.

Activations are measured, not guessed: the tensors that autograd keeps for one frame and for two give the cost of any
batch, and what a frozen backbone holds at once while it encodes one frame and two gives that of a batch encoded. The
frames are those of the longest instruction. Temporary buffers of the backward pass and the allocator's slack come on
top: expect 10 to 30 percent more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vla.backbones.features import Features
from vla.core.disk import free_bytes, nbytes_of
from vla.data.batches import Batch, LiveDemos
from vla.data.lerobot_dataset import DemoSet
from vla.model.memory.recall import nothing
from vla.model.model import VLA
from vla.model.modulators import frozen
from vla.model.stored import tokenizer_files
from vla.processing.processor import Processor
from vla.runtime.machine import free_memory
from vla.training.multi_robot import members_of
from vla.training.optim import checkpoint_layers
from vla.training.train_config import TrainConfig


@dataclass(frozen=True)
class Budget:
    """Bytes. `device`: where the model is; the rest is main memory."""

    weights: int
    gradients: int
    optimiser: int
    """Two moments per trainable parameter, and the average if there is one."""
    activations: int
    """Activations of one accumulated part of a batch, on one process."""
    encoding: int
    """Peak memory of a frozen backbone while it encodes a batch, its input and output included."""
    pixels: int
    """Images held in memory."""
    features: int
    """Cached features of a frozen backbone, all frames; 0 where it runs at every step."""
    checkpoint: int
    """Weights, optimiser and tokenizer, which a save writes."""
    features_on_disk: bool
    on_cpu: bool
    trainable: int
    """Parameters that learn, of `parameters`."""
    parameters: int

    @property
    def model(self) -> int:
        """On the model's device."""
        return self.weights + self.gradients + self.optimiser + max(self.activations, self.encoding)

    @property
    def memory(self) -> int:
        """Main memory."""
        held = self.pixels + (0 if self.features_on_disk else self.features)
        return held + (self.model if self.on_cpu else 0)

    def lines(self) -> list[str]:
        """For a console."""
        parts = [("weights", self.weights), ("gradients", self.gradients), ("optimiser", self.optimiser)]
        parts.append(("activations", self.activations))
        model = ", ".join(f"{name} {_size(size)}" for name, size in parts)
        if self.encoding:
            model += f" (or while encoding {_size(self.encoding)})"
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
        """Describe what will not fit and the remedy; None if everything fits."""
        if not self.on_cpu:
            free, _ = torch.cuda.mem_get_info()
            if self.model > free:
                return f"the model needs {_size(self.model)}, the GPU has {_size(free)} free: {_REMEDY}"
        free = free_memory()
        # The images are there already.
        if (needed := self.memory - self.pixels) > free:
            return f"the run needs {_size(needed)} more memory, {_size(free)} are free: {_REMEDY}"
        return None

    def no_room(self, out: Path, *, again: bool = False) -> str | None:
        """Describe that a checkpoint will not fit where `out` lies, which otherwise is found out when it is saved;
        None if it does. `again`: a second one is written, before the first is removed."""
        needed, free = self.checkpoint * (2 if again else 1), free_bytes(out)
        if needed <= free:
            return None
        beside = f", {_size(needed)} with the one before, which is removed after it" if again else ""
        return (
            f"a checkpoint needs {_size(self.checkpoint)}{beside}; the device holding {out} has {_size(free)} free: "
            "make room before it is saved, or give another --out"
        )


_REMEDY = (
    "a smaller --batch-size, shorter instructions, more --accumulate, --checkpointing, --tune lora, or --keep-features"
)


def estimate(cfg: TrainConfig, vla: VLA, demos: DemoSet | Mapping[str, DemoSet], *, processes: int = 1) -> Budget:
    """Memory budget of this run, with `vla` on its present device. Runs it on two frames; changes nothing."""
    members = members_of(vla, demos)
    trainable = [p for p in vla.parameters() if p.requires_grad]
    learns = sum(p.nbytes for p in trainable)
    # DDP keeps its own copy of the gradients in buckets.
    copies = 1 if processes == 1 or cfg.shard else 2
    share = processes if cfg.shard else 1
    optimiser = learns * (3 if cfg.ema_decay else 2)
    written = nbytes_of([vla.state_dict(), tokenizer_files(vla.backbone.tokenizer)])
    live = vla.backbone_learns or cfg.augment is not None
    frames = sum(part.num_frames for _, part in members.values())
    rows = max(1, cfg.batch_size // (cfg.accumulate * processes))
    cost = _kept(cfg, vla, *_longest(vla, members))
    encoded = rows if live else min(cfg.encode_batch, max(part.num_frames for _, part in members.values()))
    return Budget(
        weights=sum(t.nbytes for t in (*vla.parameters(), *vla.buffers())) // share,
        gradients=learns * copies // share,
        optimiser=optimiser // share,
        activations=_of_batch(cost.activations, rows),
        encoding=_of_batch(cost.encoding, encoded),
        pixels=sum(image.nbytes for _, part in members.values() for image in part.images.values()),
        features=0 if live else cost.features * frames,
        checkpoint=written + optimiser,
        features_on_disk=cfg.keep_features or processes > 1,
        on_cpu=vla.device.type == "cpu",
        trainable=sum(p.numel() for p in trainable),
        parameters=sum(p.numel() for p in vla.parameters()),
    )


@dataclass(frozen=True)
class _Cost:
    """Bytes for one frame and for two."""

    activations: tuple[int, int]
    encoding: tuple[int, int]
    """(0, 0) for a backbone that learns: what it holds is among the activations."""
    features: int
    """Features of one frame in the cache."""


def _of_batch(cost: tuple[int, int], rows: int) -> int:
    one, two = cost
    return max(0, one + (two - one) * (rows - 1))


def _longest(vla: VLA, members: Mapping[str, tuple[Processor, DemoSet]]) -> tuple[LiveDemos, int]:
    """The dataset with the longest instruction, and a frame that has it."""
    best: tuple[int, Processor, DemoSet, str] | None = None
    for processor, part in members.values():
        for text in dict.fromkeys(part.instruction):
            length = len(processor.tokens(text))
            if best is None or length > best[0]:
                best = length, processor, part, text
    if best is None:
        raise ValueError("there are no demonstrations")
    _, processor, part, text = best
    return LiveDemos(processor, part, vla.chunk_size), part.instruction.index(text)


def _kept(cfg: TrainConfig, vla: VLA, source: LiveDemos, frame: int) -> _Cost:
    """The cost of this frame, and of it twice."""
    was_training = vla.training
    vla.train()
    try:
        with torch.random.fork_rng(devices=[]), checkpoint_layers(vla.backbone, cfg.checkpointing):
            batches = [source.take(torch.full((count,), frame)).to(vla.device) for count in (1, 2)]
            one, two = (_saved(vla, batch) for batch in batches)
            if vla.backbone_learns:
                return _Cost((one, two), (0, 0), 0)
            peaks = []
            with torch.no_grad():
                for batch in batches:
                    with _Peak() as peak:
                        features = vla.encode(batch.seen)
                    peaks.append(peak.most)
                features = features.select(slice(0, 1)).to(dtype=torch.float16)
            return _Cost((one, two), (peaks[0], peaks[1]), features.nbytes - features.coords_NE.nbytes)
    finally:
        vla.train(was_training)


class _Peak(TorchDispatchMode):
    """While it is active: the most bytes that tensors made since then hold at once (`most`)."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self._alive = {place: one for place, one in self._alive.items() if not one[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # neither a view nor changed in place
                    self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return out


def _saved(vla: VLA, batch: Batch) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*vla.parameters(), *vla.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = batch.proprio_BP.shape[0]  # any choice of modulators keeps as much
    with frozen(vla, rows), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features: Features = vla.encode(batch.seen)
        if vla.config.memory is not None:
            memory = torch.from_numpy(nothing(vla.config.memory, rows, vla.bridge.memory.row_width))
            features = replace(features, memory_BMK=memory.to(vla.device))
        loss, _ = vla.loss(features, batch.proprio_BP, batch.action_BCA, batch.mask)
    size = sum(kept.values()) + (0 if vla.backbone_learns else features.nbytes)
    del loss
    return size


def _size(count: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"
