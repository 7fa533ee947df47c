"""What imitation trains on: the frozen backbone's features of every demonstrated frame, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla.checkpoint import load_tensors, save_tensors
from vla.data import DemoSet
from vla.features import Features
from vla.model import VLA

CACHE_DTYPE = torch.float16


@dataclass(frozen=True, eq=False)
class EncodedDemos:
    """F frames as the bridge reads them, and the chunks of actions that follow them."""

    features: Features
    """Of F frames, hidden states in float16."""
    proprio_FP: Tensor
    """float32, normalised."""
    action_FCA: Tensor
    """float32, normalised."""
    mask_FC: Tensor
    """float32, 1 inside the episode."""

    @property
    def num_frames(self) -> int:
        return self.features.batch_size

    @property
    def nbytes(self) -> int:
        return self.features.nbytes + self.proprio_FP.nbytes + self.action_FCA.nbytes + self.mask_FC.nbytes

    def batch(self, frames: Tensor) -> tuple[Features, Tensor, Tensor, Tensor]:
        """(features float32, proprio, action, mask) of these frames: the arguments of `VLA.loss`."""
        features = self.features.select(frames).float()
        return features, self.proprio_FP[frames], self.action_FCA[frames], self.mask_FC[frames]


def check_demos(vla: VLA, demos: DemoSet) -> None:
    """ValueError, one line, if these demonstrations cannot train this policy."""
    config = vla.processor.config
    for camera in config.cameras:
        if camera not in demos.images:
            raise ValueError(f"the demonstrations lack camera '{camera}'; they have: {', '.join(demos.images)}")
    if demos.action.shape[1] != len(config.action_names):
        raise ValueError(
            f"feature 'action' has {demos.action.shape[1]} components, this policy has {len(config.action_names)}: "
            f"{', '.join(config.action_names)}"
        )
    if demos.proprio.shape[1] != config.proprio_dim:
        raise ValueError(
            f"feature 'observation.state' has {demos.proprio.shape[1]} components, not {config.proprio_dim}"
        )
    if demos.num_frames == 0:
        raise ValueError("there are no demonstrations")


def encode_demos(
    vla: VLA,
    demos: DemoSet,
    *,
    batch_size: int = 64,
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedDemos:
    """Run the frozen backbone over every frame. `folder`: keep the features there and reuse them when nothing changed.

    `on_progress(frames done, frames)` may raise to stop. ValueError if the demonstrations do not fit the policy.
    """
    check_demos(vla, demos)
    path = None if folder is None else folder / f"features-{_fingerprint(vla, demos)}.safetensors"
    features = None if path is None or not path.is_file() else _load(path)
    if features is None:
        features = _encode(vla, demos, batch_size, on_progress)
        if path is not None:
            save_tensors(path, {name: tensor for name, tensor in _tensors(features).items()}, {"format": "pt"})
    action_FCA, mask_FC = demos.chunks(vla.chunk_size)
    return EncodedDemos(
        features=features,
        proprio_FP=vla.processor.normalise_proprio(demos.proprio),
        action_FCA=torch.from_numpy(vla.processor.normalise_action(action_FCA)),
        mask_FC=torch.from_numpy(mask_FC),
    )


def _encode(vla: VLA, demos: DemoSet, batch_size: int, on_progress: Callable[[int, int], None] | None) -> Features:
    was_training = vla.training
    vla.eval()
    try:
        room: Features | None = None
        with torch.no_grad():
            for start in range(0, demos.num_frames, batch_size):
                rows = slice(start, min(start + batch_size, demos.num_frames))
                part = vla.encode(vla.processor.prepare(demos.observation(rows)))
                if room is None:
                    room = part.empty_like(demos.num_frames, dtype=CACHE_DTYPE)
                room.write(start, part)
                if on_progress is not None:
                    on_progress(rows.stop, demos.num_frames)
        assert room is not None
        return room
    finally:
        vla.train(was_training)


def _tensors(features: Features) -> dict[str, Tensor]:
    every = {field.name: getattr(features, field.name) for field in fields(features)}
    return {name: tensor for name, tensor in every.items() if tensor is not None}


def _load(path: Path) -> Features | None:
    try:
        return Features(**{field.name: None for field in fields(Features)} | load_tensors(path))
    except ValueError:
        return None  # damaged: it is only a cache


def _fingerprint(vla: VLA, demos: DemoSet) -> str:
    """Of everything the features depend on: backbone weights, its precision, pixels and words."""
    digest = hashlib.blake2b(digest_size=8)
    config = vla.processor.config
    digest.update(repr((config.cameras, config.image_size, config.max_text_tokens, vla.config.backbone_dtype)).encode())
    digest.update(repr(vla.backbone.to_spec()).encode())
    for name, tensor in vla.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for camera in config.cameras:
        digest.update(np.ascontiguousarray(demos.images[camera]))
    digest.update("\n".join(demos.instruction).encode())
    return digest.hexdigest()
