"""Feature cache for imitation: the frozen backbone's features of every demonstrated frame, computed once.

In memory, or on disk as memory-mapped arrays: then a step reads the rows of its batch, and the operating system keeps
what fits. A folder is named after everything the features depend on and appears in one rename, so it is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla.backbones.features import Features, mishearing
from vla.core.disk import reserve, temporary, writing
from vla.data.batches import Batch, chunk_targets
from vla.data.fitting import check_demos
from vla.data.lerobot_dataset import DemoSet
from vla.model.memory.tokens import Replayed
from vla.model.model import VLA
from vla.processing.processor import Processor

CACHE_DTYPE = torch.float16


@dataclass(frozen=True, eq=False)
class EncodedDemos:
    """F frames as the bridge reads them, and the chunks of actions that follow them."""

    features: Features
    """Features of F frames, hidden states in float16."""
    proprio_FP: Tensor
    """float32, normalised."""
    action_FCA: Tensor
    """float32, normalised."""
    mask_FC: Tensor
    """float32, 1 inside the episode; (F, C, A) where the model's action is wider than this robot's."""
    memory: Replayed | None = None
    """The frames that a policy which remembers would look at from each frame."""

    @property
    def num_frames(self) -> int:
        """Number of frames F."""
        return self.features.batch_size

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of frames of the one dataset, as a tuple."""
        return (self.num_frames,)

    @property
    def nbytes(self) -> int:
        """Bytes of features, proprio, actions and masks together."""
        return self.features.nbytes + self.proprio_FP.nbytes + self.action_FCA.nbytes + self.mask_FC.nbytes

    def weigh(self, frames: Tensor) -> float:
        """`Batch.weight` of these frames: the number of targets that count."""
        return float(self.mask_FC[frames].sum(dtype=torch.float64))

    def take(self, frames: Tensor) -> Batch:
        """The batch of these frames; features in float32."""
        features = self.features.select(frames).float() if self.memory is None else self.memory.take(frames)
        return Batch(features, self.proprio_FP[frames], self.action_FCA[frames], self.mask_FC[frames])


