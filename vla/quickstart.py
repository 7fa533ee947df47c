"""`vla quickstart`: demonstrations -> imitation -> online RL -> served policy, in order, with a report at the end.

Like `vla/cli.py`, this file may see every room: it is the table of contents of the product, as a program.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla import console
from vla.config import load_json
from vla.report import provenance, write_report

if TYPE_CHECKING:
    from rl.run_config import RunnerConfig

VALIDATION_SEED0 = 3_000_000
"""RL chooses its best checkpoint on these scenes: neither training scenes nor those of the final evaluation."""
_GROUNDING_SEED0 = 900_000


@dataclass(frozen=True)
class QuickstartConfig:
    """The main job's budgets. The defaults fit 12 minutes on two CPU cores."""

    out: str = "runs/quickstart"
    suite: str = "tabletop-pick"
    seed: int = 0
    demos: int = 20
    """Scarce on purpose: with 60 imitation alone reaches 92% and leaves RL little to do (BENCHMARKS.md)."""
    imitation_steps: int = 700
    rl_seconds: float = 240.0
    rl_updates: int = 400
    eval_episodes: int = 400
    control_episodes: int = 200
    served_episodes: int = 12
    workers: int = 2
    smoke: bool = False
    """Everything once, with tiny budgets: proves that it runs, teaches nothing."""


def smoke_config(config: QuickstartConfig) -> QuickstartConfig:
    """The same journey in a minute or two."""
    return replace(
        config, demos=4, imitation_steps=10, rl_seconds=120.0, rl_updates=4, eval_episodes=8, control_episodes=8,
        served_episodes=2,
    )  # fmt: skip


