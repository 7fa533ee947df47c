"""`vla experiment l2m`: half of a suite's tasks learnt by imitation, the others added one after another, without the
demonstrations of those before. What is left of the old tasks, and what was learnt of the new ones.

May import every package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.experiments.arms import Report, Row, compare, evaluation_scenes
from bascule.experiments.continual.learning import ALONE, Curriculum, owners
from vla.core.config import lookup
from vla.model.config import DEFAULT_BACKBONE, ModulatorConfig

if TYPE_CHECKING:
    from torch import Tensor

    from vla.model.modulators import Pool
    from vla.model.routing import Rule

POOL = ModulatorConfig(count=10)
ARMS = ("before", "full", "one-lora", "oracle", "l2m", "l2m-observation", "random")
KNOWN = "known"
"""Stands for the choice of no modulator."""


@dataclass(frozen=True)
class L2MConfig:
    """Learning without forgetting: equal demonstrations, steps and evaluation scenes for every arm."""

    suite: str = "tabletop-ten"
    """The suite to evaluate in."""
    known_tasks: tuple[str, ...] | None = None
    """Tasks that the policy learns together, first. Default: the first half of the suite's."""
    new_tasks: tuple[str, ...] | None = None
    """Tasks that it learns later, in this order. Default: the others of the suite's."""
    arms: tuple[str, ...] = ARMS
    """before: the known tasks alone; full: bridge and head are fine-tuned; one-lora: one set of low-rank matrices for
    all new tasks; l2m: a pool, and nobody tells the task; oracle: the same, and the task is told; random: the same,
    chosen at random, a control; l2m-observation: modulators are assigned observation by observation, as published."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and initial weights."""
    demos: int = 30
    """Demonstrations of each task."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 1500
    """Gradient steps on the known tasks; a new one has a fifth of them."""
    episodes: int = 20
    """Evaluation scenes of each task."""
    num_envs: int = 20
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""


def l2m(config: L2MConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """Every arm with every seed; `arms.compare` says what is returned. Its columns: "known" and "new", successes of
    both kinds of tasks, and "key_match", the share of episodes for which the right modulator was chosen, or none.
    ValueError for an unknown arm or task."""
    for arm in config.arms:
        lookup(arm, dict.fromkeys(ARMS), "arm")
    known, new = tasks_of(config)

    def of(tasks: Sequence[str]) -> Callable[[list[Row]], str]:
        return lambda rows: "{}/{}".format(*(sum(row["tasks"][t][i] for row in rows for t in tasks) for i in (0, 1)))

    def matched(rows: list[Row]) -> float | str:
        parts = [row["key_match"] for row in rows if row["key_match"] is not None]
        return round(sum(k for k, _ in parts) / sum(n for _, n in parts), 3) if parts else ""

    return compare(
        "l2m", config.arms, config.seeds, partial(_learn_and_evaluate, config, out), out,
        asked={"known": list(known), "new": list(new)}
        | {name: getattr(config, name) for name in ("suite", "demos", "backbone", "steps", "episodes")},
        figures={"known": of(known), "new": of(new), "key_match": matched},
        on_progress=on_progress,
    )  # fmt: skip


def tasks_of(config: L2MConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tasks known before, and the new ones in their order. ValueError for one that the suite does not have."""
    from envs.registry import load_suite

    every = load_suite(config.suite).tasks
    for task in (*(config.known_tasks or ()), *(config.new_tasks or ())):
        lookup(task, dict.fromkeys(every), f"task of {config.suite}")
    known = config.known_tasks or tuple(t for t in every[: len(every) // 2] if t not in (config.new_tasks or ()))
    new = config.new_tasks or tuple(task for task in every if task not in known)
    if not known or not new or set(known) & set(new):
        raise ValueError("known and new tasks must be some each, and none may be both: --known-tasks, --new-tasks")
    return known, new


def curriculum(config: L2MConfig, seed: int, out: Path) -> Curriculum:
    """The seed's demonstrations, recorded unless they are there, and how they are learnt from."""
    from envs.demos.record import record
    from envs.seeds import DEMO_BLOCK
    from vla.backbones.hub import load as load_backbone
    from vla.core.types import IMAGE_SIZE
    from vla.data.lerobot_dataset import DemoSet, load_dataset
    from vla.training.recipes import RECIPES

    known, new = tasks_of(config)
    folder = out / f"seed-{seed}"
    size = getattr(load_backbone(config.backbone), "image_size", IMAGE_SIZE)
    first_seed = DEMO_BLOCK * seed

    def shown(name: str, tasks: Sequence[str], count: int) -> DemoSet:
        nonlocal first_seed
        made = record(
            config.suite, count, folder / f"demos-{name}", seed0=first_seed, num_workers=config.workers,
            image_size=size, tasks=tasks,
        )  # fmt: skip
        first_seed += 2 * count  # the expert fails at some
        return load_dataset(made)

    recipe = RECIPES["tabletop-few"]()
    recipe = replace(recipe, seed=seed, num_threads=1, model=replace(recipe.model, backbone=config.backbone))
    return Curriculum(
        known=shown(KNOWN, known, config.demos * len(known)),
        new={task: shown(task, [task], config.demos) for task in new},
        first=replace(recipe, steps=config.steps),
        later=replace(recipe, steps=max(1, config.steps // 5), warmup_steps=min(50, config.steps // 5)),
        later_lr=3 * recipe.lr,
        folder=folder,
    )


def _learn_and_evaluate(config: L2MConfig, out: Path, arm: str, seed: int) -> Row:
    """The arm's policy in every task: {"tasks": {task: [successes, episodes]}, "chosen": {task: {who: episodes}}}."""
    from vla.model.modulators import IDENTITY

    lessons = curriculum(config, seed, out)
    known, new = tasks_of(config)
    every = (*known, *new)
    played: dict[str, Any] = {"tasks": {}, "chosen": {}, "wrong_object": 0}
    learnt: dict[int, str] = {}
    sizes: dict[str, int] = {}
    if arm == "before":
        _play(config, lessons.known_policy(), every, played)
    elif arm == "full":
        _play(config, lessons.one_after_another(arm, None)[-1], every, played)
    elif arm == "one-lora":
        _play(config, lessons.one_after_another(arm, ALONE)[-1], every, played, lambda task: _always(0))
    else:
        if arm == "l2m-observation":
            stages = lessons.one_after_another(arm, replace(POOL, assign="observation"))
        else:  # the pool is the same; they differ in who chooses
            stages = lessons.one_after_another("l2m", POOL)
        learnt = owners(stages, list(new))
        told = {task: number for number, task in learnt.items()}
        at_random = _at_random(seed)
        rules: dict[str, Callable[[str], Rule]] = {
            "oracle": lambda task: _always(told.get(task, IDENTITY)), "random": lambda task: at_random,
        }  # fmt: skip
        _play(config, stages[-1], every, played, rules.get(arm), learnt)
        sizes = _sizes(lessons.known_policy(), stages[-1], len(learnt))
    counts = played["tasks"].values()
    return {
        "successes": sum(k for k, _ in counts),
        "episodes": sum(n for _, n in counts),
        **played,
        "key_match": key_match(played["chosen"], known) if learnt else None,
        **sizes,
    }


def key_match(chosen: Mapping[str, Mapping[str, int]], known: Sequence[str]) -> list[int]:
    """[episodes for which the right choice was made, all episodes]: none for a known task, and for a new one a
    modulator that has learnt most from it."""
    right = sum(counts.get(KNOWN if task in known else task, 0) for task, counts in chosen.items())
    return [right, sum(sum(counts.values()) for counts in chosen.values())]


def _play(
    config: L2MConfig,
    folder: Path,
    tasks: Sequence[str],
    played: dict[str, Any],
    rules: Callable[[str], Rule] | None = None,
    learnt: Mapping[int, str] | None = None,
) -> None:
    """Add the policy's episodes of these tasks to `played`. `rules`: how it chooses in a task, if not as it has learnt
    to; `learnt`: what each modulator stands for, to note what was chosen."""
    from envs.evaluation.evaluate import evaluate
    from envs.evaluation.one_task import OneTask
    from vla.model.policy import VLAPolicy

    policy = VLAPolicy.load(folder)
    learnt_rule = policy.routing.rule
    with evaluation_scenes(config, policy) as (env, seeds):
        for task in tasks:
            noted: list[int] = []
            policy.routing.rule = _noting(learnt_rule if rules is None else rules(task), noted)
            report = evaluate(policy, OneTask(env, task), seeds)  # type: ignore[arg-type]
            played["tasks"][task] = [report.successes, report.episodes]
            played["wrong_object"] += report.wrong_object
            if learnt:
                played["chosen"][task] = dict(Counter(learnt.get(number, KNOWN) for number in noted))


def _noting(rule: Rule, noted: list[int]) -> Rule:
    """The same rule, whose choices are added to `noted`."""

    def choose(pool: Pool, query_BK: Tensor) -> Tensor:
        chosen_B = rule(pool, query_BK)
        noted.extend(chosen_B.tolist())
        return chosen_B

    return choose


def _always(number: int) -> Rule:
    """The oracle's rule: this modulator."""
    return lambda pool, query_BK: query_BK.new_full((len(query_BK),), number).long()


def _at_random(seed: int) -> Rule:
    """The control's rule: any modulator that has learnt something, or none, with equal chances."""
    import torch

    from vla.model.modulators import IDENTITY

    generator = torch.Generator().manual_seed(seed)

    def rule(pool: Pool, query_BK: Tensor) -> Tensor:
        choices = torch.cat([torch.tensor([IDENTITY]), pool.counts_M.nonzero().flatten()])
        return choices[torch.randint(len(choices), (len(query_BK),), generator=generator)]

    return rule


def _sizes(before: Path, after: Path, used: int) -> dict[str, int]:
    """Modulators in use, and the bytes that each adds to the checkpoint."""
    grown = (after / "model.safetensors").stat().st_size - (before / "model.safetensors").stat().st_size
    return {"modulators": used, "bytes_each": grown // POOL.count}
