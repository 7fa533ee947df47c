"""Published VLA-Adapter checkpoints -> policies of ours that compute what the released code computes.

A published folder holds `action_head--*checkpoint.pt`, `proprio_projector--*checkpoint.pt`, `dataset_statistics.json`
and the fine-tuned vision-language model. Names and shapes from the public repository (commit 838a36d).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla.core.config import load_json, lookup
from vla.core.types import ActionSpec
from vla.model.config import FaithfulConfig, VLAConfig
from vla.model.model import VLA
from vla.processing.processor import Stats, VectorStats

HEADS_OF_THE_RELEASE = 8
END_EFFECTOR = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")

_OUTSIDE = {
    "layer_norm1": "bridge.stem_norm",
    "fc1": "bridge.stem",
    "layer_norm2": "head.norm",
    "fc2": "head.out",
}
_SHARED = {"q_proj": "query", "o_proj": "out", "ffn.0": "norm", "ffn.1": "ffn"}
_OF_LAYOUT = {
    "base": {"k_proj": "key.0", "v_proj": "value.0"},
    "pro": {
        f"{kind}_{source}": f"{ours}.{place}"
        for kind, ours in (("k", "key"), ("v", "value"))
        for place, source in enumerate(("self", "adapter", "task"))
    },
}
_POINTER = b"version https://git-lfs"
_DEAD = "film_gen."
"""Parameters that the released forward pass never uses."""


@dataclass(frozen=True, eq=False)
class Released:
    """A published policy: its shape, and its weights under our names."""

    config: FaithfulConfig
    proprio_dim: int
    tensors: dict[str, Tensor]
    """"bridge.*" and "head.*" of a `VLA` with `config` and the "linear" head, float32."""


def read_released(folder: str | os.PathLike[str], *, heads: int = HEADS_OF_THE_RELEASE) -> Released:
    """The action head and proprio projector in a published folder. ValueError naming what is missing or unknown."""
    return convert_released(
        _component(Path(folder), "action_head"), _component(Path(folder), "proprio_projector"), heads=heads
    )


def convert_released(
    head: Mapping[str, Tensor], projector: Mapping[str, Tensor], *, heads: int = HEADS_OF_THE_RELEASE
) -> Released:
    """From state dicts as published, base or Pro, wrapped by DistributedDataParallel or not."""
    head = {name.removeprefix("module.").removeprefix("model."): tensor for name, tensor in head.items()}
    projector = {name.removeprefix("module."): tensor for name, tensor in projector.items()}
    layout: Literal["base", "pro"] = "pro" if any(".k_self." in name for name in head) else "base"
    tensors = {}
    for name, tensor in head.items():
        ours = _rename(name, layout)
        if ours is None:
            raise ValueError(f"the action head holds '{name}', which no released {layout} layout has")
        if ours:
            tensors[ours] = tensor.float()
    for name, ours in (("fc1", "bridge.embed_proprio.0"), ("fc2", "bridge.embed_proprio.2")):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" not in projector:
                raise ValueError(f"the proprio projector lacks '{name}.{kind}'")
            tensors[f"{ours}.{kind}"] = projector[f"{name}.{kind}"].float()
    for needed in ("bridge.stem.weight", "head.out.weight", "bridge.blocks.0.query.weight"):
        if needed not in tensors:
            raise ValueError(f"this is no VLA-Adapter action head: it has nothing for {needed}")
    width, stem = tensors["bridge.stem.weight"].shape
    blocks = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("bridge.blocks."))
    config = FaithfulConfig(
        layout, width=width, heads=heads, num_blocks=blocks, action_dim=stem // width, bf16_table=True
    )
    return Released(config, tensors["bridge.embed_proprio.0.weight"].shape[1], tensors)


def released_stats(
    statistics: Mapping[str, Any], dataset: str | None = None, *, extremes: bool = False
) -> tuple[Stats, str]:
    """Ours from the contents of dataset_statistics.json, and the data set's name (needed when it holds several).

    `extremes`: [-1, 1] spans minimum and maximum (ALOHA) instead of the 1% and 99% quantiles. Components that the
    release leaves as they are (mask false: the gripper) stay as they are.
    """
    if dataset is None:
        if len(statistics) != 1:
            raise ValueError(f"the checkpoint knows several data sets, choose one: {', '.join(sorted(statistics))}")
        dataset = next(iter(statistics))
    table = lookup(dataset, statistics, "data set")

    def vector(part: Mapping[str, Any]) -> VectorStats:
        keep = part.get("mask", [True] * len(part["min"]))
        low, high = (part["min"], part["max"]) if extremes else (part["q01"], part["q99"])
        low = [value if kept else -1.0 for value, kept in zip(low, keep, strict=True)]
        high = [value if kept else 1.0 for value, kept in zip(high, keep, strict=True)]
        columns = (low, high, part["min"], part["max"], part["mean"], part["std"])
        return VectorStats(*(tuple(float(value) for value in column) for column in columns))

    frames = int(table.get("num_transitions", 0))
    return Stats(proprio=vector(table["proprio"]), action=vector(table["action"]), frames=frames), dataset


def convert(
    folder: str | os.PathLike[str],
    *,
    backbone: str | dict[str, Any] | nn.Module,
    cameras: Sequence[str],
    chunk_size: int = 8,
    control_hz: float = 20.0,
    dataset: str | None = None,
    extremes: bool = False,
    heads: int = HEADS_OF_THE_RELEASE,
    max_text_tokens: int = 64,
) -> VLA:
    """A published folder as a policy of ours, in evaluation mode. `backbone`: what `load_backbone` takes, or a module.

    The weights do not tell the chunk size: 8 for LIBERO and CALVIN, 5 for Bridge, 25 for ALOHA. Actions leave as the
    release's `predict_action` returns them (its LIBERO script then turns the gripper into an open or close command),
    limited to twice the range of the training data.
    """
    released = read_released(folder, heads=heads)
    stats, _ = released_stats(load_json(Path(folder) / "dataset_statistics.json"), dataset, extremes=extremes)
    if stats.proprio.dim != released.proprio_dim:
        raise ValueError(
            f"the proprio projector reads {released.proprio_dim} values, the statistics are of {stats.proprio.dim}"
        )
    dim = len(released.tensors["head.out.bias"])
    if stats.action.dim != dim:
        raise ValueError(f"the action head has {dim} components, the statistics are of {stats.action.dim}")
    config = VLAConfig(
        backbone=backbone if isinstance(backbone, str | dict) else "converted",
        bridge=released.config,
        head="linear",
        chunk_size=chunk_size,
    )
    vla = VLA.build(
        config,
        stats=stats,
        action_spec=_action_spec(stats.action, control_hz),
        cameras=cameras,
        max_text_tokens=max_text_tokens,
        backbone=None if isinstance(backbone, str | dict) else backbone,
        released_scaling=True,
    )
    missing, unexpected = vla.load_state_dict(released.tensors, strict=False)
    missing = [name for name in missing if not name.startswith("backbone.")]
    if missing or unexpected:
        raise ValueError(f"the action head lacks or adds weights: {', '.join([*missing, *unexpected][:3])}")
    return vla.eval()


def _action_spec(stats: VectorStats, control_hz: float) -> ActionSpec:
    names = END_EFFECTOR if stats.dim == len(END_EFFECTOR) else tuple(f"joint_{i}" for i in range(stats.dim))
    reach = [(high - low) / 2 for low, high in zip(stats.min, stats.max, strict=True)]
    return ActionSpec(
        names=names,
        low=tuple(min(-1.0, low - more) for low, more in zip(stats.min, reach, strict=True)),
        high=tuple(max(1.0, high + more) for high, more in zip(stats.max, reach, strict=True)),
        control_hz=control_hz,
    )


def _rename(name: str, layout: Literal["base", "pro"]) -> str | None:
    """Our name of a parameter; "" for a dead one, None for one that the layout does not have."""
    if match := re.fullmatch(r"mlp_resnet_blocks\.(\d+)\.(.+)", name):
        block, rest = match.groups()
        if rest == "gating_factor":
            return f"bridge.blocks.{block}.gate"
        if layout == "pro" and rest.startswith(_DEAD):
            return ""
        part, _, kind = rest.rpartition(".")
        ours = {**_SHARED, **_OF_LAYOUT[layout]}.get(part)
        return None if ours is None else f"bridge.blocks.{block}.{ours}.{kind}"
    part, _, kind = name.rpartition(".")
    return None if part not in _OUTSIDE else f"{_OUTSIDE[part]}.{kind}"


def _component(folder: Path, name: str) -> dict[str, Tensor]:
    found = sorted(folder.glob(f"*{name}*checkpoint*.pt"))
    if len(found) != 1:
        listing = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{folder} must hold one file {name}--...checkpoint.pt, found {listing}")
    try:
        held = torch.load(found[0], map_location="cpu", weights_only=True)
    except Exception as problem:  # what unpickling garbage raises is anything
        if isinstance(problem, MemoryError | PermissionError):
            raise
        raise ValueError(f"{found[0]} {_no_weights(found[0])}") from None
    if not isinstance(held, Mapping) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise ValueError(f"{found[0]} holds no state dict, tensors by name: take the file of the release")
    return dict(held)


def _no_weights(path: Path) -> str:
    """Why a file cannot be one of torch.save, and what to do: words that follow its name. torch's own end in the advice
    to switch its safety off."""
    with path.open("rb") as file:
        begin = file.read(len(_POINTER))
    if begin == _POINTER:
        return "is a pointer of git-lfs, not the weights: run `git lfs pull` in the release's folder"
    if not begin:
        return "is empty: download it again"
    return "is not a readable state dict (damaged, cut short, or no file of torch.save): download it again"
