"""Backbones by name, by folder or from a specification; Hugging Face checkpoints of every family in `vla.families`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.utils import logging

from vla import prismatic  # registers itself with the auto classes
from vla.backbone import ATTENTION, SPEC_FILE, WEIGHTS_FILE, Backbone
from vla.config import decode, lookup
from vla.families import ImageSpec, Layout, decoder_of, family_named, image_spec, make_layout
from vla.tiny import use_linear_patches

ASSETS = Path(__file__).resolve().parent / "assets"
SHIPPED: dict[str, Path] = {"tiny": ASSETS / "tiny-vlm", "tiny-goals": ASSETS / "tiny-goals-vlm"}
"""Backbones that ship with the package."""
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
NUM_QUERIES, NUM_VIEWS = 64, 2
_PARTS = ("dino", "siglip", "decoder")
_KEYS = ("name", *_PARTS, "num_queries", "num_views", "num_layers", "image_size", "prompt", "pointing", "seed")


def _smollm(**options: Any) -> Backbone:
    from vla.smollm import load_smollm

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

    `spec`: a name ("tiny", "tiny-goals", "smollm2-135m", a short name of `REMOTE`, "owner/repository"); a folder made
    by `Backbone.save`, by `vla pretrain` or by `save_pretrained` (config.json, safetensors, tokenizer); or a dict:
    {"name": any of these, plus the options below}; {"dino", "siglip", "decoder": names or folders, plus options}, a
    Prismatic pair with a fresh projector; or what `Backbone.to_spec` gave, with "tokenizer", a folder (without weights:
    the caller loads them).

    `num_layers`: run only the first so many decoder layers. `num_views`: cameras (2, or as saved). The others are for
    what has no trained queries yet: `num_queries` (64), `image_size` (pixels, where the vision tower takes several),
    `prompt` (text around "{instruction}"), `pointing` (with an untrained pointer), `seed` of the fresh weights.
    ValueError for what is unknown or does not fit.
    """
    if isinstance(spec, dict) and "tokenizer" in spec:
        return first_layers(_build(spec, Path(spec["tokenizer"])), num_layers)
    fresh = {"num_queries": num_queries, "num_views": num_views, "image_size": image_size, "prompt": prompt}
    given = {name: value for name, value in fresh.items() if value is not None}
    given |= {"pointing": True} if pointing else {}
    if isinstance(spec, dict):
        return _load_dict(spec, {**given, "num_layers": num_layers, "seed": seed})
    folder = Path(spec) if Path(spec).is_dir() else SHIPPED.get(spec)
    if folder is not None and (folder / SPEC_FILE).is_file():
        return _load_ours(folder, given, num_layers)
    if folder is None and spec in MADE:
        return MADE[spec](**given, num_layers=num_layers, seed=seed)
    if folder is None and "/" not in spec:
        lookup(spec, {**SHIPPED, **MADE, **REMOTE}, "backbone")
    if folder is not None and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no backbone (neither {SPEC_FILE} nor config.json); make one with `vla pretrain`, or give "
            "the folder of a Hugging Face model"
        )
    return _load_hugging_face(REMOTE.get(spec, spec) if folder is None else str(folder), num_layers, seed, **given)


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
    parts = [options.pop(name) for name in _PARTS]
    vlm, tokenizer = prismatic.compose(*parts, seed=options["seed"])
    num_layers = options.pop("num_layers", None)
    return first_layers(wrap(vlm, tokenizer, **options), num_layers)


def _load_ours(folder: Path, given: dict[str, Any], num_layers: int | None) -> Backbone:
    spec = json.loads((folder / SPEC_FILE).read_text())
    spec["num_views"] = given.get("num_views", spec["num_views"])  # no weight depends on it
    if given.get("num_queries", spec["num_queries"]) != spec["num_queries"]:
        raise ValueError(f"{folder} was trained with {spec['num_queries']} queries: leave num_queries out")
    if extra := given.keys() - {"num_queries", "num_views"}:
        raise ValueError(f"{folder} is trained already: leave {sorted(extra)[0]} out")
    backbone = _build(spec, folder)
    tensors = {name: t.float() for name, t in load_file(folder / WEIGHTS_FILE).items()}
    missing, unexpected = backbone.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.endswith("lm_head.weight")]
    if missing or unexpected:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit its {SPEC_FILE}: {(missing or unexpected)[0]}")
    return first_layers(backbone.eval(), num_layers)


