"""Vision-language families of Hugging Face and what is particular to each: patches, positions, masks, marker tokens.

The sequence is always [before][open patches close]*views [between][instruction][after][queries]; nothing is searched
for in it, because it is built from these parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vla.backbones.small.stem import FINE_CHANNELS, STRIDES, fine_features
from vla.core.config import lookup


class Patches(NamedTuple):
    """A vision tower's answer about M pictures."""

    tokens: Tensor
    """(M, P, D) patch embeddings in the decoder's space, row by row."""
    deep: tuple[Tensor, ...] = ()
    """Embeddings that are added to the patches after each of the decoder's first layers."""
    fine: Tensor | None = None
    """(M, C, h, w) features for a second look; None: it looks at the pictures themselves."""


class Prompt(NamedTuple):
    """The decoder's input of B observations: all S embeddings up to and with the queries."""

    embeds_BSD: Tensor
    mask_BS: Tensor
    """bool, False marks padding."""
    mask: Tensor | dict[str, Tensor]
    """The attention mask as the decoder takes it."""
    positions: Tensor
    """(B, S), or (3, B, S) for M-RoPE."""
    deep: tuple[Tensor, ...]
    """The same as of `Patches`."""
    fine: Tensor | None


HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class ImageSpec:
    """How raw pixels become what the vision tower was trained on: square size, then (x / 255 - mean) / std."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Layout:
    """Token ids around the views and the instruction: what the model saw there in its own training."""

    before: tuple[int, ...] = ()
    opens: tuple[int, ...] = ()
    """In front of each view's patches."""
    closes: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    """Between instruction and queries."""

    @property
    def frame_ids(self) -> tuple[int, ...]:
        """All special token ids of the layout in order, without patches, instruction and queries."""
        return self.before + self.opens + self.closes + self.between + self.after

    def view_length(self, patches: int) -> int:
        """Number of sequence positions that one view of `patches` patches takes, its markers included."""
        return len(self.opens) + patches + len(self.closes)

    def prefix_length(self, views: int, patches: int) -> int:
        """Positions in front of the instruction."""
        return len(self.before) + views * self.view_length(patches) + len(self.between)


@dataclass(frozen=True)
class Family:
    """How one architecture is driven. `vlm` is always the model with its language head."""

    patches: Callable[[nn.Module, Tensor], Patches]
    """(vlm, normalised pixels (M, 3, S, S)) -> Patches."""
    side: Callable[[Any, int], float]
    """(config, image size) -> image tokens per row and column."""
    pixels: Callable[[Any], tuple[tuple[float, ...], tuple[float, ...]]]
    """config -> mean and std, where the folder does not say."""
    size: Callable[[Any], int] = lambda config: _square(config.vision_config.image_size)
    """config -> image size."""
    any_size: bool = False
    """The tower takes other sizes than the one it was configured with."""
    decoder: str = "language_model"
    opens: tuple[str, ...] = ()
    """Names of config fields or of tokens; one that the checkpoint lacks is left out."""
    closes: tuple[str, ...] = ()
    bos: Literal["before", "between"] = "before"
    """Where the tokenizer's own first token goes, if it adds one."""
    prompt: str = "{instruction}"
    rope_3d: bool = False
    """Positions (time, row, column), and text goes on from the largest (M-RoPE, Qwen2-VL, arXiv 2409.12191)."""
    fine_channels: int = 3
    """Channels of `Patches.fine`; 3: the pictures'."""
    sees_ahead: Literal["nothing", "own view", "prefix"] = "nothing"
    """Attention beyond causality: patches attend to their whole view (Gemma 3), or all tokens in front of the queries
    attend to each other (PaliGemma)."""


def decoder_of(vlm: nn.Module, family: Family) -> nn.Module:
    """The text decoder without its language head."""
    return getattr(vlm.model, family.decoder)


