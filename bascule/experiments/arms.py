"""Shared steps of the experiments: demonstrations, imitation, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vla.model.config import VLAConfig
    from vla.model.model import VLA

    Variant = Callable[[VLAConfig], VLAConfig]


class ImitationConfig(Protocol):
    """The fields of an experiment's configuration that its imitation policies depend on."""

    suite: str
    demos: int
    steps: int
    backbone: str
    workers: int


def imitate(config: ImitationConfig, seed: int, out: Path, folder: Path, variant: Variant | None = None) -> VLA:
    """The seed's imitation policy in `folder`, from demonstrations in `out`; an interrupted run continues
    exactly where it was. KeyboardInterrupt when it is stopped again."""
    from envs.demos.record import record
    from envs.seeds import DEMO_BLOCK
    from vla.data.lerobot_dataset import load_dataset
    from vla.training.recipes import RECIPES
    from vla.training.train import build_vla, train

    demos = load_dataset(
        record(config.suite, config.demos, out / f"demos-{seed}", seed0=DEMO_BLOCK * seed, num_workers=config.workers)
    )
    recipe = RECIPES["tabletop"]()
    model = replace(recipe.model, backbone=config.backbone)
    recipe = replace(recipe, steps=config.steps, seed=seed, model=variant(model) if variant else model)
    model = build_vla(recipe, demos)
    if train(recipe, model, demos, folder, resume=(folder / "config.json").exists()).interrupted:
        raise KeyboardInterrupt
    return model
