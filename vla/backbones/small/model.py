"""The backbone `small`: overlapping multi-scale convolutions as eyes, a real language model's word vectors as ears.

The decoder is that of `vla.backbones.tiny`. A picture token is everything that the stem saw within 16 pixels: its
features at stride 16, and those at strides 8 and 4 side by side. The second look (`vla.backbones.pointer.SharpPointer`)
reads the same features at stride 4. The tokenizer is SmolLM2's, which spells any UTF-8 text.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PretrainedConfig

from vla.backbones.backbone import SCALE
from vla.backbones.small.stem import CHANNELS, STRIDES, Stem, Taps

MODEL_TYPE = "bascule_small"
PATCH_PX = STRIDES[-1]
_WORDS = "vlm.model.language_model.embed_tokens.weight"
"""Name of the word table among a backbone's tensors."""
_WORD_NOISE, _NOISE_SPREAD = 0.4, 0.8
"""Standard deviation of the noise on a word, where that of the table's numbers is 1: its median, and the spread of its
logarithm. One word in eight is more than its own length away from where the table has it, as a word that training never
used is from those that mean the same; it is to be guessed, and the other words weigh more."""
_STRANGE = 0.15
"""Share of the words that are heard in training as if they were another one, but for what they mean: a new word's place
in the table says nothing, the scores of its meaning do (`vla.backbones.small.word_meaning`)."""
_DRAWS = 4096
"""Rows of noise from which those of an episode's words are taken."""
_TOKEN_CHANNELS = sum(c * (PATCH_PX // stride) ** 2 for c, stride in zip(CHANNELS, STRIDES, strict=True))


class SmallConfig(PretrainedConfig):
    """Sizes of a `SmallVLM`."""

    model_type = MODEL_TYPE
    sub_configs = {"text_config": LlamaConfig}

    def __init__(
        self,
        image_size: int = 96,
        word_width: int = 96,
        text_config: Any = None,
        folded: bool = False,
        meaning_width: int = 0,
        **more: Any,
    ) -> None:
        """`image_size` px; `word_width`: numbers in a row of the word table, the last `meaning_width` of which are
        scores of a word's meaning; `text_config`: the decoder's; `folded`: the stem has no batch normalisation any
        more."""
        self.image_size, self.word_width, self.folded = image_size, word_width, folded
        self.meaning_width = meaning_width
        text = text_config if isinstance(text_config, LlamaConfig) else LlamaConfig(**(text_config or {}))
        self.text_config = text
        super().__init__(**more)


def small_config(vocab_size: int, *, image_size: int = 96, word_width: int = 96, meaning_width: int = 0) -> SmallConfig:
    """Shapes chosen for two CPU cores: 36 picture tokens a view at 96 px, four layers."""
    text = LlamaConfig(
        hidden_size=160, intermediate_size=448, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=vocab_size, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2,
        bos_token_id=None,
    )  # fmt: skip
    return SmallConfig(image_size, word_width, text, meaning_width=meaning_width)


@cache
def _noise(width: int, device: torch.device) -> Tensor:
    """(_DRAWS, width) noise of pre-training's sizes, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_DRAWS, width, generator=generator)
    size = _WORD_NOISE * (_NOISE_SPREAD * torch.randn(_DRAWS, 1, generator=generator)).exp()
    return (noise * size).to(device)


class WordTable(nn.Module):
    """Token ids -> vectors in the decoder's space: a row of a narrow table, widened by one matrix for all.

    The table comes from a large language model and is not learnt, so that a word which pre-training never used lies
    where that model had it: beside words that it did use. While training, words are heard with noise, for the same end,
    and some as another word that means the same.
    """

    def __init__(self, rows: int, width: int, out: int, meaning: int = 0) -> None:
        """A table (rows, width), its last `meaning` columns scores, for vectors of `out` numbers."""
        super().__init__()
        self.place = width - meaning
        self.weight = nn.Parameter(torch.randn(rows, width), requires_grad=False)
        self.widen = nn.Linear(width, out)
        self.num_embeddings = rows

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) -> vectors (..., D)."""
        rows = F.embedding(ids, self.weight)
        if self.training and torch.is_grad_enabled():
            if self.place < rows.shape[-1]:
                strange = torch.rand(ids.shape, device=ids.device) < _STRANGE
                rows = self._strange(rows, strange, torch.randint_like(ids, self.num_embeddings))
            scale = _WORD_NOISE * (_NOISE_SPREAD * torch.randn_like(rows[..., :1])).exp()
            rows = rows + scale * torch.randn_like(rows)
        return self.widen(rows)

    def misheard(self, ids_BT: Tensor, scale: float, episodes_B: Tensor) -> Tensor:
        """The vectors of ids (B, T) with noise of pre-training's sizes times `scale`: as of words that mean nearly the
        same. A word keeps its noise for a whole episode, whose number is in `episodes_B`."""
        rows = F.embedding(ids_BT, self.weight)
        chance = ids_BT * 7_919 + episodes_B.to(ids_BT.device)[:, None] * 104_729
        draw = chance % _DRAWS
        if self.place < rows.shape[-1]:
            rows = self._strange(rows, chance % 1_009 < _STRANGE * 1_009, chance * 31 % self.num_embeddings)
        return self.widen(rows + scale * _noise(rows.shape[-1], rows.device)[draw].to(rows.dtype))

    def _strange(self, rows: Tensor, strange: Tensor, others: Tensor) -> Tensor:
        """Rows (..., W) of the table of which the `strange` (...) ones are those of `others` (...), but for their
        meaning."""
        places = torch.where(strange[..., None], F.embedding(others, self.weight), rows)
        return torch.cat([places[..., : self.place], rows[..., self.place :]], -1)


class _WordHead(nn.Module):
    """Hidden states -> logits of all words, by the same table."""

    def __init__(self, table: WordTable, width: int) -> None:
        super().__init__()
        self.weight = table.weight
        self.narrow = nn.Linear(width, table.weight.shape[1])

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V)."""
        narrow = self.narrow(hidden)
        return F.linear(narrow, self.weight.to(narrow.dtype)) * narrow.shape[-1] ** -0.5


class _Projector(nn.Module):
    """All that the stem saw within one picture token -> a vector in the decoder's space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_TOKEN_CHANNELS)
        self.widen = nn.Linear(_TOKEN_CHANNELS, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, taps: Taps) -> Tensor:
        """Features at three strides -> tokens (M, P, D), row by row."""
        side_by_side = [F.pixel_unshuffle(tap, PATCH_PX // stride) for tap, stride in zip(taps, STRIDES, strict=True)]
        tokens = torch.cat(side_by_side, 1).flatten(2).transpose(1, 2)
        return self.narrow(F.gelu(self.widen(self.norm(tokens))))


class _SmallModel(nn.Module):
    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        text = config.text_config
        self.vision_tower = Stem()
        if config.folded:
            self.vision_tower.fold()
        self.multi_modal_projector = _Projector(text.hidden_size)
        frame = LlamaConfig(**{**text.to_dict(), "vocab_size": 1, "pad_token_id": None, "eos_token_id": None})
        self.language_model = LlamaModel(frame)
        self.language_model.embed_tokens = WordTable(
            text.vocab_size, config.word_width, text.hidden_size, config.meaning_width
        )
        self.language_model.config = text

    def get_input_embeddings(self) -> WordTable:
        return self.language_model.embed_tokens


class SmallVLM(nn.Module):
    """A vision-language model with the attributes that `vla.backbones.backbone.Backbone` asks of one."""

    def __init__(self, config: SmallConfig, *, attention: str = "bascule_lean") -> None:
        """`attention`: name of an implementation that `transformers` knows."""
        super().__init__()
        config._attn_implementation = config.text_config._attn_implementation = attention
        self.config = config
        self.model = _SmallModel(config)
        self.lm_head = _WordHead(self.model.get_input_embeddings(), config.text_config.hidden_size)

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        """Recompute the decoder's layers in the backward pass; `options` as in `transformers`."""
        self.model.language_model.gradient_checkpointing_enable(options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the decoder's layers compute again."""
        self.model.language_model.gradient_checkpointing_disable()

    def disable_input_require_grads(self) -> None:
        """Let frozen words be without gradients."""
        self.model.language_model.disable_input_require_grads()

    def get_input_embeddings(self) -> WordTable:
        """The word table."""
        return self.model.get_input_embeddings()

    def fold(self) -> None:
        """Multiply the stem's batch normalisation into its convolutions: pre-training is over."""
        self.model.vision_tower.fold()
        self.config.folded = True

    @staticmethod
    def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to write: the word table, most of them, as whole numbers of eight bits and a scale for each row."""
        rows = tensors[_WORDS].float()
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
        return {**tensors, _WORDS: (rows / scale).round().to(torch.int8), _WORDS + SCALE: scale}

    def tie_weights(self) -> None:
        """Head and table share their rows already."""
        self.lm_head.weight = self.model.get_input_embeddings().weight
