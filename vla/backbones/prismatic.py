"""Prismatic VLM with two towers (DINOv2 + SigLIP), as VLA-Adapter and OpenVLA use it, of `transformers` classes.

Per patch the two towers' channels stand side by side, a three-layer MLP maps them to a Qwen2.5 decoder (Karamcheti et
al. 2024, arXiv 2402.07865). Registered with the auto classes: a saved folder loads like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from vla.backbones.families import HALF, IMAGENET


class PrismaticConfig(PretrainedConfig):
    """Configuration of both towers and the decoder. A tower's num_hidden_layers counts the blocks that are run, one
    less than the published tower has."""

    model_type = "prismatic"
    sub_configs = {"dino_config": AutoConfig, "siglip_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        dino_config: dict[str, Any] | PretrainedConfig | None = None,
        siglip_config: dict[str, Any] | PretrainedConfig | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.dino_config = _config(dino_config, "dinov2_with_registers")
        self.siglip_config = _config(siglip_config, "siglip_vision_model")
        self.text_config = _config(text_config, "qwen2")
        super().__init__(**kwargs)


def _config(given: dict[str, Any] | PretrainedConfig | None, default: str) -> PretrainedConfig:
    if isinstance(given, PretrainedConfig):
        return given
    given = dict(given or {})
    return AutoConfig.for_model(given.pop("model_type", default), **given)


class PrismaticProjector(nn.Sequential):
    """Fused channels F -> 4F -> D -> D with GELU between."""

    def __init__(self, fused: int, width: int) -> None:
        super().__init__(
            nn.Linear(fused, 4 * fused), nn.GELU(), nn.Linear(4 * fused, width), nn.GELU(), nn.Linear(width, width)
        )


class _PrismaticBase(PreTrainedModel):
    config_class = PrismaticConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PrismaticModel(_PrismaticBase):
    """Towers, projector, decoder. Pixels come in [0, 1]."""

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__(config)
        self.vision_dino = AutoModel.from_config(config.dino_config)
        self.vision_siglip = AutoModel.from_config(config.siglip_config)
        # The last block's output as it is: published features are taken before the tower's final normalisation.
        self.vision_dino.layernorm = nn.Identity()
        self.vision_siglip.vision_model.post_layernorm = nn.Identity()
        fused = config.dino_config.hidden_size + config.siglip_config.hidden_size
        self.projector = PrismaticProjector(fused, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding of the text decoder."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding of the text decoder."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixels_MCHW: Tensor) -> Tensor:
        """(M, 3, S, S) in [0, 1] -> (M, P, D)."""
        extra = 1 + getattr(self.config.dino_config, "num_register_tokens", 0)  # class token and registers
        dino = self.vision_dino(_normalise(pixels_MCHW, *IMAGENET)).last_hidden_state[:, extra:]
        siglip = self.vision_siglip(_normalise(pixels_MCHW, *HALF)).last_hidden_state
        return self.projector(torch.cat([dino, siglip], dim=-1))


class PrismaticForConditionalGeneration(_PrismaticBase):
    """`PrismaticModel` with the language head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__(config)
        self.model = PrismaticModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding of the text decoder."""
        return self.model.get_input_embeddings()


def _normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shape = (1, 3, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


def compose(dino: str, siglip: str, decoder: str, *, seed: int = 0) -> tuple[PrismaticForConditionalGeneration, Any]:
    """Pretrained towers and decoder (names or folders) joined by a fresh projector, and the decoder's tokenizer.

    Of each tower all but the last block is kept (VLA-Adapter reads the second to last). ValueError when the towers cut
    an image into different patches.
    """
    configs = {}
    for part, name in (("dino", dino), ("siglip", siglip), ("text", decoder)):
        config = AutoConfig.from_pretrained(name)
        configs[part] = getattr(config, "vision_config", config) if part == "siglip" else config
    dino_config, siglip_config = configs["dino"], configs["siglip"]
    side = siglip_config.image_size // siglip_config.patch_size
    if siglip_config.image_size // dino_config.patch_size != side:
        raise ValueError(
            f"the towers must cut {siglip_config.image_size} pixels alike: patches of {dino_config.patch_size} and "
            f"{siglip_config.patch_size}"
        )
    for config in (dino_config, siglip_config):
        config.num_hidden_layers -= 1
    siglip_config.vision_use_head = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = configs["text"]
        vlm = PrismaticForConditionalGeneration(
            PrismaticConfig(dino_config, siglip_config, text, tie_word_embeddings=text.tie_word_embeddings)
        )
    fill(vlm.model.vision_dino, AutoModel.from_pretrained(dino, config=dino_config, dtype=torch.float32))
    tower = type(vlm.model.vision_siglip)
    fill(vlm.model.vision_siglip, tower.from_pretrained(siglip, config=siglip_config, dtype=torch.float32))
    fill(vlm.model.language_model, AutoModel.from_pretrained(decoder, dtype=torch.float32))
    return vlm, AutoTokenizer.from_pretrained(decoder)


def fill(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy every parameter of `ours` from a module that has at least those. ValueError naming the first it lacks."""
    given = theirs.state_dict()
    missing = ours.state_dict().keys() - given.keys()
    if missing:
        raise ValueError(f"the checkpoint lacks {sorted(missing)[0]}")
    ours.load_state_dict({name: given[name] for name in ours.state_dict()})


AutoConfig.register("prismatic", PrismaticConfig, exist_ok=True)
AutoModel.register(PrismaticConfig, PrismaticModel, exist_ok=True)
AutoModelForImageTextToText.register(PrismaticConfig, PrismaticForConditionalGeneration, exist_ok=True)
