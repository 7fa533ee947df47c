"""`vla experiment token-ppo`: PPO over action tokens, in VLA-RL's form and in VL-DAC's, beside PPO of Gaussians.

Every arm of a seed starts from one of two imitation policies of the same demonstrations: one whose head chooses among
bins, one whose head regresses. Scenes, control steps and the choice of the best are the same for all arms. What is
finished is kept in OUT.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes, imitate
from bascule.experiments.refinement import FIGURES, at_equal_steps, refine, row_of, untrained
from vla.core.config import lookup
from vla.model.config import DEFAULT_BACKBONE

if TYPE_CHECKING:
    import torch

    from rl.configs.run import RunnerConfig
    from rl.runner import Runner
    from vla.model.config import VLAConfig


@dataclass(frozen=True)
class TokenPPOConfig:
    """PPO over action tokens beside PPO of Gaussians, from the same demonstrations, at equal control steps."""

    suite: str = "tabletop-pick"
    """The suite to learn and to evaluate in."""
    arms: tuple[str, ...] = ("bins", "tokens", "decoupled", "exchanged", "l1", "gaussian")
    """bins, l1: the imitation policies, with these heads. tokens: PPO with one ratio a decision, as VLA-RL. decoupled:
    with a ratio for each token, as VL-DAC. gaussian: the L1 policy by PPO of Gaussians. exchanged: as tokens, with
    every decision's advantage given to another one, which must not learn. Also available: latents (decoupled, with the
    value of the policy's own latents), no-critic-warmup, cool (temperature 1), shaped (a learnt progress reward, whose
    episodes count), curriculum, frequencies (imitation) and frequency-tokens (its PPO)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and imitation policies."""
    demos: int = 20
    """Number of demonstrations."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 1300
    """Training steps of imitation, by the recipe `tabletop-few`."""
    control_steps: int = 60_000
    """Control steps of every arm that learns by RL, summed over all environments."""
    decisions: int = 10
    """Decisions of every environment between two updates: half the recipes' number, so that few control steps make
    twice as many updates."""
    episodes: int = 200
    """Evaluation scenes, the same for every arm and seed."""
    validation_episodes: int = 48
    """Number of other scenes on which every arm's best checkpoint is selected during training."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


@dataclass(frozen=True)
class Arm:
    """One way to learn."""

    head: str
    """The head of the imitation policy that it starts from."""
    recipe: Callable[[], RunnerConfig] | None = None
    """None: the imitation policy is the arm."""
    exchanged: bool = False
    """A control: advantages are those of other decisions."""


def arms() -> dict[str, Arm]:
    """Every arm by name."""
    from rl.configs.run import CurriculumConfig
    from rl.recipes import tabletop_pick, tabletop_pick_decoupled, tabletop_pick_shaped, tabletop_pick_tokens

    def tokens(**changes: Any) -> Callable[[], RunnerConfig]:
        return lambda: replace(tabletop_pick_tokens(), **changes)

    def latents() -> RunnerConfig:
        recipe = tabletop_pick_decoupled()
        return replace(recipe, critic=replace(recipe.critic, reads="latents"))

    base = tabletop_pick_tokens()
    return {
        "bins": Arm("bins"),
        "tokens": Arm("bins", tabletop_pick_tokens),
        "decoupled": Arm("bins", tabletop_pick_decoupled),
        "exchanged": Arm("bins", tabletop_pick_tokens, exchanged=True),
        "l1": Arm("l1"),
        "gaussian": Arm("l1", tabletop_pick),
        "latents": Arm("bins", latents),
        "no-critic-warmup": Arm("bins", tokens(ppo=replace(base.ppo, critic_warmup=0))),
        "cool": Arm("bins", tokens(actor=replace(base.actor, temperature=1.0))),
        "shaped": Arm("bins", tokens(shaping=tabletop_pick_shaped().shaping)),
        "curriculum": Arm("bins", tokens(curriculum=CurriculumConfig())),
        "frequencies": Arm("frequencies"),
        "frequency-tokens": Arm("frequencies", tabletop_pick_tokens),
    }


def token_ppo(config: TokenPPOConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed; `arms.compare` says what is returned. ValueError for an unknown arm."""
    for arm in config.arms:
        lookup(arm, arms(), "arm")
    return compare(
        "token-ppo", config.arms, config.seeds, partial(_run, config, out), out,
        asked={name: value for name, value in asdict(config).items() if name not in ("arms", "seeds", "workers")},
        figures=FIGURES, on_progress=on_progress,
    )  # fmt: skip


def _run(config: TokenPPOConfig, out: Path, name: str, seed: int) -> Row:
    from vla.model.policy import VLAPolicy

    arm = arms()[name]
    folder = out / f"{arm.head}-policy-{seed}"  # trained once, shared by the seed's arms

    def change(model: VLAConfig) -> VLAConfig:
        return replace(model, head=arm.head)

    before = VLAPolicy(imitate(config, seed, out, folder, change, recipe_name="tabletop-few"))
    began = time.monotonic()
    with evaluation_scenes(config, before) as (env, seeds):
        if arm.recipe is None:
            learnt = untrained(config, name, seed, folder, out, env)
        else:
            recipe = at_equal_steps(arm.recipe(), config, seed)
            recipe = replace(recipe, decisions_per_update=config.decisions, eval_every=8)
            prepare = exchange if arm.exchanged else None
            learnt = refine(config, recipe, folder, out / f"{name}-{seed}", env, prepare=prepare)
        return row_of(config, learnt, env, seeds, time.monotonic() - began)


def exchange(runner: Runner) -> None:
    """Give every decision the advantage of another one of its rollout: what is learnt then is noise, in steps of the
    same size."""
    estimate = runner.learner.estimate

    def exchanged(buffer: Any) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        targets = estimate(buffer)
        order = torch.randperm(buffer.size, generator=runner.learner.generator)
        buffer.advantages_TN = buffer.advantages_B[order].view_as(buffer.advantages_TN)
        return targets

    runner.learner.estimate = exchanged
