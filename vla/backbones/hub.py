"""Backbones by name, by folder or from a specification; Hugging Face checkpoints of every family in
`vla.backbones.families`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vla.backbones.backbone import SPEC_FILE, Backbone
from vla.backbones.loading import SHIPPED, build, first_layers, load_hugging_face, load_ours, wrap
from vla.core.config import find, load_json, lookup, make

REMOTE: dict[str, str] = {
    "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "paligemma2-3b": "google/paligemma2-3b-pt-224",
    "gemma3-4b": "google/gemma-3-4b-pt",
    "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
}
"""Short names of repositories on the Hugging Face hub."""
_PARTS = ("dino", "siglip", "decoder")
_KEYS = ("name", *_PARTS, "num_queries", "num_views", "num_layers", "image_size", "prompt", "pointing", "seed")


def _smollm(**options: Any) -> Backbone:
    from vla.backbones.smollm import load_smollm

    return load_smollm(**options)


MADE: dict[str, Callable[..., Backbone]] = {"smollm2-135m": _smollm}
"""Backbones put together from parts."""


def load(
    spec: str | dict[str, Any],
    *,
    num_queries: int | None = None,
    num_views: int | None = None,
    num_layers: int | None = None,
    image_size: int | None = None,
    prompt: str | None = None,
    pointing: bool = False,
    seed: int = 0,
) -> Backbone:
    """A backbone in evaluation mode, float32, on the CPU.

    `spec`: a name ("small", "smollm2-135m", a short name of `REMOTE`, "owner/repository"); a folder made
    by `Backbone.save`, by `vla pretrain` or by `save_pretrained` (config.json, safetensors, tokenizer); or a dict:
    {"name": any of these, plus the options below}; {"dino", "siglip", "decoder": names or folders, plus options}, a
    Prismatic pair with a fresh projector; or what `Backbone.to_spec` gave, with "tokenizer", a folder or its files
    as name -> bytes (without weights: the caller loads them). "MODULE:FUNCTION" as a name makes a backbone of your own
    (docs/extend.md).

    `num_layers`: run only the first so many decoder layers. `num_views`: cameras (2, or as saved). The others are for
    what has no trained queries yet: `num_queries` (64), `image_size` (pixels, where the vision tower takes several),
    `prompt` (text around "{instruction}"), `pointing` (with an untrained pointer), `seed` of the fresh weights.
    ValueError for what is unknown or does not fit.
    """
    name = spec if isinstance(spec, str) else str(spec.get("name", ""))
    if ":" in name and not Path(name).is_dir():
        return _load_foreign(spec, num_queries=num_queries, num_views=num_views)
    if isinstance(spec, dict) and "tokenizer" in spec:
        return first_layers(build(spec, spec["tokenizer"]), num_layers)
    fresh = {"num_queries": num_queries, "num_views": num_views, "image_size": image_size, "prompt": prompt}
    given = {name: value for name, value in fresh.items() if value is not None}
    given |= {"pointing": True} if pointing else {}
    if isinstance(spec, dict):
        return _load_dict(spec, {**given, "num_layers": num_layers, "seed": seed})
    folder = Path(spec) if Path(spec).is_dir() else SHIPPED.get(spec)
    if folder is not None and (folder / SPEC_FILE).is_file():
        return load_ours(folder, given, num_layers)
    if folder is None and spec in MADE:
        return MADE[spec](**given, num_layers=num_layers, seed=seed)
    if folder is None and "/" not in spec:
        lookup(spec, {**SHIPPED, **MADE, **REMOTE}, "backbone")
    if folder is not None and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no backbone (neither {SPEC_FILE} nor config.json); make one with `vla pretrain`, or give "
            "the folder of a Hugging Face model"
        )
    if folder is not None and "model_type" not in (kept := load_json(folder / "config.json")):
        found = "is a policy, not a backbone" if "checkpoint" in kept else "holds no backbone, but another config.json"
        raise ValueError(f"{folder} {found}: give a backbone's name, or the folder of one")
    return load_hugging_face(REMOTE.get(spec, spec) if folder is None else str(folder), num_layers, seed, **given)


def _load_foreign(spec: str | dict[str, Any], **options: int | None) -> Any:
    """A module from outside the package: {"name": "MODULE:FUNCTION", and the function's own arguments}."""
    given = {name: value for name, value in options.items() if value is not None}
    arguments = {**given, **({} if isinstance(spec, str) else spec)}
    name = arguments.pop("name", spec)
    arguments.pop("tokenizer", None)  # a folder that lives for the time of the call: such a module brings its own
    needs = ("eval", "forward", "width", "num_layers", "tokenizer", "to_spec")
    return make(str(name), find(str(name), {}, "backbone"), "backbone", needs, **arguments).eval()


def _load_dict(spec: dict[str, Any], options: dict[str, Any]) -> Backbone:
    options = {**spec, **{name: value for name, value in options.items() if value is not None}}
    options["seed"] = spec.get("seed", options["seed"])
    for name in options:
        lookup(name, dict.fromkeys(_KEYS), "field of a backbone specification")
    if "name" in spec:
        return load(options.pop("name"), **options)
    if not set(_PARTS) <= spec.keys():
        raise ValueError(
            f"a backbone specification needs 'name', or 'dino', 'siglip' and 'decoder'; got {', '.join(sorted(spec))}"
        )
    from vla.backbones import prismatic

    parts = [options.pop(name) for name in _PARTS]
    vlm, tokenizer = prismatic.compose(*parts, seed=options["seed"])
    num_layers = options.pop("num_layers", None)
    return first_layers(wrap(vlm, tokenizer, **options), num_layers)
