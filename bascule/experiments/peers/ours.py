"""Our own arms of `vla experiment peers`: imitation by a recipe, and online RL after it."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.experiments.peers.budget import Budget, Learnt, clock, on_gpu, steps_within
from vla.runtime.devices import choose_device

if TYPE_CHECKING:
    from vla.model.model import VLA
    from vla.training.train_config import TrainConfig

CALIBRATION_STEPS = 20
RL_RECIPES = {"tabletop-pick": "tabletop-pick-guided", "robosuite-lift": "robosuite-lift-guided"}
"""By suite; the others are refined by `multitask`."""


def imitate(
    dataset: Path, folder: Path, budget: Budget, *, recipe: str, backbone: str, batch_size: int, seed: int
) -> Learnt:
    """Train by imitation within a budget. In seconds, encoding the demonstrations counts too, and a recipe that is done
    earlier is not trained for longer; in steps, the batch is that of the other arms."""
    from vla.data.lerobot_dataset import load_dataset
    from vla.model.policy import VLAPolicy
    from vla.training.recipes import RECIPES
    from vla.training.train import build_vla, train

    config = RECIPES[recipe]()
    threads = config.num_threads if on_gpu() else 1
    config = replace(config, seed=seed, num_threads=threads, model=replace(config.model, backbone=backbone))
    demos = load_dataset(dataset)
    if budget.kind == "steps":
        config = replace(config, steps=budget.amount, batch_size=batch_size)
    else:
        trial = folder.with_name(f"{folder.name}-calibration")
        first, each = _pace(replace(config, steps=CALIBRATION_STEPS, warmup_steps=1), demos, trial)
        config = replace(config, steps=min(config.steps, steps_within(budget.amount, first, each)))
    config = replace(config, warmup_steps=min(config.warmup_steps, config.steps // 4))
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: its time would not be the run's
    model = build_vla(config, demos).to(choose_device("auto"))
    began, wall = clock(), time.monotonic()
    if train(config, model, demos, folder).interrupted:
        raise KeyboardInterrupt
    return _learnt(model, VLAPolicy(model.eval()), config, clock() - began, time.monotonic() - wall, folder)


def refine(before: Learnt, dataset: Path, out: Path, budget: Budget, *, suite: str, seed: int, workers: int) -> Learnt:
    """Online RL after imitation, for what of the budget's seconds is left by the wall's clock: simulation is another
    process's work. Its teacher reads the simulator's state, and every episode is more experience than the
    demonstrations."""
    from envs import make_vec
    from envs.evaluation.evaluate import evaluate
    from envs.seeds import RL_TRAIN_SEEDS, VALIDATION_SEED0
    from envs.sim.render_options import pictures_for
    from rl.budget import by_the_clock
    from rl.recipes import RECIPES
    from rl.runner import Runner
    from vla.data.lerobot_dataset import load_dataset
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy

    config = RECIPES[RL_RECIPES.get(suite, "multitask")]()
    left = max(1.0, budget.amount - before.seconds)
    config = replace(by_the_clock(config, left), suite=suite, seed=seed, train_seeds=RL_TRAIN_SEEDS)
    env = make_vec(suite, config.num_envs, num_workers=workers, image_size=pictures_for(before.policy))

    def validate(policy: Any) -> tuple[int, int]:
        seeds = range(VALIDATION_SEED0, VALIDATION_SEED0 + 2 * config.num_envs)
        report = evaluate(policy, env, seeds, suite=suite)
        return report.successes, report.episodes

    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    try:
        model = VLA.load(before.folder).to(choose_device("auto"))
        demos = None if config.guide is None else load_dataset(dataset)
        Runner(model, env, config, out, evaluate=validate, demos=demos).run()
    finally:
        env.close()
    seconds = time.monotonic() - began
    policy = VLAPolicy.load(out / "best")
    return replace(
        before, policy=policy, seconds=before.seconds + seconds, wall_seconds=before.wall_seconds + seconds,
        folder=out / "best",
    )  # fmt: skip


def _pace(config: TrainConfig, demos: Any, folder: Path) -> tuple[float, float]:
    """(seconds before the first step, seconds of each), from a short run that is thrown away."""
    from vla.training.train import build_vla, train

    model = build_vla(config, demos).to(choose_device("auto"))
    shutil.rmtree(folder, ignore_errors=True)
    marks: list[float] = []
    began = clock()
    state = train(
        config, model, demos, folder,
        on_step=lambda progress: marks.append(clock()) if progress.stage == "train" else None,
    )  # fmt: skip
    shutil.rmtree(folder)
    if state.interrupted:
        raise KeyboardInterrupt
    each = (marks[-1] - marks[0]) / (len(marks) - 1)
    return marks[0] - each - began, each


def _learnt(model: VLA, policy: Any, config: TrainConfig, seconds: float, wall_seconds: float, folder: Path) -> Learnt:
    return Learnt(
        policy=policy, steps=config.steps, seconds=seconds, wall_seconds=wall_seconds,
        parameters=sum(weight.numel() for weight in model.parameters()), batch_size=config.batch_size,
        trained_parameters=sum(weight.numel() for weight in model.trainable()),
        chunk_size=policy.spec.chunk_size, n_action_steps=policy.spec.n_action_steps, folder=folder,
    )  # fmt: skip
