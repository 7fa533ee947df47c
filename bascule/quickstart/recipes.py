"""Recipes of the quickstart: its imitation, its RL, its backbone, and the domain randomisation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from bascule.quickstart.config import QuickstartConfig
from vla.core.config import lookup

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation
    from vla.training.train_config import TrainConfig


@dataclass(frozen=True)
class QuickstartRecipe:
    """One way to run the main job."""

    imitation: str
    """Name of the recipe of `vla train`."""
    rl: str | None = None
    """Name of the recipe of `vla rl`. None: the one for the suite."""
    randomise: tuple[str, ...] = ()
    """Domain randomisation of the demonstrations and of RL, as `--randomise` takes it."""
    cells: tuple[str, ...] = ()
    """Perturbations under which the refined policy is measured besides, as `--perturb` takes them."""
    budgets: dict[str, Any] = field(default_factory=dict)
    """Fields of QuickstartConfig that differ from its defaults."""


RECIPES: dict[str, QuickstartRecipe] = {
    "tabletop": QuickstartRecipe("tabletop"),
    # A randomised environment takes 1.9 times a plain one's time (an episode of 12 decisions at 96 px: 122 ms of CPU,
    # not 66), and there is more to learn: RL has twice as long.
    "tabletop-robust": QuickstartRecipe(
        "tabletop-robust",
        rl="tabletop-robust",
        randomise=("robust",),
        cells=("texture=0.5", "light=0.5", "camera=0.5", "instruction=0.5"),
        budgets={"imitation_steps": 800, "rl_seconds": 480.0},
    ),
}


def with_budgets(config: QuickstartConfig) -> QuickstartConfig:
    """The configuration with its recipe's budgets where it has the defaults. ValueError with the nearest recipe."""
    recipe = lookup(config.recipe, RECIPES, "recipe of the quickstart")
    defaults = {each.name: each.default for each in fields(QuickstartConfig)}
    changes = {name: value for name, value in recipe.budgets.items() if getattr(config, name) == defaults[name]}
    return replace(config, **changes)


def imitation(config: QuickstartConfig) -> TrainConfig:
    """The imitation's configuration, without the run's own budget and seed."""
    from vla.training.recipes import RECIPES as TRAINED

    recipe = TRAINED[RECIPES[config.recipe].imitation]()
    if config.backbone is None:
        return recipe
    return replace(recipe, model=replace(recipe.model, backbone=config.backbone))


def training_perturbation(config: QuickstartConfig) -> Perturbation | None:
    """How demonstrations and RL's episodes differ from plain ones; None: by nothing."""
    words = RECIPES[config.recipe].randomise
    if not words:
        return None
    from envs.perturb.perturbation import randomisation

    return randomisation(words)
