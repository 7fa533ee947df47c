"""Builds a backbone from a specification, a folder or a shipped asset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from vla.backbones.backbone import ATTENTION, SCALE, SPEC_FILE, WEIGHTS_FILE, Backbone
from vla.backbones.families import (
    ImageSpec,
    Layout,
    decoder_of,
    family_named,
    image_spec,
    make_layout,
)
from vla.backbones.light_import import light_import
from vla.backbones.tiny import use_linear_patches
from vla.core.config import decode
from vla.core.grounding import threshold_in

with light_import():
    from transformers import PreTrainedTokenizerFast
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

ASSETS = Path(__file__).resolve().parent / "assets"


SHIPPED: dict[str, Path] = {
    "small": ASSETS / "small-vlm",
    "tiny": ASSETS / "tiny-vlm",
    "tiny-goals": ASSETS / "tiny-goals-vlm",
}
"""Backbones that ship with the package; some of them are retired (`vla.model.config.RETIRED_BACKBONES`)."""


NUM_QUERIES, NUM_VIEWS = 64, 2


def load_ours(folder: Path, given: Mapping[str, Any] = {}, num_layers: int | None = None) -> Backbone:  # noqa: B006
    """A backbone that `Backbone.save` wrote; `given`: options of `load` that the folder may decide itself."""
    spec = json.loads((folder / SPEC_FILE).read_text())
    spec["num_views"] = given.get("num_views", spec["num_views"])  # no weight depends on it
    if given.get("num_queries", spec["num_queries"]) != spec["num_queries"]:
        raise ValueError(f"{folder} was trained with {spec['num_queries']} queries: leave num_queries out")
    if extra := given.keys() - {"num_queries", "num_views"}:
        raise ValueError(f"{folder} is trained already: leave {sorted(extra)[0]} out")
    backbone = build(spec, folder)
    packed = {name: t.float() for name, t in load_file(folder / WEIGHTS_FILE).items()}
    scales = {name for name in packed if name.endswith(SCALE) and name.removesuffix(SCALE) in packed}
    tensors = {name: t * packed.get(name + SCALE, 1) for name, t in packed.items() if name not in scales}
    missing, unexpected = backbone.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.endswith("lm_head.weight")]
    if missing or unexpected:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit its {SPEC_FILE}: {(missing or unexpected)[0]}")
    return first_layers(backbone.eval(), num_layers)


def build(spec: dict[str, Any], tokenizer: Path | str | Mapping[str, bytes]) -> Backbone:
    """A backbone from its specification, with uninitialised weights: load them afterwards.

    `tokenizer`: the folder of its files, or the files themselves as name -> bytes.
    """
    raw = dict(spec["vlm"])
    family = spec.get("family", "embedded")
    attention = spec.get("attention", ATTENTION.get(family, "sdpa"))
    embedded = family == "embedded" and raw["model_type"] == "llava"
    if embedded:  # its classes by name: the auto classes would import much more
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        raw.pop("model_type")
        config = LlavaConfig(**raw)
        make = LlavaForConditionalGeneration._from_config
    elif family == "bascule_small":
        from vla.backbones.small.model import SmallConfig, SmallVLM

        raw.pop("model_type")
        config = SmallConfig(**raw)

        def make(config: SmallConfig, attn_implementation: str) -> SmallVLM:
            return SmallVLM(config, attention=attn_implementation)
    else:
        auto = _auto_classes()
        config = auto.AutoConfig.for_model(raw.pop("model_type"), **raw)
        make = auto.AutoModelForImageTextToText.from_config
    with no_init_weights():  # slow for a large model, and all of it would be overwritten
        vlm = make(config, attn_implementation=attention).float()
    vlm.tie_weights()
    backbone = Backbone(
        use_linear_patches(vlm) if family == "embedded" else vlm,
        _load_tokenizer(tokenizer, fast=family in ("embedded", "bascule_small")),
        num_queries=spec["num_queries"],
        num_views=spec["num_views"],
        family=family,
        image=decode(ImageSpec, spec["image"]) if "image" in spec else None,
        layout=decode(Layout, spec["layout"]) if "layout" in spec else None,
        pointing=spec.get("pointing", True),
        told=spec.get("told"),
        sharp=spec.get("sharp", False),
        peak=spec.get("peak", False),
        agree=spec.get("agree", False),
        sight=spec.get("sight", False),
    )
    backbone.grounding_threshold = threshold_in(spec)
    return backbone


def _auto_classes() -> Any:
    """`transformers`, knowing our Prismatic classes as well."""
    import transformers

    from vla.backbones import prismatic  # registers itself with the auto classes

    assert prismatic
    return transformers


def _load_tokenizer(source: Path | str | Mapping[str, bytes], *, fast: bool) -> Any:
    """A tokenizer from its folder, or from its files' content; a `fast` one then without touching the disk."""
    if isinstance(source, Mapping):
        if not fast or not {"tokenizer.json", "tokenizer_config.json"} <= source.keys():
            with as_folder(source) as folder:
                return _load_tokenizer(folder, fast=fast)
        saved = json.loads(source["tokenizer_config.json"])  # all but the classes, so that it is saved alike again
        options = {name: value for name, value in saved.items() if name not in ("tokenizer_class", "backend")}
        tokenizer = Tokenizer.from_str(source["tokenizer.json"].decode())
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**options, "is_local": True})
    kind = PreTrainedTokenizerFast if fast else _auto_classes().AutoTokenizer
    return kind.from_pretrained(source)


@contextmanager
def as_folder(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder with these files."""
    with TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield Path(folder)


def load_hugging_face(name: str, num_layers: int | None, seed: int, **options: Any) -> Backbone:
    """A model as `save_pretrained` wrote it or as the hub has it."""
    auto = _auto_classes()
    try:
        config = auto.AutoConfig.from_pretrained(name)
        family_named(config.model_type)
        shorten(config.get_text_config(), num_layers)
        with _quietly():  # layers left out are no news
            vlm, info = auto.AutoModelForImageTextToText.from_pretrained(
                name, config=config, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
            tokenizer = auto.AutoTokenizer.from_pretrained(name)
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
    gone = ("vlm.", "pointer.", "sharp.", "sight.")
    own = {name: t for name, t in backbone.state_dict().items() if not name.startswith(gone)}
    fewer.load_state_dict(own, strict=False)
    return fewer.eval()


class _quietly:  # noqa: N801 (a context manager)
    """Only errors of `transformers` for a while."""

    def __enter__(self) -> None:
        self.before = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        logging.set_verbosity(self.before)