def _square(size: int | list[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"the vision tower reads {size} pixels; only square images are supported")
    return sides.pop()


def _plain_side(config: Any, size: int) -> float:
    return size / _square(config.vision_config.patch_size)


def _embedded_patches(vlm: nn.Module, pixels: Tensor) -> Patches:
    return Patches(vlm.model.multi_modal_projector(vlm.model.vision_tower(pixels).last_hidden_state))


def _library_patches(vlm: nn.Module, pixels: Tensor) -> Patches:
    found = vlm.model.get_image_features(pixels, return_dict=True).pooler_output
    return Patches(found if isinstance(found, Tensor) else torch.stack(list(found)))


def _shuffled_patches(vlm: nn.Module, pixels: Tensor) -> Patches:
    # Not get_image_features: it drops pictures that are all zero, which would be a different shape at run time.
    return Patches(vlm.model.connector(vlm.model.vision_model(pixels).last_hidden_state))


def _flat_patches(vlm: nn.Module, pixels: Tensor) -> Patches:
    """Qwen's towers take patches as rows: merged cell by merged cell, each picture twice (as two video frames)."""
    visual = vlm.model.visual
    p, merge, frames = visual.patch_size, visual.spatial_merge_size, visual.config.temporal_patch_size
    m, channels, height, width = pixels.shape
    rows, columns = height // p, width // p
    cells = pixels.view(m, channels, rows // merge, merge, p, columns // merge, merge, p)
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    grid = torch.tensor([[1, rows, columns]], device=pixels.device).expand(m, 3)
    out = visual(cells.reshape(m * rows * columns, -1), grid_thw=grid)
    deep = getattr(out, "deepstack_features", None) or ()
    tokens = out.pooler_output.view(m, -1, out.pooler_output.shape[-1])
    return Patches(tokens, tuple(d.view(m, -1, d.shape[-1]) for d in deep))


def _merged_side(config: Any, size: int) -> float:
    return size / (config.vision_config.patch_size * config.vision_config.spatial_merge_size)


def _scaled_side(config: Any, size: int) -> float:
    return size / (config.vision_config.patch_size * config.scale_factor)


def _tower_pixels(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (
        CLIP if "clip" in config.vision_config.model_type and "siglip" not in config.vision_config.model_type else HALF
    )


def _prismatic_patches(vlm: nn.Module, pixels: Tensor) -> Patches:
    return Patches(vlm.model.get_image_features(pixels))


def _small_patches(vlm: nn.Module, pixels: Tensor) -> Patches:
    taps = vlm.model.vision_tower(pixels)
    return Patches(vlm.model.multi_modal_projector(taps), fine=fine_features(taps))


_SMOLVLM = Family(
    patches=_shuffled_patches,
    side=_scaled_side,
    pixels=lambda config: HALF,
    any_size=True,
    decoder="text_model",
    opens=("<fake_token_around_image>", "<global-img>"),
    closes=("<fake_token_around_image>",),
)
_QWEN25 = Family(
    patches=_flat_patches,
    side=_merged_side,
    pixels=lambda config: CLIP,
    size=lambda config: 224,
    any_size=True,
    opens=("vision_start_token_id",),
    closes=("vision_end_token_id",),
    rope_3d=True,
)
FAMILIES: dict[str, Family] = {
    # The tiny VLM that ships with us: a LLaVA whose tower is read after its last normalisation.
    "embedded": Family(patches=_embedded_patches, side=_plain_side, pixels=lambda config: HALF),
    # Convolutions in place of its tower: `vla.backbones.small`.
    "bascule_small": Family(
        patches=_small_patches,
        side=lambda config, size: size / STRIDES[-1],
        pixels=lambda config: IMAGENET,
        size=lambda config: config.image_size,
        any_size=True,
        fine_channels=FINE_CHANNELS,
    ),
    "llava": Family(patches=_library_patches, side=_plain_side, pixels=_tower_pixels),
    "idefics3": _SMOLVLM,
    "smolvlm": _SMOLVLM,
    "qwen2_5_vl": _QWEN25,
    "qwen3_vl": Family(**{**vars(_QWEN25), "pixels": lambda config: HALF}),
    "paligemma": Family(
        patches=_library_patches,
        side=_plain_side,
        pixels=lambda config: HALF,
        bos="between",
        prompt="{instruction}\n",
        sees_ahead="prefix",
    ),
    "gemma3": Family(
        patches=_library_patches,
        side=lambda config, size: math.sqrt(config.mm_tokens_per_image),
        pixels=lambda config: HALF,
        opens=("boi_token_index",),
        closes=("eoi_token_index",),
        sees_ahead="own view",
    ),
    "internvl": Family(
        patches=_library_patches,
        side=lambda config, size: _plain_side(config, size) * config.downsample_ratio,
        pixels=lambda config: IMAGENET,
        opens=("<img>",),
        closes=("</img>",),
    ),
    # Each of its two towers normalises for itself.
    "prismatic": Family(
        patches=_prismatic_patches,
        side=lambda config, size: size / config.siglip_config.patch_size,
        pixels=lambda config: ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        size=lambda config: config.siglip_config.image_size,
    ),
}
"""By Hugging Face's model_type, and "embedded"."""


def family_named(name: str) -> Family:
    """ValueError with the supported ones for any other name."""
    return lookup(name, FAMILIES, "vision-language family")


def image_spec(family: Family, config: Any, folder: Path | None, size: int | None) -> ImageSpec:
    """Image preprocessing of a checkpoint: mean and std from its own preprocessor, `size` if its tower takes it."""
    own = family.size(config)
    wanted = own if size is None else size
    if wanted != own and not family.any_size:
        raise ValueError(f"this vision tower reads {own} pixels only: leave image_size out instead of {wanted}")
    if not family.side(config, wanted).is_integer():
        unit = round(wanted / family.side(config, wanted))
        raise ValueError(f"image_size {wanted} is no multiple of {unit}, one image token: take {wanted // unit * unit}")
    mean, std = family.pixels(config)
    said = _preprocessor(folder) if folder is not None else {}
    return ImageSpec(wanted, tuple(said.get("image_mean") or mean), tuple(said.get("image_std") or std))


def _preprocessor(folder: Path) -> dict[str, Any]:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            found = found.get("image_processor", found)
            if "image_mean" in found:
                return found
    return {}


def make_layout(family: Family, config: Any, tokenizer: Any, prompt: str | None) -> Layout:
    """Marker ids of a checkpoint. `prompt` holds "{instruction}"; what stands around it becomes fixed tokens."""
    prompt = family.prompt if prompt is None else prompt
    left, mark, right = prompt.partition("{instruction}")
    if not mark or "{instruction}" in right:
        raise ValueError(f"a prompt must hold '{{instruction}}' exactly once, got {prompt!r}")
    vocabulary = tokenizer.get_vocab()
    limit = config.get_text_config().vocab_size

    def ids(names: tuple[str, ...]) -> tuple[int, ...]:
        found = [getattr(config, name, None) if name.isidentifier() else vocabulary.get(name) for name in names]
        present = tuple(one for one in found if one is not None)
        if present and max(present) >= limit:
            raise ValueError(f"marker token {max(present)} lies outside the checkpoint's vocabulary of {limit}")
        return present

    def text(words: str) -> tuple[int, ...]:
        return tuple(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else ()

    first = tokenizer("a")["input_ids"][:1]
    bos = tuple(first) if first and first[0] == tokenizer.bos_token_id else ()
    return Layout(
        before=bos if family.bos == "before" else (),
        opens=ids(family.opens),
        closes=ids(family.closes),
        between=(bos if family.bos == "between" else ()) + text(left),
        after=text(right),
    )


def prefix_positions(layout: Layout, *, views: int, side: int, rope_3d: bool) -> tuple[Tensor, int]:
    """Rotary positions (R, S) in front of the instruction, R = 3 (time, row, column) or 1, and the next free one.

    With `rope_3d`, each view's patches share a time and spread over rows and columns (Qwen2-VL, section 2.1).
    """
    if not rope_3d:
        length = layout.prefix_length(views, side * side)
        return torch.arange(length)[None], length
    parts: list[Tensor] = []
    position = 0

    def text(count: int) -> None:
        nonlocal position
        parts.append((position + torch.arange(count)).expand(3, -1))
        position += count

    text(len(layout.before))
    for _ in range(views):
        text(len(layout.opens))
        row = torch.arange(side).repeat_interleave(side)
        parts.append(position + torch.stack([torch.zeros_like(row), row, torch.arange(side).repeat(side)]))
        position += side
        text(len(layout.closes))
    text(len(layout.between))
    return torch.cat(parts, 1), position


def visible(mask_BS: Tensor, order_BS: Tensor, group_S: Tensor, window: int | None = None) -> Tensor:
    """Attention mask, bool (B, 1, S, S), True = may attend: causal, plus the token's own group (-1: none), no padding.

    `window` limits the causal part to so many real tokens, counted by `order_BS`: padding does not use it up.
    """
    index = torch.arange(len(group_S), device=mask_BS.device)
    causal = (index[:, None] >= index[None, :])[None]
    if window is not None:
        causal = causal & (order_BS[:, :, None] - order_BS[:, None, :] < window)
    together = (group_S[:, None] == group_S[None, :]) & (group_S >= 0)[:, None]
    return ((causal | together) & mask_BS[:, None, :])[:, None]


class _Enough(Exception):
    """The decoder has run as far as it is needed."""


@contextmanager
def first_layers(decoder: nn.Module, layers: int) -> Iterator[list[Tensor]]:
    """Stop the decoder's forward passes within this context after `layers` layers; the list receives their outputs.

    Does nothing when that is all of them.
    """
    kept: list[Tensor] = []
    if layers >= len(decoder.layers):
        yield kept
        return

    def keep(_module: nn.Module, _inputs: object, out: Any) -> None:
        kept.append(out if isinstance(out, Tensor) else out[0])

    def stop(_module: nn.Module, _inputs: object) -> None:
        raise _Enough

    hooks = [layer.register_forward_hook(keep) for layer in decoder.layers[:layers]]
    hooks.append(decoder.layers[layers].register_forward_pre_hook(stop))
    try:
        yield kept
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def portable(config: Any) -> Any:
    """A model configuration without where on this machine it was read from."""
    if isinstance(config, dict):
        return {key: portable(value) for key, value in config.items() if key != "_name_or_path"}
    return config
