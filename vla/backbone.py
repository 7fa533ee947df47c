"""Backbone: a Hugging Face vision-language model -> hidden states of every layer for [patches][instruction][queries].

The action queries (VLA-Adapter's ActionQuery tokens) are appended to the instruction; causal attention lets them see
everything. `points` are explicit: where each query looks, as attention-weighted image coordinates, because a policy
needs positions, and reading them from frozen features has to be learnt first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vla.config import lookup
from vla.features import Features

ASSETS = Path(__file__).resolve().parent / "assets"
NAMED: dict[str, Path] = {"tiny": ASSETS / "tiny-vlm"}
"""Backbones that ship with the package."""
_SPEC_FILE, _WEIGHTS_FILE = "bascule.json", "model.safetensors"
POINTER_WIDTH = 64


class Pointer(nn.Module):
    """Where each query looks: per view, softmax over its patches -> expected coordinate, and whether it is in sight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, POINTER_WIDTH)
        self.key = nn.Linear(width, POINTER_WIDTH)
        self.shift = nn.Linear(width, 2)
        self.visible = nn.Linear(width, 1)
        self.patch_half = 1.0 / 7

    def forward(self, query_BQD: Tensor, patch_BVPD: Tensor, grid_P2: Tensor) -> tuple[Tensor, Tensor]:
        """Points (B, Q, V, 3) = x, y in [-1, 1] and a visibility logit, float32; attention logits (B, Q, V, P)."""
        q, k = self.query(query_BQD), self.key(patch_BVPD)
        logits = torch.einsum("bqd,bvpd->bqvp", q, k).float() * POINTER_WIDTH**-0.5
        weight = logits.softmax(-1)
        # Each patch may move its coordinate within (and a little beyond) itself: precision below the patch size.
        at_BVP2 = grid_P2 + 1.5 * self.patch_half * torch.tanh(self.shift(patch_BVPD).float())
        xy = torch.einsum("bqvp,bvpc->bqvc", weight, at_BVP2)
        seen = torch.einsum("bqvp,bvpc->bqvc", weight, patch_BVPD.float()) + query_BQD.float()[:, :, None]
        logit = F.linear(seen, self.visible.weight.float(), self.visible.bias.float())
        return torch.cat([xy, logit], dim=-1), logits


