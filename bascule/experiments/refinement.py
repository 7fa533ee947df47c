"""`vla experiment rl`: ways to refine one imitation policy, at equal control steps, over seeds.

May import every package. Every arm of a seed starts from the same imitation policy and is scored on the
same scenes; the policy scored is the best on validation scenes, for all arms. What is finished is kept in OUT.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes, imitate
from vla.core.config import lookup
from vla.model.config import DEFAULT_BACKBONE

if TYPE_CHECKING:
    from rl.configs.run import RunnerConfig
    from rl.runner import Runner
    from vla.core.types import Policy, VecEnv

Change = Callable[["RunnerConfig"], "RunnerConfig"]
SAC_CHECKPOINTS = 8
"""How often the residual is validated, as the other arms are on their way."""


@dataclass(frozen=True)
class RLConfig:
    """Variants of online RL, compared at equal control steps and evaluation scenes."""

    suite: str = "tabletop-pick"
    """The suite to evaluate in."""
    arms: tuple[str, ...] = (
        "imitation", "ppo", "no-critic-warmup", "bf16-logprob", "no-kl-stop", "grpo", "filtered", "residual-sac",
        "guided",
    )  # fmt: skip
    """imitation: the initial policy of all arms. guided: with a privileged teacher trained on the same demonstrations,
    whose control steps count. Also available: shaped (a learnt progress reward, whose episodes count), rloo, bridge
    (everything after the backbone learns), independent-noise (ppo's is correlated)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and imitation policy."""
    demos: int = 100
    """Number of demonstrations."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 700
    """Training steps of imitation."""
    control_steps: int = 200_000
    """Control steps of every arm, summed over all environments."""
    episodes: int = 300
    """Evaluation scenes, the same for every arm and seed."""
    validation_episodes: int = 96
    """Number of other scenes on which every arm's best checkpoint is selected during training."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def _arms() -> dict[str, Change | None]:
    """The change each arm makes to the recipe `tabletop-pick`; None: the arm does not use the RL runner."""
    from rl.recipes import tabletop_pick_filtered, tabletop_pick_grpo, tabletop_pick_guided, tabletop_pick_shaped

    def ppo(**changes: Any) -> Change:
        return lambda config: replace(config, ppo=replace(config.ppo, **changes))

    def actor(**changes: Any) -> Change:
        return lambda config: replace(config, actor=replace(config.actor, **changes))

    def method(how: Any) -> Change:
        return lambda config: replace(config, method=how, eval_every=2)

    def guided(config: RunnerConfig) -> RunnerConfig:
        recipe = tabletop_pick_guided()
        return replace(config, calibrate_scales=(), actor=recipe.actor, ppo=recipe.ppo, guide=recipe.guide)

    grpo, filtered = tabletop_pick_grpo().method, tabletop_pick_filtered().method
    return {
        "imitation": None,
        "ppo": ppo(),
        "no-critic-warmup": ppo(critic_warmup=0),
        "bf16-logprob": actor(log_prob_dtype="bfloat16"),
        "no-kl-stop": ppo(kl_stop=1e9),
        "independent-noise": actor(correlation=0.0),
        "bridge": lambda config: actor(refiner_width=0)(ppo(lr=6e-5, epochs=4)(config)),
        "shaped": lambda config: replace(config, shaping=tabletop_pick_shaped().shaping),
        "grpo": method(grpo),
        "rloo": method(replace(grpo, baseline="rloo")),
        "filtered": method(filtered),
        "residual-sac": None,
        "guided": guided,
    }


def rl(config: RLConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed; `arms.compare` says what is returned. ValueError for an unknown arm."""
    for arm in config.arms:
        lookup(arm, _arms(), "arm")
    return compare(
        "rl", config.arms, config.seeds, partial(_run, config, out), out,
        asked={name: value for name, value in asdict(config).items() if name not in ("arms", "seeds", "workers")},
        figures=FIGURES,
        on_progress=on_progress,
    )  # fmt: skip


def _sampled(rows: list[Row]) -> list[int] | None:
    """[successes, episodes] of the policies that sample their actions; None where the arm has none."""
    counts = [row["sampled"] for row in rows if row["sampled"] is not None]
    return [sum(column) for column in zip(*counts, strict=True)] if counts else None


FIGURES: dict[str, Callable[[list[Row]], Any]] = {
    "sampled": _sampled,
    "control_steps": lambda rows: [row["control_steps"] for row in rows],
    "seconds": lambda rows: [row["train_seconds"] for row in rows],
}
"""Columns beside an arm's success, from its rows of all seeds."""


def _run(config: RLConfig, out: Path, arm: str, seed: int) -> Row:
    from vla.model.policy import VLAPolicy

    folder = out / f"imitation-policy-{seed}"  # trained once, shared by the seed's arms
    before = VLAPolicy(imitate(config, seed, out, folder))
    began = time.monotonic()
    with evaluation_scenes(config, before) as (env, seeds):
        learn = {"imitation": untrained, "residual-sac": _residual}.get(arm, _refined)
        learnt = learn(config, arm, seed, folder, out / f"{arm}-{seed}", env)
        return row_of(config, learnt, env, seeds, time.monotonic() - began)


Learnt = tuple[dict[str, "Policy"], dict[str, Any]]
"""({"greedy": ..., "sampled": ...}, figures)."""


def row_of(config: RefinementConfig, learnt: Learnt, env: VecEnv, seeds: range, train_seconds: float) -> Row:
    """The row of an arm and a seed: its policies in the evaluation scenes, greedy and (if there is one) sampled."""
    from envs.evaluation.evaluate import evaluate

    policies, figures = learnt
    reports = {name: evaluate(policy, env, seeds, suite=config.suite) for name, policy in policies.items()}
    greedy, sampled = reports["greedy"], reports.get("sampled")
    return figures | {
        "successes": greedy.successes,
        "episodes": greedy.episodes,
        "wrong_object": greedy.wrong_object,
        "sampled": None if sampled is None else [sampled.successes, sampled.episodes],
        "train_seconds": round(train_seconds, 1),
    }


def untrained(config: RefinementConfig, arm: str, seed: int, folder: Path, out: Path, env: VecEnv) -> Learnt:
    """The policy in `folder` as it is."""
    from rl.recipes import tabletop_pick
    from vla.model.policy import VLAPolicy

    steps = tabletop_pick().n_action_steps
    return {"greedy": VLAPolicy.load(folder, n_action_steps=steps)}, {"control_steps": 0, "stopped_by": ""}


def _refined(config: RLConfig, arm: str, seed: int, folder: Path, out: Path, env: VecEnv) -> Learnt:
    from rl.recipes import tabletop_pick

    change = _arms()[arm]
    assert change is not None, "an arm of the runner's"
    return refine(config, change(at_equal_steps(tabletop_pick(), config, seed)), folder, out, env)


class RefinementConfig(Protocol):
    """The fields of an experiment's configuration that say how much an arm plays."""

    suite: str
    control_steps: int
    validation_episodes: int
    num_envs: int


def at_equal_steps(recipe: RunnerConfig, config: RefinementConfig, seed: int) -> RunnerConfig:
    """A recipe with the experiment's control steps as its only budget."""
    from envs.seeds import RL_TRAIN_SEEDS

    return replace(
        recipe, suite=config.suite, seed=seed, num_envs=config.num_envs, train_seeds=RL_TRAIN_SEEDS,
        max_env_steps=config.control_steps, max_updates=1_000_000, max_seconds=None, target_success=None, eval_every=4,
        calibrate_episodes=min(recipe.calibrate_episodes, config.validation_episodes),
    )  # fmt: skip


def refine(
    config: RefinementConfig,
    recipe: RunnerConfig,
    folder: Path,
    out: Path,
    env: VecEnv,
    *,
    prepare: Callable[[Runner], None] | None = None,
) -> Learnt:
    """The policy in `folder`, refined in `out` as the recipe says: greedy and sampled. `prepare` may change the runner
    before it begins."""
    import torch

    from rl.models.actor import SampledPolicy
    from rl.runner import Runner
    from vla.data.lerobot_dataset import load_dataset
    from vla.model.model import VLA

    demos = None if recipe.guide is None else load_dataset(out.parent / f"demos-{recipe.seed}")
    runner = Runner(VLA.load(folder), env, recipe, out, evaluate=validation(config, env), demos=demos)
    if prepare is not None:
        prepare(runner)
    result = runner.run(resume=(out / "last").exists())
    noise = torch.Generator().manual_seed(recipe.seed)
    sampled = SampledPolicy(runner.actor, env.action_spec, runner.collector.n_action_steps, generator=noise)
    return {"greedy": runner.greedy_policy(), "sampled": sampled}, {
        "control_steps": result.env_steps,
        "updates": result.updates,
        "best_update": result.best_update,
        "std_scale": result.std_scale,
        "stopped_by": result.stopped_by,
        "evaluations": [list(row) for row in result.evaluations],
    }


def _residual(config: RLConfig, arm: str, seed: int, folder: Path, out: Path, env: VecEnv) -> Learnt:
    from envs import make_vec
    from envs.sim.render_options import drawn_for
    from rl.external.residual_sac import ResidualConfig, ResidualPolicy, learn_residual, save_residual
    from rl.recipes import tabletop_pick
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy

    vla = VLA.load(folder)
    how = ResidualConfig(n_action_steps=tabletop_pick().n_action_steps, demo_episodes=config.num_envs)
    # its environments must not be disturbed by validation in between
    drawn = drawn_for(VLAPolicy(vla))
    referee = make_vec(config.suite, config.num_envs, num_workers=config.workers, **drawn)
    try:
        validate, seen = validation(config, referee), []

        def judge(model: Any) -> float:
            successes, episodes = validate(ResidualPolicy(vla, model, how, config.num_envs))
            seen.append([len(seen), successes, episodes])
            return successes / episodes

        model, figures = learn_residual(
            env, vla, how, control_steps=config.control_steps, seed=seed, judge=judge, checkpoints=SAC_CHECKPOINTS
        )
    finally:
        referee.close()
    save_residual(model, out)
    return {"greedy": ResidualPolicy(vla, model, how, config.num_envs)}, figures | {"evaluations": seen}


def validation(config: RefinementConfig, env: VecEnv) -> Callable[[Policy], tuple[int, int]]:
    """Plays a policy on the scenes by which an arm's best is chosen -> (successes, episodes)."""
    from envs.evaluation.evaluate import evaluate
    from envs.seeds import VALIDATION_SEED0

    def play(policy: Policy) -> tuple[int, int]:
        seeds = range(VALIDATION_SEED0, VALIDATION_SEED0 + config.validation_episodes)
        report = evaluate(policy, env, seeds, suite=config.suite)
        return report.successes, report.episodes

    return play
