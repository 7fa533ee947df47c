"""Named imitation runs: functions that return a TrainConfig. `vla train RECIPE`; a flag changes any field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vla.backbones.lora import LoRAConfig
from vla.model.config import BridgeConfig, VLAConfig
from vla.processing.config import AugmentConfig
from vla.training.train_config import TrainConfig


def tabletop() -> TrainConfig:
    """Imitation on two CPU cores: the tabletop suites, two cameras, the embedded backbone.

    The gates start open (tanh 1 = 0.76), unlike the paper's 0: from 0 they were still below 0.02 after 900 steps, and
    the policy read the raw patches hardly at all. Looking again after 4 of the 8 steps of a chunk is worth much more
    than it costs: the same policy succeeded in 130 of 192 episodes instead of 94. It reads the decoder's last layer
    alone: 20 demonstrations are learnt by heart from all four (33 of 200 episodes succeed instead of 87;
    docs/research-log.md).
    """
    bridge = BridgeConfig(gate_init=1.0, taps="last")
    model = VLAConfig(backbone_dtype="bfloat16", bridge=bridge, n_action_steps=4)
    return TrainConfig(model=model, steps=1300, lr=1e-3, num_threads=2)


def tabletop_few() -> TrainConfig:
    """The quickstart's imitation: a few demonstrations of things that the backbone points at.

    The bridge reads where the backbone points, and the action queries' states under noise, but no raw tokens: 20
    demonstrations are learnt by heart from those (132 of 200 episodes succeed instead of 87; docs/research-log.md).
    """
    cfg = tabletop()
    return replace(cfg, model=replace(cfg.model, bridge=replace(cfg.model.bridge, raw=False)), query_noise=6.0)


def _every_layer(cfg: TrainConfig) -> TrainConfig:
    """The same, with a block of the bridge for every layer of the backbone: what the longer runs were measured with."""
    return replace(cfg, model=replace(cfg.model, bridge=replace(cfg.model.bridge, taps=None)))


def tabletop_robust() -> TrainConfig:
    """Picking in any light, before any camera and in any words: as `tabletop`, with noise on the words.

    For demonstrations of `vla demos --randomise robust`. People say more than the suites' phrasings, so there is room
    for longer sentences.
    """
    return replace(_every_layer(tabletop()), max_text_tokens=32, word_noise=1.0)


def tabletop_ten() -> TrainConfig:
    """Ten goals in one policy (suite tabletop-ten): as `tabletop`, for longer."""
    return replace(_every_layer(tabletop()), steps=4000)


def tabletop_ten_robust() -> TrainConfig:
    """Ten goals in any light, before any camera and in any words: as `tabletop-robust`, for longer."""
    return replace(tabletop_robust(), steps=4000)


def full() -> TrainConfig:
    """The whole model learns, end to end, on augmented pictures: meant for a GPU, and not yet measured on one."""
    cfg = _every_layer(tabletop())
    model = replace(cfg.model, freeze_backbone=False)
    return replace(cfg, model=model, steps=20_000, lr=2e-4, backbone_lr=0.5, augment=AugmentConfig(), num_threads=0)


def lora() -> TrainConfig:
    """Like `full`, but only LoRA adapters (and the queries) of the backbone learn: for large backbones on one GPU."""
    cfg = full()
    return replace(
        cfg, model=replace(cfg.model, freeze_backbone=True, lora=LoRAConfig(rank=32, alpha=64.0)), backbone_lr=1.0
    )


def smoke() -> TrainConfig:
    """Seconds, not skill: does everything once. For tests and `--smoke`."""
    return TrainConfig(
        model=VLAConfig(bridge=BridgeConfig(width=64)),
        steps=20,
        batch_size=16,
        warmup_steps=5,
        log_every=5,
        save_every=10,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "tabletop": tabletop,
    "tabletop-few": tabletop_few,
    "tabletop-robust": tabletop_robust,
    "tabletop-ten": tabletop_ten,
    "tabletop-ten-robust": tabletop_ten_robust,
    "full": full,
    "lora": lora,
    "smoke": smoke,
}