class Backbone(nn.Module):
    """A VLM read layer by layer. Inputs are raw uint8 images and token ids; see `Features` for what comes out."""

    def __init__(self, vlm: nn.Module, tokenizer: Any, *, num_queries: int, num_views: int) -> None:
        super().__init__()
        config = vlm.config
        if config.model_type != "llava":
            raise ValueError(f"backbone type {config.model_type!r} is not supported yet; supported: llava")
        self.vlm, self.tokenizer = vlm, tokenizer
        self.width: int = config.text_config.hidden_size
        self.num_layers: int = config.text_config.num_hidden_layers
        self.num_queries, self.num_views = num_queries, num_views
        self.image_size: int = config.vision_config.image_size
        self.side: int = self.image_size // config.vision_config.patch_size
        self.point_dim = 3 * num_views
        self.queries = nn.Parameter(torch.randn(num_queries, self.width) * 0.02)
        # Queries start from the instruction's words, few among a hundred patches. Not ablated: pre-training came
        # off its plateau (80-100 mm) after this and after a heavier heat-map loss (BENCHMARKS.md).
        self.told = nn.Linear(self.width, self.width)
        self.pointer = Pointer(self.width)
        self.pointer.patch_half = 1.0 / self.side
        axis = (torch.arange(self.side) + 0.5) / self.side * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        grid = torch.stack([x, y], -1).view(-1, 2)
        self.register_buffer("grid_P2", grid, persistent=False)
        view = torch.arange(num_views, dtype=torch.float32).repeat_interleave(len(grid))[:, None]
        self.register_buffer("coords_N3", torch.cat([grid.repeat(num_views, 1), view], 1), persistent=False)

    @property
    def num_patches(self) -> int:
        """Image tokens N of all views together."""
        return self.coords_N3.shape[0]

    def embed_images(self, images_BVHWC: Tensor) -> Tensor:
        """uint8 (B, V, H, W, 3) -> patch embeddings (B, N, D) in the decoder's space."""
        b, v = images_BVHWC.shape[:2]
        if v != self.num_views:
            raise ValueError(f"this backbone was made for {self.num_views} camera views, got {v}")
        pixels = images_BVHWC.flatten(0, 1).permute(0, 3, 1, 2)
        pixels = pixels.to(self.queries.dtype).div(127.5).sub(1.0)
        hidden = self.vlm.model.vision_tower(pixels).last_hidden_state
        return self.vlm.model.multi_modal_projector(hidden).view(b, -1, self.width)

    def ask(self, words_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Action queries (B, Q, D): learned vectors plus the mean of the instruction's word embeddings."""
        weight = mask_BT[..., None].to(words_BTD.dtype)
        mean = (words_BTD * weight).sum(-2) / weight.sum(-2).clamp(min=1)
        told = self.told(F.rms_norm(mean.float(), (self.width,)))
        return (self.queries + told[..., None, :]).to(words_BTD.dtype)

    def decode(self, embeds_BSD: Tensor, mask: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        """Hidden states after every decoder layer, the last normalised. `mask` is (B, S) or additive (B, 1, S, S)."""
        out = self.vlm.model.language_model(
            inputs_embeds=embeds_BSD,
            attention_mask=mask,
            position_ids=positions_BS,
            use_cache=False,
            output_hidden_states=True,
        )
        return out.hidden_states[1:]

    def point(self, hidden_BSD: Tensor, queries_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """`Pointer` on the decoder's last layer: points (B, Q, V, 3) and logits (B, Q, V, P)."""
        patches = hidden_BSD[:, : self.num_patches]
        return self.pointer(queries_BQD, patches.unflatten(1, (self.num_views, -1)), self.grid_P2)

    def forward(self, images_BVHWC: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor) -> Features:
        """Features of B observations. `token_mask_BT` is True on real tokens, which may be padded on either side."""
        b, n, q = len(images_BVHWC), self.num_patches, self.num_queries
        patches = self.embed_images(images_BVHWC)
        words = self.vlm.model.get_input_embeddings()(token_ids_BT)
        queries = self.ask(words, token_mask_BT)
        embeds = torch.cat([patches.to(words.dtype), words, queries], 1)
        ones = torch.ones(b, 1, dtype=torch.bool, device=embeds.device)
        mask = torch.cat([ones.expand(-1, n), token_mask_BT.bool(), ones.expand(-1, q)], 1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        hidden = self.decode(embeds, mask.long(), positions)
        points, _ = self.point(hidden[-1], hidden[-1][:, -q:])
        points = torch.cat([points[..., :2], points[..., 2:].sigmoid()], -1)
        return Features(
            raw_BLND=torch.stack([h[:, :n] for h in hidden], 1),
            raw_mask_BN=None,
            queries_BLQD=torch.stack([h[:, -q:] for h in hidden], 1),
            points_BQE=points.flatten(2),
            coords_NE=self.coords_N3,
        )

    def to_spec(self) -> dict[str, Any]:
        """What `load_backbone` needs, besides the weights and a tokenizer folder, to build this again."""
        return {
            "vlm": json.loads(self.vlm.config.to_json_string()),
            "num_queries": self.num_queries,
            "num_views": self.num_views,
        }

    def save(self, folder: Path) -> None:
        """Write a folder that `load_backbone` takes: specification, fp16 weights, tokenizer."""
        from vla.checkpoint import save_tensors
        from vla.config import save_json

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.half().contiguous() for k, v in self.state_dict().items() if not k.endswith("lm_head.weight")}
        save_tensors(folder / _WEIGHTS_FILE, tensors, {})
        save_json(folder / _SPEC_FILE, self.to_spec())
        self.tokenizer.save_pretrained(folder)


def _build(spec: dict[str, Any], tokenizer_folder: Path) -> Backbone:
    from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

    from vla.tiny import use_linear_patches

    raw = dict(spec["vlm"])
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    vlm = AutoModelForImageTextToText.from_config(config, attn_implementation="bascule_lean").float()
    vlm.tie_weights()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    return Backbone(use_linear_patches(vlm), tokenizer, num_queries=spec["num_queries"], num_views=spec["num_views"])


def load_backbone(spec: str | dict[str, Any]) -> Backbone:
    """A backbone by name ("tiny"), by folder (what `Backbone.save` or `vla pretrain` wrote), or from a specification
    whose "tokenizer" names a folder (random weights: the caller loads them). ValueError for an unknown name."""
    if isinstance(spec, dict):
        return _build(spec, Path(spec["tokenizer"]))
    folder = Path(spec) if Path(spec).is_dir() else lookup(spec, NAMED, "backbone")
    if not (folder / _SPEC_FILE).is_file():
        raise ValueError(f"{folder} holds no backbone (no {_SPEC_FILE}); make one with `vla pretrain`")
    backbone = _build(json.loads((folder / _SPEC_FILE).read_text()), folder)
    tensors = {name: t.float() for name, t in load_file(folder / _WEIGHTS_FILE).items()}
    missing, unexpected = backbone.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.endswith("lm_head.weight")]
    if missing or unexpected:
        raise ValueError(f"{folder / _WEIGHTS_FILE} does not fit its {_SPEC_FILE}: {(missing or unexpected)[0]}")
    return backbone.eval()