class _Stages:
    """Times the stages and keeps what each one reports."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        console.say(f"[{len(self.rows) + 1}] {name}")
        start, extra = time.monotonic(), {}
        yield extra
        self.rows.append({"name": name, "seconds": round(time.monotonic() - start, 1), **extra})


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run the whole job; writes report.json and report.html into `config.out` and returns the report."""
    import torch

    from envs import make_vec
    from envs.demos import record
    from vla.model import VLA

    if config.smoke:
        config = smoke_config(config)
    out = Path(config.out)
    if (out / "report.json").exists() or (out / "imitation").exists():
        raise ValueError(f"{out} already holds a quickstart: remove it, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    stages = _Stages()

    with stages.stage("backbone") as extra:
        extra |= _check_backbone(out, scenes=16 if config.smoke else 200, workers=config.workers)
    with stages.stage("demonstrations") as extra, console.progress("demonstrations", config.demos) as update:
        dataset = record(
            config.suite, config.demos, out / "demos", seed0=config.seed * 20_000, num_workers=config.workers,
            on_progress=lambda p: update(p.kept, note=f"{p.tried - p.kept} failed"),
        )  # fmt: skip
        extra["episodes"] = config.demos
    with stages.stage("imitation") as extra:
        losses = _imitate(config, dataset, out / "imitation", extra)

    envs = make_vec(config.suite, 48, num_workers=config.workers)
    heldout = make_vec(config.suite, 48, num_workers=config.workers, phrasings="heldout")
    try:
        seeds = _evaluation_seeds(config)
        with stages.stage("evaluate imitation"):
            before = _evaluate(VLA.load(out / "imitation"), envs, seeds, config, "imitation", films=4)
            controls = _floor(envs, seeds, config)
            swapped = _evaluate(
                VLA.load(out / "imitation"), envs, seeds[: config.control_episodes], config, "", swap=True
            )
            before.controls["swapped_instruction"] = _brief(swapped)
            other = _evaluate(VLA.load(out / "imitation"), heldout, seeds[: config.control_episodes], config, "")
            before.controls["heldout_phrasing"] = _brief(other)
        with stages.stage("online RL") as extra:
            curves = _refine(config, out, envs, extra)
        with stages.stage("evaluate RL"):
            model = VLA.load(out / "rl" / "best")
            after = _evaluate(model, envs, seeds, config, "rl", films=6)
            swapped = _evaluate(model, envs, seeds[: config.control_episodes], config, "", swap=True)
            after.controls["swapped_instruction"] = _brief(swapped)
            other = _evaluate(model, heldout, seeds, config, "")
            after.controls["heldout_phrasing"] = _brief(other)
        controls |= after.controls
        with stages.stage("serve") as extra:
            latency = _serve(config, out / "rl" / "best", extra)
    finally:
        envs.close()
        heldout.close()

    films = [(f, "imitation") for f in before.films] + [(f, "rl") for f in after.films]
    report: dict[str, Any] = {
        "suite": config.suite,
        "seed": config.seed,
        "command": "vla quickstart " + " ".join(sys.argv[2:]),
        **provenance(),
        "stages": stages.rows,
        "imitation": before.to_dict() | provenance(),
        "rl": after.to_dict() | provenance(),
        "controls": controls,
        "latency_ms": latency,
        "peak_memory_gib": round(_peak_memory_gib(), 2),
        "curves": {"imitation_loss": losses, **curves},
        "teacher": load_json(teacher) if (teacher := out / "rl" / "teacher.json").exists() else None,
        "filmstrips": [
            {"caption": film.caption, "frames": np.stack(film.frames), "success": film.success,
             "wrong_object": film.wrong_object, "stage": stage}
            for film, stage in films
        ],
    }  # fmt: skip
    page = write_report(report, out)
    _print(report, page)
    return report


def _print(report: dict[str, Any], page: Path) -> None:
    terminal = console.stdout()
    terminal.print(console.stage_table(report["stages"]))
    rows = [
        ("imitation", console.format_rate(report["imitation"])),
        ("after online RL", console.format_rate(report["rl"])),
    ]
    rows += [(f"control: {name}", console.format_rate(part)) for name, part in report["controls"].items()]
    terminal.print(console.table(report["suite"], ("policy", "success, Wilson 95%"), rows))
    latency = report["latency_ms"]
    terminal.print(f"served: p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms a decision; report: {page}")


def _evaluation_seeds(config: QuickstartConfig) -> list[int]:
    from envs.suites import load_suite

    first = load_suite(config.suite).eval_seed0
    return list(range(first, first + config.eval_episodes))


def _brief(report: Any) -> dict[str, Any]:
    full = report.to_dict()
    return {k: full[k] for k in ("successes", "episodes", "success_rate", "wilson95", "wrong_object")}


def _check_backbone(out: Path, *, scenes: int, workers: int) -> dict[str, Any]:
    """How well the shipped vision-language model sees, on scenes rendered now."""
    from envs.grounding import generate
    from vla.backbone import load_backbone
    from vla.pretrain import GroundingSet, inspect
    from vla.recipes import RECIPES

    folder = out / "grounding"
    shutil.rmtree(folder, ignore_errors=True)
    generate(scenes, folder, seed=_GROUNDING_SEED0, num_workers=workers)
    backbone = load_backbone(RECIPES["tabletop"]().model.backbone)
    figures = inspect(backbone, GroundingSet(folder, backbone.tokenizer))
    shutil.rmtree(folder)
    return {name: round(value, 3) for name, value in figures.items()}


def _imitate(config: QuickstartConfig, dataset: Path, out: Path, extra: dict[str, Any]) -> dict[str, list[float]]:
    from vla.data import load_dataset
    from vla.recipes import RECIPES
    from vla.train import build_vla, train

    recipe = replace(RECIPES["tabletop"](), steps=config.imitation_steps, seed=config.seed)
    demos = load_dataset(dataset)
    model = build_vla(recipe, demos)
    with console.progress("imitation", recipe.steps) as update:
        train(
            recipe, model, demos, out,
            on_step=lambda p: update(p.done, total=p.total, note=p.stage if p.loss is None else f"loss {p.loss:.3f}"),
        )  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    extra |= {"frames": len(demos.proprio), "steps": recipe.steps, "loss": round(rows[-1]["loss"], 4)}
    return {"step": [row["step"] for row in rows], "loss": [row["loss"] for row in rows]}


def _evaluate(
    model: Any, envs: Any, seeds: list[int], config: QuickstartConfig, name: str, *, swap: bool = False, films: int = 0
) -> Any:
    from envs.rollout import evaluate
    from vla.model import VLAPolicy

    with console.progress(f"evaluate {name}".strip(), len(seeds)) as update:
        return evaluate(
            VLAPolicy(model), envs, seeds, name=name, suite=config.suite, swap_instruction=swap, num_films=films,
            on_progress=lambda done, total, won: update(done, note=f"{won} succeeded"),
        )  # fmt: skip


def _floor(envs: Any, seeds: list[int], config: QuickstartConfig) -> dict[str, dict[str, Any]]:
    """Controls that must fail."""
    from envs.baselines import BlindReplay, RandomPolicy, ZeroPolicy, expert_actions
    from envs.rollout import evaluate

    policies: dict[str, Any] = {
        "zero": ZeroPolicy(envs.action_spec),
        "random": RandomPolicy(envs.action_spec, seed=config.seed),
        "blind": BlindReplay(expert_actions(config.suite, config.seed * 20_000), envs.num_envs),
    }
    few = seeds[: config.control_episodes]
    return {name: _brief(evaluate(policy, envs, few, suite=config.suite)) for name, policy in policies.items()}


def _refine(config: QuickstartConfig, out: Path, envs: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Online RL from the imitation checkpoint, beside a teacher of the same demonstrations; its learning curves."""
    from envs.rollout import evaluate, wilson95
    from rl.runner import Runner
    from vla.data import load_dataset
    from vla.model import VLA

    recipe = replace(
        _recipe(config.suite), suite=config.suite, seed=config.seed, num_envs=envs.num_envs,
        max_seconds=config.rl_seconds, max_updates=config.rl_updates, train_seeds=(500_000, 1_000_000),
    )  # fmt: skip
    if config.smoke:
        recipe = _brief_recipe(recipe)
    validation = range(VALIDATION_SEED0, VALIDATION_SEED0 + (envs.num_envs if config.smoke else 2 * envs.num_envs))

    def check(policy: Any) -> tuple[int, int]:
        report = evaluate(policy, envs, validation, suite=config.suite)
        return report.successes, report.episodes

    rows: list[dict[str, float]] = []
    with console.progress("online RL", recipe.max_seconds, unit="s") as update:

        def on_update(row: dict[str, float]) -> None:
            rows.append(row)
            note = f"update {row['update']}, success {row.get('success_rate', 0):.2f}"
            update(min(row["seconds"], recipe.max_seconds or 0), note=note)

        def on_practice(row: dict[str, float]) -> None:
            rate = row.get("success_rate", 0)
            update(min(runner.seconds, recipe.max_seconds or 0), f"first its teacher practises: success {rate:.2f}")

        demos = None if recipe.guide is None else load_dataset(out / "demos")
        runner = Runner(
            VLA.load(out / "imitation"), envs, recipe, out / "rl", evaluate=check, demos=demos, on_update=on_update,
            on_practice=on_practice,
        )  # fmt: skip
        result = runner.run()
    if recipe.guide is not None:
        teacher = load_json(out / "rl" / "teacher.json")
        extra["teacher_alone"] = f"{teacher['successes']}/{teacher['episodes']}"
        extra["practice_steps"] = teacher.get("control_steps", 0)
    extra |= {
        "updates": result.updates, "control_steps": result.env_steps, "stopped_by": result.stopped_by,
        "steps_per_s": round(result.env_steps / result.seconds), "sigma_scale": result.std_scale,
    }  # fmt: skip
    steps_at = {0: 0} | {int(row["update"]): int(row["env_steps"]) for row in rows}
    return {
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


def _recipe(suite: str) -> RunnerConfig:
    """How this suite's policy is refined: beside a teacher, if its worlds tell what one reads."""
    from envs.suites import load_suite
    from rl.recipes import RECIPES

    loaded = load_suite(suite)
    plane = getattr(loaded, "plane", None)
    if plane is None:
        return RECIPES["tabletop-pick"]()
    if plane.turns:
        return RECIPES["tabletop-pick-guided"]()
    return RECIPES["multitask-few" if len(loaded.tasks) > 1 else "robosuite-lift-guided"]()


def _brief_recipe(recipe: RunnerConfig) -> RunnerConfig:
    """Everything of it once."""
    guide = recipe.guide
    if guide is not None:
        practice = guide.practice and replace(guide.practice, env_steps=1, decisions_per_update=2)
        guide = replace(guide, teacher=replace(guide.teacher, steps=10), practice=practice, steps=2)
    return replace(recipe, decisions_per_update=2, eval_every=4, calibrate_scales=(), guide=guide)


def _serve(config: QuickstartConfig, checkpoint: Path, extra: dict[str, Any]) -> dict[str, float]:
    """Start `vla serve` as its own process and let its client drive the simulated robot."""
    from envs import make_vec
    from envs.rollout import evaluate
    from policies.client import PolicyClient

    command = [sys.executable, "-m", "vla.cli", "serve", str(checkpoint), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    robot = make_vec(config.suite, 1, num_workers=1)
    try:
        uri = _wait_for_uri(server)
        seeds = _evaluation_seeds(config)[: config.served_episodes]
        with PolicyClient(uri) as client:
            report = evaluate(client, robot, seeds, name="served", suite=config.suite)
            waits = np.array(client.latencies_ms)
    finally:
        robot.close()
        server.terminate()
        server.wait(timeout=10)
    extra |= {"episodes": report.episodes, "successes": report.successes, "decisions": len(waits)}
    return {"p50": float(np.percentile(waits, 50)), "p99": float(np.percentile(waits, 99)), "decisions": len(waits)}


def _wait_for_uri(server: subprocess.Popen[str]) -> str:
    """The address that `vla serve` prints once it listens."""
    assert server.stdout is not None
    for line in server.stdout:
        for word in line.split():
            if word.startswith("ws://"):
                return word.rstrip(".,;")
    raise ConnectionError("the policy server ended before it listened: run `vla serve` by hand to see why")


def _peak_memory_gib() -> float:
    """Largest resident size of this process plus that of its largest child (the kernel keeps no sum)."""
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + 2 * child) / 2**20
