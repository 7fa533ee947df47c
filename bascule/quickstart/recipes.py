"""Recipes of the quickstart: its imitation, its RL, its backbone, and the domain randomisation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.quickstart.config import QuickstartConfig
from vla.core.config import load_json, lookup
from vla.model.config import DEFAULT_BACKBONE, RETIRED_BACKBONES

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation
    from vla.training.train_config import TrainConfig


@dataclass(frozen=True)
class QuickstartRecipe:
    """One way to run the main job."""

    imitation: str
    """Name of the recipe of `vla train`."""
    unpointed: str | None = None
    """The same for a backbone that points at nothing. None: no other."""
    rl: str | None = None
    """Name of the recipe of `vla rl`. None: the one for the suite."""
    randomise: tuple[str, ...] = ()
    """Domain randomisation of the demonstrations and of RL, as `--randomise` takes it."""
    cells: tuple[str, ...] = ()
    """Perturbations under which the refined policy is measured besides, as `--perturb` takes them."""
    budgets: dict[str, Any] = field(default_factory=dict)
    """Fields of QuickstartConfig that differ from its defaults."""


RECIPES: dict[str, QuickstartRecipe] = {
    "tabletop": QuickstartRecipe("tabletop-few", unpointed="tabletop"),
    # A randomised environment takes 1.9 times a plain one's time (an episode of 12 decisions at 96 px: 122 ms of CPU,
    # not 66), and there is more to learn. Of twelve runs with eight minutes each the median made 18 updates.
    "tabletop-robust": QuickstartRecipe(
        "tabletop-robust",
        rl="tabletop-robust",
        randomise=("robust",),
        cells=("texture=0.5", "light=0.5", "camera=0.5", "instruction=0.5"),
        budgets={"imitation_steps": 800, "rl_updates": 18, "rl_seconds": 1920.0},
    ),
}

_COUNTED = ("tabletop-pick", "tabletop-pick-guided", "tabletop-robust")
"""Recipes of `vla rl` for which it is known how many updates the quickstart's minutes hold."""
_SECONDS = 240.0
"""The budget of the others."""


def with_budgets(config: QuickstartConfig, given: Collection[str] | None = None) -> QuickstartConfig:
    """The configuration with its recipe's budgets in the fields that are not `given` (None: that have the defaults).

    The time limit of RL grows with a number of updates that was given. Suites of which no number of updates is known
    have a budget of seconds. ValueError with the nearest recipe or suite.
    """
    recipe = lookup(config.recipe, RECIPES, "recipe of the quickstart")
    budgets = {each.name: each.default for each in fields(QuickstartConfig)} | recipe.budgets
    if given is None:
        given = [each.name for each in fields(QuickstartConfig) if getattr(config, each.name) != each.default]
    if rl_recipe(config) not in _COUNTED:
        budgets |= {"rl_updates": None, "rl_seconds": None if "rl_updates" in given else _SECONDS}
    elif "rl_updates" in given and config.rl_updates is not None:
        budgets["rl_seconds"] *= max(1.0, config.rl_updates / budgets["rl_updates"])
    names = {"rl_updates", "rl_seconds"} | recipe.budgets.keys()
    return replace(config, **{name: budgets[name] for name in sorted(names) if name not in given})


def rl_recipe(config: QuickstartConfig) -> str:
    """Name of the RL recipe: the run's recipe names it, or it is that of the suite, with a privileged teacher if its
    environments provide privileged state. ValueError with the nearest suite."""
    if (named := RECIPES[config.recipe].rl) is not None:
        return named
    from envs.registry import load_suite

    loaded = load_suite(config.suite)
    if loaded.plane is None:
        return "tabletop-pick"
    if loaded.plane.turns:
        return "tabletop-pick-guided"
    return "multitask-few" if len(loaded.tasks) > 1 else "robosuite-lift-guided"


_EARLIER_BACKBONES = {"tabletop": "tiny-goals"}
"""Backbones of recipes that have another one by now, for runs that do not name theirs: they were begun before."""


def with_backbone(config: QuickstartConfig, *, begun: bool = False) -> QuickstartConfig:
    """The configuration with its backbone named. `begun`: it is that of a run that is there already."""
    name = config.backbone or (_EARLIER_BACKBONES.get(config.recipe) if begun else None)
    return replace(config, backbone=name or imitation(config).model.backbone)


def imitation(config: QuickstartConfig) -> TrainConfig:
    """The imitation's configuration, without the run's own budget and seed."""
    from vla.training.recipes import RECIPES as TRAINED

    wanted = RECIPES[config.recipe]
    recipe = TRAINED[wanted.imitation if wanted.unpointed is None or _points(config.backbone) else wanted.unpointed]()
    if config.backbone is None:
        return recipe
    return replace(recipe, model=replace(recipe.model, backbone=config.backbone))


def _points(backbone: str | None) -> bool:
    """True for a backbone that points at what is named: those of `vla pretrain`, shipped or in a folder."""
    if backbone in (None, DEFAULT_BACKBONE, *RETIRED_BACKBONES):
        return True
    from vla.backbones.backbone import SPEC_FILE

    spec = Path(backbone) / SPEC_FILE
    return spec.is_file() and load_json(spec).get("pointing", True)


def training_perturbation(config: QuickstartConfig) -> Perturbation | None:
    """How demonstrations and RL's episodes differ from plain ones; None: by nothing."""
    words = RECIPES[config.recipe].randomise
    if not words:
        return None
    from envs.perturb.perturbation import randomisation

    return randomisation(words)
