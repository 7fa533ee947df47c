"""A policy's checkpoint folder: what `VLA.save` writes and `VLA.load` reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vla.core.checkpoint import load_checkpoint, reading_config, save_checkpoint
from vla.core.config import decode, encode
from vla.core.disk import writing
from vla.model.config import VLAConfig
from vla.model.memory.recall import RULES
from vla.processing.processor import Processor, ProcessorConfig, Stats

BackboneLoader = Callable[[dict[str, Any]], nn.Module]
TALKER = "2"
"""The version of `vla.model.talking.talker`: 2 compares named things, and says only words of its answers."""
_TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class PolicyParts:
    """Everything that a checkpoint says of a policy."""

    config: VLAConfig
    backbone: nn.Module
    processor: Processor
    members: dict[str, Processor]
    tensors: dict[str, Tensor]


def save_policy(
    vla: Any,
    folder: str | os.PathLike[str],
    *,
    trainer_state: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the checkpoint of a `vla.model.model.VLA`; `tensors` instead of its own state, if given."""
    save_checkpoint(
        folder,
        config={
            "model": encode(vla.config),
            "processor": encode(vla.processor.config),
            "backbone": vla.backbone.to_spec(),
            "members": {name: _encode_processor(one) for name, one in vla.members.items()},
        }
        | {name: meaning for name, (meaning, _) in _versions(vla.config).items()},
        tensors=vla.state_dict() if tensors is None else tensors,
        stats=vla.processor.stats.to_dict(),
        trainer_state=trainer_state,
        files=tokenizer_files(vla.backbone.tokenizer),
    )


def read_policy(folder: str | os.PathLike[str], load_backbone: BackboneLoader | None) -> PolicyParts:
    """Read a checkpoint, the backbone built but without its weights. ValueError naming what is missing or damaged."""
    from vla.backbones.hub import load as load_ours
    from vla.backbones.loading import as_folder

    checkpoint = load_checkpoint(folder, trainer=False, extra=f"{_TOKENIZER}/")
    if "heatmap" in checkpoint.config:
        raise ValueError(
            f"{os.fspath(folder)} is a policy with heat-maps: it is evaluated, served and exported, but neither "
            "trained on nor refined by RL; `vla train --head l1` makes a policy that is"
        )
    missing = {"model", "processor", "backbone"} - checkpoint.config.keys()
    if missing:
        raise ValueError(f"{os.fspath(folder)} is no policy: its config.json lacks {', '.join(sorted(missing))}")
    spec = checkpoint.config["backbone"]
    # From verified bytes, not from the folder itself: an interrupted save may not have settled its names yet.
    tokenizer = {name.removeprefix(f"{_TOKENIZER}/"): data for name, data in checkpoint.files.items()}
    if load_backbone is None:
        backbone = load_ours({**spec, "tokenizer": tokenizer})
    else:
        with as_folder(tokenizer) as tokenizer_folder:
            backbone = load_backbone({**spec, "tokenizer": str(tokenizer_folder)})
    with reading_config(folder):
        config = decode(VLAConfig, checkpoint.config["model"])
        processor_config = decode(ProcessorConfig, checkpoint.config["processor"])
        processor = Processor(processor_config, Stats.from_dict(checkpoint.stats), backbone.tokenizer)
        members = {
            name: Processor(
                decode(ProcessorConfig, one["processor"]), Stats.from_dict(one["stats"]), backbone.tokenizer
            )
            for name, one in checkpoint.config.get("members", {}).items()
        }
    for name, (meaning, remedy) in _versions(config).items():
        if checkpoint.config.get(name) != meaning:
            raise ValueError(f"{os.fspath(folder)} {remedy}")
    return PolicyParts(config, backbone, processor, members, checkpoint.tensors)


def _encode_processor(processor: Processor) -> dict[str, Any]:
    return {"processor": encode(processor.config), "stats": processor.stats.to_dict()}


def _versions(config: VLAConfig) -> dict[str, tuple[str, str]]:
    """Entries of a checkpoint's config.json that say with which meaning its parts have learnt, and a sentence on those
    that have learnt with another. Checkpoints made before there was such an entry have an older one."""
    versions = {}
    if config.memory is not None:
        rule = config.memory.rule
        versions["memory_rule"] = (
            RULES[rule],
            f"has learnt with a memory that kept other frames, or less of them, than the rule '{rule}' does now: train "
            f"it again (vla train --memory {rule})",
        )
    if config.talk is not None:
        versions["talker"] = (
            TALKER,
            "was taught to talk by an earlier version, which read other things: teach it again (vla train --talk)",
        )
    return versions


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files of a tokenizer in a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        with writing(folder, "a copy of the tokenizer"):
            tokenizer.save_pretrained(folder)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {f"{_TOKENIZER}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in paths}