def _build(spec: dict[str, Any], tokenizer_folder: Path) -> Backbone:
    """From a specification. Its weights hold anything: load them."""
    raw = dict(spec["vlm"])
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    family = spec.get("family", "embedded")
    attention = spec.get("attention", ATTENTION.get(family, "sdpa"))
    with no_init_weights():  # slow for a large model, and all of it would be overwritten
        vlm = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).float()
    vlm.tie_weights()
    kind = PreTrainedTokenizerFast if family == "embedded" else AutoTokenizer
    return Backbone(
        use_linear_patches(vlm) if family == "embedded" else vlm,
        kind.from_pretrained(tokenizer_folder),
        num_queries=spec["num_queries"],
        num_views=spec["num_views"],
        family=family,
        image=decode(ImageSpec, spec["image"]) if "image" in spec else None,
        layout=decode(Layout, spec["layout"]) if "layout" in spec else None,
        pointing=spec.get("pointing", True),
        told=spec.get("told"),
        sharp=spec.get("sharp", False),
    )


def _load_hugging_face(name: str, num_layers: int | None, seed: int, **options: Any) -> Backbone:
    """A model as `save_pretrained` wrote it or as the hub has it."""
    try:
        config = AutoConfig.from_pretrained(name)
        family_named(config.model_type)
        shorten(config.get_text_config(), num_layers)
        with _quietly():  # layers left out are no news
            vlm, info = AutoModelForImageTextToText.from_pretrained(
                name, config=config, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as problem:
        first = str(problem).strip().splitlines()[0]
        raise ValueError(
            f"cannot read the model {name}: {first} (without a network, give the folder of a downloaded one)"
        ) from None
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks the weights of {sorted(info['missing_keys'])[0]}")
    return wrap(vlm, tokenizer, folder=Path(name), seed=seed, **options)


def wrap(
    vlm: nn.Module,
    tokenizer: Any,
    *,
    folder: Path | None = None,
    num_queries: int = NUM_QUERIES,
    num_views: int = NUM_VIEWS,
    image_size: int | None = None,
    prompt: str | None = None,
    pointing: bool = False,
    seed: int = 0,
) -> Backbone:
    """A pretrained model with fresh action queries, of the size of its own word embeddings."""
    family = family_named(vlm.config.model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = Backbone(
            vlm,
            tokenizer,
            num_queries=num_queries,
            num_views=num_views,
            family=vlm.config.model_type,
            image=image_spec(family, vlm.config, folder, image_size),
            layout=make_layout(family, vlm.config, tokenizer, prompt),
            pointing=pointing,
        )
    scale_queries(backbone)
    return backbone.eval()


@torch.no_grad()
def scale_queries(backbone: Backbone) -> None:
    """Give fresh queries the root mean square of word embeddings: a decoder expects neither larger nor smaller ones."""
    embed = backbone.vlm.model.get_input_embeddings()
    words: Tensor = embed(torch.arange(min(4096, embed.num_embeddings)))
    backbone.queries.mul_(words.square().mean().sqrt() / backbone.queries.square().mean().sqrt())


def shorten(text_config: Any, num_layers: int | None) -> None:
    """Let a decoder's configuration have only its first layers."""
    if num_layers is None:
        return
    total = text_config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"num_layers must be in 1..{total} (the decoder's layers), got {num_layers}")
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:num_layers]
    text_config.num_hidden_layers = num_layers


def first_layers(backbone: Backbone, num_layers: int | None) -> Backbone:
    """The same weights with only the first decoder layers, the last of them normalised as the decoder does.

    A pointer is left out: it was trained on the last layer.
    """
    if num_layers is None or num_layers == backbone.num_layers:
        return backbone
    vlm = backbone.vlm
    decoder = decoder_of(vlm, backbone.family)
    shorten(vlm.config.get_text_config(), num_layers)
    if decoder.config is not vlm.config.get_text_config():
        shorten(decoder.config, num_layers)
    decoder.layers = decoder.layers[:num_layers]
    fewer = Backbone(
        vlm,
        backbone.tokenizer,
        num_queries=backbone.num_queries,
        num_views=backbone.num_views,
        family=backbone.family_name,
        image=replace(backbone.image),
        layout=backbone.layout,
        pointing=False,
        told=backbone.told is not None,
    )
    own = {name: t for name, t in backbone.state_dict().items() if not name.startswith(("vlm.", "pointer.", "sharp."))}
    fewer.load_state_dict(own, strict=False)
    return fewer.eval()


class _quietly:  # noqa: N801 (a context manager)
    """Only errors of `transformers` for a while."""

    def __enter__(self) -> None:
        self.before = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        logging.set_verbosity(self.before)
