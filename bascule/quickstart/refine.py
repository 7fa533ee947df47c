"""The quickstart's online RL: the recipe for a suite, and the summary of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.quickstart.recipes import rl_recipe
from bascule.quickstart.stages import Result
from vla.core.config import load_json
from vla.runtime import console

if TYPE_CHECKING:
    from bascule.quickstart.config import QuickstartConfig
    from rl.configs.run import RunnerConfig


def refine(config: QuickstartConfig, out: Path, envs: Any) -> Result:
    """Online RL from the imitation checkpoint, with a teacher of the same demonstrations. Returns its curves."""
    from envs.evaluation.evaluate import evaluate, wilson95
    from envs.seeds import RL_TRAIN_SEEDS, VALIDATION_SEED0
    from rl.budget import cut_short, shown, sufficient_seconds
    from rl.recipes import RECIPES
    from rl.runner import Runner
    from vla.data.lerobot_dataset import load_dataset
    from vla.model.model import VLA

    recipe = replace(
        RECIPES[rl_recipe(config)](), suite=config.suite, seed=config.seed, num_envs=envs.num_envs,
        max_seconds=config.rl_seconds, max_updates=config.rl_updates, train_seeds=RL_TRAIN_SEEDS,
    )  # fmt: skip
    if config.smoke:
        recipe = _brief_recipe(recipe)
    validation = range(VALIDATION_SEED0, VALIDATION_SEED0 + (envs.num_envs if config.smoke else 2 * envs.num_envs))

    def check(policy: Any) -> tuple[int, int]:
        report = evaluate(policy, envs, validation, suite=config.suite)
        return report.successes, report.episodes

    with shown(recipe) as (on_update, on_teacher_update):
        demos = None if recipe.guide is None else load_dataset(out / "demos")
        runner = Runner(
            VLA.load(out / "imitation"), envs, recipe, out / "rl", evaluate=check, demos=demos, on_update=on_update,
            on_teacher_update=on_teacher_update,
        )  # fmt: skip
        result = runner.run(resume=True)
    facts: dict[str, Any] = {}
    teacher = load_json(out / "rl" / "teacher.json") if recipe.guide is not None else None
    if teacher is not None:
        facts["teacher_alone"] = f"{teacher['successes']}/{teacher['episodes']}"
        facts["practice_steps"] = teacher.get("control_steps", 0)
    facts |= {
        "updates": result.updates, "control_steps": result.env_steps, "stopped_by": result.stopped_by,
        "steps_per_s": round(result.env_steps / result.seconds), "sigma_scale": result.std_scale,
    }  # fmt: skip
    if lost := cut_short(recipe, result, teacher):
        enough = sufficient_seconds(recipe, result)
        facts["warning"] = (
            f"{lost}: this policy had less training than was planned; run again on a quieter machine, or with "
            f"--rl-seconds {enough}"
        )
        console.say(f"warning: {facts['warning']}")
    rows = read_log(out / "rl") if result.updates else []
    steps_at = {0: 0} | {int(row["update"]): int(row["env_steps"]) for row in rows}
    curves = {
        "rl_train": {
            "control_steps": [row["env_steps"] for row in rows if "success_rate" in row],
            "success_rate": [row["success_rate"] for row in rows if "success_rate" in row],
        },
        "rl_eval": {
            "control_steps": [steps_at[u] for u, _, _ in result.evaluations],
            "success_rate": [k / n for _, k, n in result.evaluations],
            "wilson95": [list(wilson95(k, n)) for _, k, n in result.evaluations],
        },
    }
    return Result(facts, {"curves": curves, "teacher": teacher})


def _brief_recipe(recipe: RunnerConfig) -> RunnerConfig:
    """The recipe with tiny budgets, so that every part runs once."""
    guide = recipe.guide
    if guide is not None:
        practice = guide.practice and replace(guide.practice, env_steps=1, decisions_per_update=2)
        guide = replace(guide, teacher=replace(guide.teacher, steps=10), practice=practice, steps=2)
    return replace(recipe, decisions_per_update=2, eval_every=4, calibrate_scales=(), guide=guide)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, including resumed sessions."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
