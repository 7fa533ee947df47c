"""The published ablation as configurations: VLA-Adapter's conditions (arXiv 2509.09372, section 4.6), and baselines.

Each function takes a model's configuration and returns the variant; everything else about a run stays as it is:
`replace(config, model=ablation(name)(config.model))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vla.core.config import lookup
from vla.model.config import BridgeConfig, VLAConfig

_LEAN: dict[str, Any] = {"grouped": True, "shared_projections": True, "ffn_multiple": 1}


def bridge(model: VLAConfig) -> VLAConfig:
    """The model itself: raw tokens and queries of every layer."""
    return _with(model, taps=None)


def no_points(model: VLAConfig) -> VLAConfig:
    """Without the explicit coordinates, which the published model does not have either: attention must find them."""
    return _with(model, points_at=(), point_stem=False)


def last_layer(model: VLAConfig) -> VLAConfig:
    """The same number of blocks, all reading the last layer."""
    return _with(model, taps="last:all")


def raw_only(model: VLAConfig) -> VLAConfig:
    """No action queries (nor points, which are theirs)."""
    return _with(model, queries=False, point_stem=False)


def queries_only(model: VLAConfig) -> VLAConfig:
    """No raw image tokens."""
    return _with(model, raw=False)


def half_the_layers(model: VLAConfig) -> VLAConfig:
    """Every second layer: half the blocks."""
    return _with(model, taps="every:2")


def lean(model: VLAConfig) -> VLAConfig:
    """The same width and depth with `lean_bridge`'s fewer weights: what large backbones are given."""
    return _with(model, **_LEAN)


def lean_bridge(width: int = 896, heads: int = 8, **changes: Any) -> BridgeConfig:
    """The bridge for a backbone of Qwen2.5-0.5B's size: grouped keys and values everywhere, shared projections, a
    feed-forward no wider than the latent. Its gates start open, as on our suites."""
    return BridgeConfig(**{**_LEAN, "width": width, "heads": heads, "gate_init": 1.0, "point_stem": False, **changes})


def frozen(model: VLAConfig) -> VLAConfig:
    """The backbone as it was pre-trained, no adapters."""
    return replace(model, freeze_backbone=True, lora=None)


def trained(model: VLAConfig) -> VLAConfig:
    """The whole backbone learns from actions."""
    return replace(model, freeze_backbone=False, lora=None)


def no_language(model: VLAConfig) -> VLAConfig:
    """The instruction is left blank: must fail on suites where it is needed."""
    return replace(model, language=False)


def no_decoder(model: VLAConfig) -> VLAConfig:
    """No language model: four blocks that read the vision tower's patches and the words' embeddings."""
    return replace(_with(model, taps="last:4", points_at=(), point_stem=False), decoder=False)


ABLATIONS: dict[str, Callable[[VLAConfig], VLAConfig]] = {
    "bridge": bridge,
    "no-points": no_points,
    "last-layer": last_layer,
    "raw-only": raw_only,
    "queries-only": queries_only,
    "half-the-layers": half_the_layers,
    "lean": lean,
    "frozen": frozen,
    "trained": trained,
    "no-language": no_language,
    "no-decoder": no_decoder,
}


def ablation(name: str) -> Callable[[VLAConfig], VLAConfig]:
    """The one called `name`; several joined by "+" are applied in turn. ValueError with the nearest name."""
    parts = [lookup(part, ABLATIONS, "ablation") for part in name.split("+")]

    def applied(model: VLAConfig) -> VLAConfig:
        for part in parts:
            model = part(model)
        return model

    return applied


def _with(model: VLAConfig, **changes: Any) -> VLAConfig:
    if not isinstance(model.bridge, BridgeConfig):
        raise ValueError("ablations vary bridge attention; this model has a released VLA-Adapter policy instead")
    return replace(model, bridge=replace(model.bridge, **changes))
