"""Backbone: a Hugging Face vision-language model -> hidden states of every layer for [patches][instruction][queries].

The action queries (VLA-Adapter's ActionQuery tokens) come after the instruction and see everything before them; see
`vla.backbones.families` for what each architecture adds. `points` are explicit: where each query looks, as
attention-weighted image coordinates, because a policy needs positions, and reading them from frozen features has to be
learnt first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.backbones.families import (
    ImageSpec,
    Layout,
    Patches,
    Prompt,
    decoder_of,
    family_named,
    first_layers,
    portable,
    prefix_positions,
    visible,
)
from vla.backbones.features import Features, Mishearing
from vla.backbones.pointer import Pointer, SharpPointer, Sight
from vla.processing.text import MOST_TOKENS

SPEC_FILE, WEIGHTS_FILE = "bascule.json", "model.safetensors"
SCALE = ".scale"
"""Ending of the name of the scales that belong to a tensor of whole numbers."""
ATTENTION = {"embedded": "bascule_lean", "bascule_small": "bascule_lean"}
"""How a family's attention is computed unless its specification says otherwise; "sdpa" for all others."""
_HALF = (0.5, 0.5, 0.5)


class Backbone(nn.Module):
    """A VLM read layer by layer. Inputs are raw uint8 images and token ids; see `Features` for what comes out."""

    grid_P2: Tensor
    coords_N3: Tensor

    def __init__(
        self,
        vlm: nn.Module,
        tokenizer: Any,
        *,
        num_queries: int,
        num_views: int,
        family: str | None = None,
        image: ImageSpec | None = None,
        layout: Layout | None = None,
        pointing: bool = True,
        told: bool | None = None,
        sharp: bool = False,
        peak: bool = False,
        agree: bool = False,
        sight: bool = False,
    ) -> None:
        """`vlm` with its language head. `family`, `image`, `layout`: of `vla.backbones.families`; left out, the
        embedded one's.

        `pointing`: a `Pointer` reads where the queries look; `told` (None: as `pointing`): they start from the
        instruction's words; `sharp`: the queries that name something look a second time, at the picture itself;
        `peak`: they read one place, not the mean of several; `agree`: the views look for the same thing; `sight`: the
        queries, too, have a say in whether it is in sight (`vla.backbones.pointer`).
        ValueError for an architecture that is not known.
        """
        super().__init__()
        config = vlm.config
        model_type = config.model_type
        self.family_name = family or ("embedded" if model_type == "llava" else model_type)
        self.family = family_named(self.family_name)
        self.vlm, self.tokenizer = vlm, tokenizer
        text = config.get_text_config()
        self.width: int = text.hidden_size
        self.num_layers: int = text.num_hidden_layers
        self.num_queries, self.num_views = num_queries, num_views
        self.image = image or ImageSpec(self.family.size(config), *self.family.pixels(config))
        self.layout = layout or Layout()
        self.image_size: int = self.image.size
        self.side: int = int(self.family.side(config, self.image_size))
        kinds = getattr(text, "layer_types", None) or []
        self._window: int | None = text.sliding_window if "sliding_attention" in kinds else None
        self._by_kind = bool(kinds)
        self._layers_run = self.num_layers
        self.queries = nn.Parameter(torch.randn(num_queries, self.width) * 0.02)
        # Queries start from the instruction's words, few among a hundred patches. Not ablated: pre-training came
        # off its plateau (80-100 mm) after this and after a heavier heat-map loss (docs/research-log.md).
        self.told = nn.Linear(self.width, self.width) if (pointing if told is None else told) else None
        self.pointer = Pointer(self.width, patch_half=1.0 / self.side, peak=peak) if pointing else None
        self.peak, self.agree = peak, agree
        self.sharp: SharpPointer | None = None
        if sharp:
            self.add_sharp()
        self.sight = Sight(self.width) if sight else None
        self.naming = (0, num_queries // 2)
        """The queries that pre-training taught to point at the named object and the named place."""
        self.misheard: Mishearing | None = None
        """Set within `vla.backbones.features.mishearing`."""
        self.grounding_threshold: float | None = None
        """The `confidence` below which nothing named is in sight; None where pre-training has not calibrated it."""
        self.point_dim = 3 * num_views if pointing else 0
        axis = (torch.arange(self.side) + 0.5) / self.side * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        grid = torch.stack([x, y], -1).view(-1, 2)
        self.register_buffer("grid_P2", grid, persistent=False)
        view = torch.arange(num_views, dtype=torch.float32).repeat_interleave(len(grid))[:, None]
        self.register_buffer("coords_N3", torch.cat([grid.repeat(num_views, 1), view], 1), persistent=False)
        self._register_layout()

    def _register_layout(self) -> None:
        """Constants of the part in front of the instruction."""
        layout, views, side = self.layout, self.num_views, self.side
        positions, self._next_position = prefix_positions(layout, views=views, side=side, rope_3d=self.family.rope_3d)
        self.register_buffer("_prefix_positions_RS", positions, persistent=False)
        ids = torch.tensor(layout.frame_ids, dtype=torch.int64)
        self.register_buffer("_frame_ids", ids, persistent=False)
        self._prefix = layout.prefix_length(views, side * side)

    @property
    def num_patches(self) -> int:
        """Image tokens N of all views together."""
        return self.coords_N3.shape[0]

    @property
    def text_limit(self) -> int:
        """Tokens of an instruction that there are positions for: the decoder's, less those of patches and queries."""
        positions = getattr(self.vlm.config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
        taken = self._next_position + len(self.layout.after) + self.num_queries
        return max(1, min(MOST_TOKENS, positions - taken))

    def embed_images(self, images_BVHWC: Tensor) -> Tensor:
        """uint8 (B, V, H, W, 3) of any size -> patch embeddings (B, N, D) in the decoder's space."""
        return self.look(self.normalise(images_BVHWC)).tokens

    def normalise(self, images_BVHWC: Tensor) -> Tensor:
        """uint8 (B, V, H, W, 3) -> (B * V, 3, S, S) as the vision tower was trained, in the queries' precision."""
        b, v = images_BVHWC.shape[:2]
        if v != self.num_views:
            raise ValueError(f"this backbone was made for {self.num_views} camera views, got {v}")
        pixels = images_BVHWC.flatten(0, 1).permute(0, 3, 1, 2)
        size = (self.image_size, self.image_size)
        if pixels.shape[-2:] != size:
            # Antialiased, and back on whole numbers: the same picture whoever resized it.
            pixels = F.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True).round().clamp(0, 255)
        pixels = pixels.to(self.queries.dtype)
        if self.image.mean == self.image.std == _HALF:
            return pixels.div(127.5).sub(1.0)
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (self.image.mean, self.image.std))
        return (pixels / 255 - mean) / std

    def look(self, pixels: Tensor) -> Patches:
        """The vision tower's answer about pictures (B * V, 3, S, S) that `normalise` has seen: tokens (B, N, D) of all
        views together, and what a second look reads, (B * V, C, h, w)."""
        b = pixels.shape[0] // self.num_views
        seen = self.family.patches(self.vlm, pixels)
        tokens, *deep = (part.reshape(b, -1, self.width) for part in (seen.tokens, *seen.deep))
        return Patches(tokens, tuple(deep), pixels if seen.fine is None else seen.fine)

    def ask(self, words_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Action queries (B, Q, D): learned vectors, plus the mean of the instruction's word embeddings if `told`."""
        if self.told is None:
            return self.queries.expand(*words_BTD.shape[:-2], -1, -1).to(words_BTD.dtype)
        weight = mask_BT[..., None].to(words_BTD.dtype)
        mean = (words_BTD * weight).sum(-2) / weight.sum(-2).clamp(min=1)
        told = self.told(F.rms_norm(mean.float(), (self.width,)))
        return (self.queries + told[..., None, :]).to(words_BTD.dtype)

    def decode(
        self,
        embeds_BSD: Tensor,
        mask: Tensor | dict[str, Tensor],
        positions: Tensor,
        deep: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Hidden states after every decoder layer, the last normalised.

        `mask` is (B, S), or (B, 1, S, S) additive or boolean, or such by kind of layer; `positions` (B, S) or, for
        M-RoPE, (3, B, S); `deep` (B, N, D) each is added to the patches after the first layers (Qwen3-VL).
        """
        extra: dict[str, Any] = {}
        if deep:
            b, s = embeds_BSD.shape[:2]
            at_S = torch.zeros(s, dtype=torch.bool, device=embeds_BSD.device)
            self.patches_of(at_S[None, :, None])[:] = True  # a view: marks the patches' places
            extra = {"visual_pos_masks": at_S.expand(b, -1), "deepstack_visual_embeds": [d.flatten(0, 1) for d in deep]}
        decoder = decoder_of(self.vlm, self.family)
        with first_layers(decoder, self._layers_run) as hidden:
            out = decoder(
                inputs_embeds=embeds_BSD,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                output_hidden_states=True,
                **extra,
            )
            hidden = out.hidden_states[1:]
        return tuple(hidden)

    def stop_after(self, layers: int) -> None:
        """Run only the decoder's first `layers` layers: what a bridge needs whose taps lie there.

        A backbone that points runs all of them, since the pointer reads the last; so does one that adds image features
        between layers (Qwen3-VL).
        """
        if not 1 <= layers <= self.num_layers:
            raise ValueError(f"stop_after takes 1..{self.num_layers} layers, got {layers}")
        if self.pointer is None and not hasattr(
            getattr(self.vlm.config, "vision_config", None), "deepstack_visual_indexes"
        ):
            self._layers_run = layers

    def point(self, hidden_BSD: Tensor, queries_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """`Pointer` on the decoder's last layer: points (B, Q, V, 3) and logits (B, Q, V, P)."""
        if self.pointer is None:
            raise ValueError("this backbone does not point; make it with pointing=True and train it")
        return self.pointer(queries_BQD, self.patches_of(hidden_BSD), self.grid_P2)

    def add_sharp(self) -> None:
        """Add an untrained `sharp` pointer to the backbone, unless it has one."""
        if self.sharp is None:
            channels = self.family.fine_channels
            size, side = self.image_size, self.side
            pointer = SharpPointer(
                self.width, image_size=size, side=side, channels=channels, peak=self.peak, agree=self.agree
            )
            self.sharp = pointer.to(self.queries.device)

    def sharpen(
        self, fine: Tensor, hidden_BSD: Tensor, queries_BQD: Tensor, points_BQVC: Tensor, coarse_BQVP: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`point`'s answer with that of `SharpPointer` for the naming queries, and the latter's logits (B, 2, V, P).

        `hidden_BSD` as for `point`; `fine` as `look` gives it, of as many images as there are observations, or of one
        for each run of equally many questions about it.
        """
        assert self.sharp is not None
        scenes, named = fine.shape[0] // self.num_views, list(self.naming)
        about = (scenes, -1)  # questions about one picture are asked together
        queries = queries_BQD[:, named].flatten(0, 1).unflatten(0, about)
        coarse = coarse_BQVP[:, named].flatten(0, 1).unflatten(0, about)
        found = None
        if self.agree and self.pointer is not None:
            found = self.pointer.found(self.patches_of(hidden_BSD), coarse_BQVP[:, named], self.grid_P2)
            found = found.flatten(0, 1).unflatten(0, about)
        sharp, logits = self.sharp(fine.unflatten(0, (scenes, self.num_views)), queries, coarse, found)
        points_BQVC = points_BQVC.float().clone()  # xy are float32 already; the visibility may be half
        points_BQVC[:, named] = sharp.flatten(0, 1).unflatten(0, (-1, 2))
        return points_BQVC, logits.flatten(0, 1).unflatten(0, (-1, 2))

    def hear(self, ids_BT: Tensor) -> Tensor:
        """The words' vectors (B, T, D), with noise within `vla.backbones.features.mishearing`."""
        embed = self.vlm.model.get_input_embeddings()
        return embed(ids_BT) if self.misheard is None else embed.misheard(ids_BT, *self.misheard)

    def prompt(self, images_BVHWC: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor) -> Prompt:
        """The decoder's input of B observations; arguments as of `forward`."""
        b, q = images_BVHWC.shape[0], self.num_queries  # len() would make an int of it in an export
        patches, deep, fine = self.look(self.normalise(images_BVHWC))
        embed = self.vlm.model.get_input_embeddings()
        words = self.hear(token_ids_BT)
        queries = self.ask(words, token_mask_BT)
        prefix, after = self._framed(patches.to(words.dtype), embed)
        embeds = torch.cat([prefix, words, *after, queries], 1)

        ones = torch.ones(b, 1, dtype=torch.bool, device=embeds.device)
        tail = [token_mask_BT.bool(), ones.expand(-1, len(self.layout.after) + q)]
        mask = torch.cat([ones.expand(-1, self._prefix), *tail], 1)
        # Padding takes no position: what follows it goes on where the words before it ended.
        tail_positions = self._next_position - 1 + torch.cat(tail, 1).long().cumsum(1)
        rows = len(self._prefix_positions_RS)
        prefix_positions_RBS = self._prefix_positions_RS[:, None].expand(-1, b, -1)
        positions = torch.cat([prefix_positions_RBS, tail_positions.expand(rows, -1, -1)], 2)
        placed = positions if self.family.rope_3d else positions[0]
        return Prompt(embeds, mask, self._mask(mask, embeds), placed, deep, fine)

    def forward(self, images_BVHWC: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor) -> Features:
        """Features of B observations. `token_mask_BT` is True on real tokens, which may be padded on either side."""
        q = self.num_queries
        prompt = self.prompt(images_BVHWC, token_ids_BT, token_mask_BT)
        hidden = self.decode(prompt.embeds_BSD, prompt.mask, prompt.positions, prompt.deep)
        fine = prompt.fine
        points = None
        if self.pointer is not None:
            points, coarse = self.point(hidden[-1], hidden[-1][:, -q:])
            if self.sharp is not None:
                assert fine is not None
                points, _ = self.sharpen(fine, hidden[-1], hidden[-1][:, -q:], points, coarse)
            points = torch.cat([points[..., :2], points[..., 2:].sigmoid()], -1).flatten(2)
        return Features(
            raw_BLND=torch.stack([self.patches_of(h).flatten(1, 2) for h in hidden], 1),
            raw_mask_BN=None,
            queries_BLQD=torch.stack([h[:, -q:] for h in hidden], 1),
            points_BQE=points,
            coords_NE=self.coords_N3,
        )

    def confidence(self, queries_BQD: Tensor, points_BQE: Tensor) -> Tensor:
        """How surely the named object is in sight (B,), 0 to 1, by `sight`; without one, its visibility in the view
        that shows it best. `queries_BQD`: states after the last layer; `points_BQE`: as in `Features`."""
        first = self.naming[0]
        visible_BV = points_BQE[:, first].unflatten(-1, (self.num_views, 3))[..., 2]
        if self.sight is None:
            return visible_BV.amax(-1)
        queries = queries_BQD.float()
        return self.sight(queries[:, first], queries.mean(1), visible_BV).sigmoid()

    def _framed(self, patches_BND: Tensor, embed: nn.Module) -> tuple[Tensor, list[Tensor]]:
        """Everything in front of the instruction (B, S, D), and what comes between it and the queries."""
        layout, b = self.layout, patches_BND.shape[0]
        if not layout.frame_ids:
            return patches_BND, []
        lengths = [len(ids) for ids in (layout.before, layout.opens, layout.closes, layout.between, layout.after)]
        frame = embed(self._frame_ids).to(patches_BND.dtype)
        before, opens, closes, between, after = (part.expand(b, -1, -1) for part in frame.split(lengths))
        parts = [before]
        for view in patches_BND.unflatten(1, (self.num_views, -1)).unbind(1):
            parts += [opens, view, closes]
        return torch.cat([*parts, between], 1), [after]

    def patches_of(self, x_BSD: Tensor) -> Tensor:
        """The image tokens (B, V, P, D) of a whole sequence, as a view of it."""
        layout, patches = self.layout, self.side**2
        start, each = len(layout.before), layout.view_length(patches)
        views = x_BSD[:, start : start + self.num_views * each].unflatten(1, (self.num_views, each))
        return views[:, :, len(layout.opens) : len(layout.opens) + patches]

    def _mask(self, mask_BS: Tensor, embeds_BSD: Tensor) -> Tensor | dict[str, Tensor]:
        """Attention mask in the form `decode` takes. Plain causal attention is left to the library's faster kernels."""
        if self.family.sees_ahead == "nothing" and self._window is None:
            return mask_BS.long()
        group_S = torch.full((mask_BS.shape[1],), -1, device=mask_BS.device)
        if self.family.sees_ahead == "prefix":
            group_S[: -self.num_queries] = 0
        elif self.family.sees_ahead == "own view":
            views = torch.arange(self.num_views, device=mask_BS.device)
            self.patches_of(group_S[None, :, None])[:] = views[None, :, None, None]
        order = mask_BS.long().cumsum(1)
        implementation = decoder_of(self.vlm, self.family).config._attn_implementation

        def finished(window: int | None) -> Tensor:
            sees = visible(mask_BS, order, group_S, window)
            if implementation == "sdpa":
                return sees
            return torch.zeros_like(sees, dtype=embeds_BSD.dtype).masked_fill(~sees, torch.finfo(embeds_BSD.dtype).min)

        if not self._by_kind:
            return finished(None)
        return {"full_attention": finished(None), "sliding_attention": finished(self._window)}

    def to_spec(self) -> dict[str, Any]:
        """Specification from which `load_backbone` builds this again, given the weights and a tokenizer folder."""
        from vla.core.config import encode

        spec = {
            "vlm": portable(json.loads(self.vlm.config.to_json_string())),
            "num_queries": self.num_queries,
            "num_views": self.num_views,
        }
        if self.family_name != "embedded":
            spec |= {"family": self.family_name, "image": encode(self.image), "layout": encode(self.layout)}
        if self.pointer is None:
            spec |= {"pointing": False, "told": self.told is not None}
        if self.sharp is not None:
            spec["sharp"] = True
        if self.peak:
            spec["peak"] = True
        if self.agree:
            spec["agree"] = True
        if self.sight is not None:
            spec["sight"] = True
        if self.grounding_threshold is not None:
            spec["grounding"] = {"threshold": self.grounding_threshold}
        attention = self.vlm.config._attn_implementation
        if attention != ATTENTION.get(self.family_name, "sdpa"):
            spec["attention"] = attention
        return spec

    def save(self, folder: Path) -> None:
        """Write a folder that `load_backbone` takes: specification, fp16 weights, tokenizer."""
        from vla.core.checkpoint import save_tensors
        from vla.core.config import save_json

        folder.mkdir(parents=True, exist_ok=True)
        tied = self.vlm.lm_head.weight is self.vlm.get_input_embeddings().weight
        dropped = "vlm.lm_head.weight" if tied else None
        tensors = {k: v.half().contiguous() for k, v in self.state_dict().items() if k != dropped}
        pack = getattr(self.vlm, "pack", dict)
        save_tensors(folder / WEIGHTS_FILE, pack(tensors), {})
        save_json(folder / SPEC_FILE, self.to_spec())
        self.tokenizer.save_pretrained(folder)
