"""The baseline without a language model: vision tower and word embeddings, seen by the bridge as one layer.

What remains is a diffusion-transformer-like policy (chunk tokens that attend to patches, an instruction vector and
proprio); on LIBERO such a policy with a CLIP encoder is a strong one, so the decoder has to earn its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vla.backbones.features import Features


class NoDecoder(nn.Module):
    """A backbone that stops before its decoder. One layer; use bridge taps "last:N" for N blocks."""

    def __init__(self, backbone: nn.Module) -> None:
        """`backbone` is a `vla.backbones.backbone.Backbone`. ValueError for one whose images cannot be embedded
        alone."""
        super().__init__()
        if not hasattr(backbone, "embed_images"):
            raise ValueError("a model without decoder needs a backbone that can embed images alone: use 'small'")
        self.inner = backbone
        self.num_layers, self.point_dim = 1, 0
        self.text_limit = getattr(backbone, "text_limit", 0)
        self.width, self.num_queries, self.tokenizer = backbone.width, backbone.num_queries, backbone.tokenizer

    def forward(self, images_BVHWC: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor) -> Features:
        """Patches as raw tokens; as each query, its vector and the mean of the instruction's word embeddings."""
        words_BTD, mask = self.inner.vlm.get_input_embeddings()(token_ids_BT), token_mask_BT[..., None]
        said = (words_BTD * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        patches = self.inner.embed_images(images_BVHWC)
        # Word embeddings are small next to what a decoder makes of them; queries tell each other apart.
        queries = torch.nn.functional.layer_norm(said.float(), said.shape[-1:]) + self.inner.queries.float()
        return Features(
            raw_BLND=patches[:, None],
            raw_mask_BN=None,
            queries_BLQD=queries[:, None],
            points_BQE=None,
            coords_NE=self.inner.coords_N3,
        )

    def to_spec(self) -> dict[str, Any]:
        """The specification of the wrapped backbone, from which `load_backbone` builds that one again."""
        return self.inner.to_spec()
