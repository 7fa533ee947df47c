"""An untrained policy on the backbone `small`, two of its four layers, reading 64 pixels and spelling its words."""

from pathlib import Path
from typing import Any

from tests.vla.backbones.test_small import spelling
from tests.vla.toy_backbone import CAMERAS, SPEC, toy_stats
from vla.backbones.small.create import build_small
from vla.backbones.small.model import small_config
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA


def small_policy(folder: Path, **model: Any) -> Path:
    """Its checkpoint, written to `folder`. `model`: further fields of its configuration."""
    tokenizer = spelling()
    config = small_config(len(tokenizer), image_size=64, word_width=16)
    config.text_config.num_hidden_layers = 2
    bridge = BridgeConfig(width=32, gate_init=0.5)
    vla = VLA.build(
        VLAConfig(backbone="small", bridge=bridge, chunk_size=8, n_action_steps=4, **model),
        stats=toy_stats(), action_spec=SPEC, cameras=CAMERAS, max_text_tokens=64,
        backbone=build_small(config, tokenizer, num_queries=8, seed=0).eval(),
    )  # fmt: skip
    vla.save(folder)
    return folder