def encode_demos(
    vla: VLA,
    demos: DemoSet,
    *,
    processor: Processor | None = None,
    batch_size: int = 64,
    folder: Path | None = None,
    word_noise: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedDemos:
    """Run the frozen backbone over every frame. `folder`: keep the features there and reuse them when nothing changed.
    `word_noise`: as in `TrainConfig`.

    `processor`: of the robot that these demonstrations show; None: the policy's own. `on_progress(frames done, frames)`
    may raise to stop. ValueError if the demonstrations do not fit the policy.
    """
    processor = processor or vla.processor
    check_demos(processor, demos)
    if folder is None:
        features = _encode(vla, demos, processor, batch_size, word_noise, on_progress, _room_in_memory)
    else:
        kept = folder / f"features-{_fingerprint(vla, demos, processor, word_noise)}"
        features = _load(kept)
        if features is None:
            features = _encode_to_disk(vla, demos, processor, batch_size, word_noise, on_progress, kept)
    action_FCA, mask_FC = chunk_targets(processor, demos, vla.chunk_size, torch.arange(demos.num_frames))
    proprio_FP = processor.normalise_proprio(demos.proprio)
    memory = None
    if vla.config.memory is not None:
        steps = vla.config.n_action_steps or vla.chunk_size
        memory = Replayed(vla, features, proprio_FP, demos.episode_index, demos.instruction, steps=steps)
    return EncodedDemos(features, proprio_FP, action_FCA, mask_FC, memory)


def _encode(
    vla: VLA,
    demos: DemoSet,
    processor: Processor,
    batch_size: int,
    word_noise: float,
    on_progress: Callable[[int, int], None] | None,
    make_room: Callable[[Features, int], Features],
) -> Features:
    was_training = vla.training
    vla.eval()
    try:
        room: Features | None = None
        with torch.no_grad():
            for start in range(0, demos.num_frames, batch_size):
                rows = slice(start, min(start + batch_size, demos.num_frames))
                with mishearing(vla.backbone, (word_noise, torch.tensor(demos.episode_index[rows]))):
                    part = vla.encode(processor.prepare(demos.observation(rows)))
                if room is None:
                    room = make_room(part, demos.num_frames)
                room.write(start, part)
                if on_progress is not None:
                    on_progress(rows.stop, demos.num_frames)
        assert room is not None
        return room
    finally:
        vla.train(was_training)


def _room_in_memory(part: Features, frames: int) -> Features:
    return part.empty_like(frames, dtype=CACHE_DTYPE)


# ---------------------------------------------------------------------- on disk
def _encode_to_disk(
    vla: VLA,
    demos: DemoSet,
    processor: Processor,
    batch_size: int,
    word_noise: float,
    on_progress: Callable[[int, int], None] | None,
    kept: Path,
) -> Features:
    """Write the features as they come, never holding more than a batch of them, and map them."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    growing = temporary(kept)
    growing.mkdir()
    arrays: list[np.memmap] = []

    def room_on_disk(part: Features, frames: int) -> Features:
        like = part.empty_like(1, dtype=CACHE_DTYPE).to(device="cpu")
        mapped = {}
        for name, tensor in _tensors(like).items():
            values = tensor.numpy()
            shape = values.shape if name == "coords_NE" else (frames, *values.shape[1:])
            with writing(kept, "the cache of features", like.nbytes * frames):
                array = np.lib.format.open_memmap(growing / f"{name}.npy", mode="w+", dtype=values.dtype, shape=shape)
                reserve(growing / f"{name}.npy")
            if name == "coords_NE":
                array[:] = values
            arrays.append(array)
            mapped[name] = torch.from_numpy(array)
        return replace(like, **mapped)

    try:
        _encode(vla, demos, processor, batch_size, word_noise, on_progress, room_on_disk)
        for array in arrays:
            array.flush()
        arrays.clear()
        shutil.rmtree(kept, ignore_errors=True)  # a damaged one
        os.rename(growing, kept)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    features = _load(kept)
    assert features is not None
    return features


def _tensors(features: Features) -> dict[str, Tensor]:
    every = {field.name: getattr(features, field.name) for field in fields(features)}
    return {name: tensor for name, tensor in every.items() if tensor is not None}


def _load(kept: Path) -> Features | None:
    """The features in a folder, memory-mapped; None if there are none, or they are damaged (it is only a cache)."""
    try:
        found: dict[str, Tensor | None] = {field.name: None for field in fields(Features)}
        for name in found:
            path = kept / f"{name}.npy"
            if path.is_file():
                # Copy-on-write: torch has no read-only tensors, and the file must not change under another run.
                found[name] = torch.from_numpy(np.load(path, mmap_mode="c"))
        lengths = {len(t) for name, t in found.items() if t is not None and name != "coords_NE"}
        if any(found[name] is None for name in ("raw_BLND", "queries_BLQD", "coords_NE")) or len(lengths) != 1:
            return None
        return Features(**found)
    except (ValueError, OSError, EOFError):
        return None


def _fingerprint(vla: VLA, demos: DemoSet, processor: Processor, word_noise: float) -> str:
    """Digest of everything the features depend on: backbone weights, its precision, pixels and words."""
    digest = hashlib.blake2b(digest_size=8)
    config = processor.config
    digest.update(repr((config.cameras, config.image_size, config.max_text_tokens, vla.config.backbone_dtype)).encode())
    if vla.config.xyz is not None:
        digest.update(repr(vla.config.xyz).encode())
        for camera in filter(None, config.cameras):
            known = demos.geometry[camera]
            for values in (known.depth_mm, known.intrinsics, known.extrinsics):
                digest.update(np.ascontiguousarray(values))
    if config.text_rule != "words":
        digest.update(config.text_rule.encode())
    if word_noise:
        digest.update(repr(word_noise).encode())
    digest.update(repr(vla.backbone.to_spec()).encode())
    for name, tensor in vla.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for camera in filter(None, config.cameras):
        frames = demos.images[camera]
        fingerprint = getattr(frames, "fingerprint", None)  # frames on disk know theirs without being decoded
        digest.update(fingerprint() if fingerprint else np.ascontiguousarray(frames))
    digest.update("\n".join(demos.instruction).encode())
    return digest.hexdigest()
