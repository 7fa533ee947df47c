"""`vla quickstart`: demonstrations -> imitation -> online RL -> served policy, in order, with a report at the end.

Like `bascule/main.py`, this file may see every room: it is the table of contents of the product, as a program. How
stages are kept, shown and resumed is `bascule/quickstart/stages.py`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bascule.quickstart.config import QuickstartConfig, check, evaluation_seeds, smoke_config, worlds_of
from bascule.quickstart.perturbed import judge_perturbed
from bascule.quickstart.recipes import RECIPES, imitation, training_perturbation, with_backbone, with_budgets
from bascule.quickstart.refine import read_log, refine
from bascule.quickstart.stages import (
    Outcome,
    Result,
    Stage,
    merged_parts,
    run_stages,
    write_outcome,
)
from bascule.report.page import write_report
from vla.core.config import decode, encode, load_json, save_json
from vla.runtime import console
from vla.runtime.locks import locked, refuse_used
from vla.runtime.machine import idle_cores, peak_memory_gib
from vla.runtime.provenance import provenance

_RUN = "quickstart.json"
_THREADS = "threads.json"
_MAY_CHANGE = ("out", "workers")
"""These fields do not change the results, so a resumed run may use other values."""


@dataclass(frozen=True)
class _Run:
    """The contents of `OUT/quickstart.json`: the configuration and command with which a run is resumed."""

    config: QuickstartConfig
    command: str


def quickstart(
    config: QuickstartConfig, *, resume: bool = False, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run the whole job. Returns the report, which is written to report.json and report.html after every stage.

    A stage that fails is shown as failed there and stops only those that need it. `resume` continues a run at the first
    stage that is not done, with the run's own configuration, or starts one; `given` are the fields of `config` that the
    user gave (all, if None), which must agree with that configuration. ValueError for a folder
    that holds a run and no `resume`.
    """
    out = Path(config.out)
    with locked(out), console.signals_interrupt():
        run = _begin(config, out, resume, given)
        return _run(run, out)


def _begin(config: QuickstartConfig, out: Path, resume: bool, given: Mapping[str, Any] | None) -> _Run:
    """The run in `out` to continue, or a new one."""
    asked = [name for name, value in (vars(config) if given is None else given).items() if name != "backbone" or value]
    config = with_backbone(with_budgets(config, given))
    if config.smoke:
        config = replace(smoke_config(config), **(given or {}))
    check(config)
    if refuse_used(out / _RUN, out, "a quickstart", resume=resume):
        stored = load_json(out / _RUN)
        begun = with_backbone(decode(QuickstartConfig, stored["config"]), begun=True)
        for name in asked:
            before, now = getattr(begun, name), getattr(config, name)
            if name not in _MAY_CHANGE and before != now:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"{out} was begun with --{flag} {before}, not {now}: leave it out, or choose another --out"
                )
        from envs.registry import scenes_digest
        from rl.run_checkpoint import require_same_scenes

        require_same_scenes(out, stored, scenes_digest(begun.suite))
        changed = {name: getattr(config, name) for name in _MAY_CHANGE if name in asked}
        return _Run(replace(begun, **changed), stored["command"])
    if left := [name for name in ("report.json", "imitation", "rl") if (out / name).exists()]:
        raise ValueError(f"{out} holds a quickstart that cannot be resumed ({left[0]}): choose another --out")
    from envs.make import worlds_class
    from envs.registry import load_suite, scenes_digest
    from vla.backbones.hub import load as load_backbone
    from vla.model.config import retirement

    suite = load_suite(config.suite)
    if (perturb := training_perturbation(config)) is not None:
        worlds_class(suite, perturb)  # says so if it knows none
    if "backbone" in asked:
        load_backbone(backbone := imitation(config).model.backbone)  # says so if there is none
        if note := retirement(backbone):
            console.say(f"note: {note}")
    run = _Run(config, "vla quickstart " + shlex.join(sys.argv[2:]))
    told = {"config": encode(config), "command": run.command, "scenes": scenes_digest(config.suite)}
    save_json(out / _RUN, told)
    return run


def _run(run: _Run, out: Path) -> dict[str, Any]:
    config, where = run.config, provenance()
    worlds = _Worlds(config, out)

    def report(outcomes: list[Outcome]) -> dict[str, Any]:
        written = {
            **{name: getattr(config, name) for name in ("suite", "seed", "backbone")},
            "command": run.command,
            **where,
            "complete": all(outcome.state == "done" for outcome in outcomes),
            "stages": [outcome.row() for outcome in outcomes],
            **merged_parts(outcomes),
            "peak_memory_gib": round(max(outcome.peak_memory_gib for outcome in outcomes), 2),
            "filmstrips": [film for outcome in outcomes for film in outcome.result.films],
        }
        write_report(written, out)
        return written

    try:
        outcomes = run_stages(
            _stages(config, out, worlds),
            out,
            on_end=report,
            before=lambda stage: _settle(config, _threads(stage, out)),
            on_failure=worlds.close,
        )
    finally:
        worlds.close()
    last = outcomes[-1]
    if worlds.used and last.state == "done":
        last.peak_memory_gib = max(last.peak_memory_gib, peak_memory_gib())  # now with the environments' own processes
        write_outcome(out, last)
    final = report(outcomes)
    _print(final, out / "report.html")
    return final


def _stages(config: QuickstartConfig, out: Path, worlds: _Worlds) -> list[Stage]:
    """The job's table of contents."""
    cells = RECIPES[config.recipe].cells
    few = evaluation_seeds(config)[: min(48, config.control_episodes)]
    perturbed = Stage("evaluate perturbed", lambda: judge_perturbed(config, out, cells, few), needs=("online RL",))
    return [
        Stage("backbone", lambda: _check_backbone(config, out)),
        Stage("demonstrations", lambda: _demonstrate(config, out), hands_on=out / "demos"),
        Stage("imitation", lambda: _imitate(config, out), needs=("demonstrations",), makes=out / "imitation"),
        Stage("evaluate imitation", lambda: _judge_imitation(config, out, worlds), needs=("imitation",)),
        Stage("online RL", lambda: refine(config, out, worlds.varied), needs=("demonstrations", "imitation"),
              makes=out / "rl" / "best"),
        Stage("evaluate RL", lambda: _judge_rl(config, out, worlds), needs=("online RL",)),
        *([perturbed] if cells else []),
        Stage("serve", lambda: _serve(config, out), needs=("online RL",)),
    ]  # fmt: skip


def _threads(stage: str, out: Path) -> int:
    """Torch threads of a stage: as many as there are idle cores when it first starts, at most two.

    A resumed stage keeps its count, because the count changes the last bits of what is learnt.
    """
    counts = load_json(out / _THREADS) if (out / _THREADS).exists() else {}
    if stage not in counts:
        chosen = os.environ.get("OMP_NUM_THREADS", "")
        counts[stage] = min(2, max(1, int(chosen) if chosen.isdecimal() else round(idle_cores())))
        save_json(out / _THREADS, counts)
    return counts[stage]


def _settle(config: QuickstartConfig, threads: int) -> None:
    """Before every stage: what it does may not depend on what this process did before, which a resumed one did not."""
    import torch

    from vla.runtime.process import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)


class _Worlds:
    """The simulated environments, built when a stage first uses them, and drawn as the imitation policy reads them."""

    def __init__(self, config: QuickstartConfig, out: Path) -> None:
        self._config, self._out, self._built, self.used = config, out, {}, False

    @property
    def trained(self) -> Any:
        """Environments with the instructions of training."""
        return self._build("train")

    @property
    def heldout(self) -> Any:
        """Environments with held-out instructions."""
        return self._build("heldout")

    @property
    def varied(self) -> Any:
        """The environments that RL learns in: randomised, if the recipe says so."""
        return self._build("train", training_perturbation(self._config))

    def _build(self, phrasings: str, perturb: Any = None) -> Any:
        from envs import make_vec

        self.used = True
        key = phrasings, perturb
        if key not in self._built:
            self._built[key] = make_vec(
                self._config.suite, worlds_of(self._config), num_workers=self._config.workers, phrasings=phrasings,
                perturb=perturb, image_size=_pictures(self._out / "imitation"),
            )  # fmt: skip
        return self._built[key]

    def close(self) -> None:
        """End their processes; they are rebuilt on the next use."""
        while self._built:
            self._built.popitem()[1].close()


def _print(report: dict[str, Any], page: Path) -> None:
    terminal = console.stdout()
    terminal.print(console.stage_table(report["stages"]))
    named = (("imitation", "imitation"), ("rl", "after online RL"))
    rows = [(title, console.format_rate(report[name])) for name, title in named if name in report]
    rows += [(f"control: {name}", console.format_rate(part)) for name, part in report.get("controls", {}).items()]
    if rows:
        terminal.print(console.table(report["suite"], ("policy", "success, Wilson 95%"), rows))
    served = ""
    if latency := report.get("latency_ms"):
        served = f"served: p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms a decision; "
    terminal.print(f"{served}report: {page}")


def _pictures(policy: Path) -> int:
    """Side in pixels of the pictures to draw for the policy in a folder."""
    from policies.load import picture_size
    from vla.core.types import IMAGE_SIZE

    return picture_size(policy) or IMAGE_SIZE


def _brief(report: Any) -> dict[str, Any]:
    kept = ("successes", "episodes", "success_rate", "wilson95", "wrong_object")
    return {name: value for name, value in report.to_dict().items() if name in kept}


def _check_backbone(config: QuickstartConfig, out: Path) -> Result:
    """Measure the shipped vision-language model on newly rendered scenes."""
    from envs.grounding.generate import generate
    from envs.seeds import GROUNDING_SEED
    from vla.backbones.hub import load as load_backbone
    from vla.training.grounding.loss import inspect
    from vla.training.grounding.questions import GroundingSet

    folder = out / "grounding"
    shutil.rmtree(folder, ignore_errors=True)
    backbone = load_backbone(imitation(config).model.backbone)
    generate(
        16 if config.smoke else 200, folder, seed=GROUNDING_SEED, num_workers=config.workers,
        image_size=backbone.image_size,
    )  # fmt: skip
    figures = inspect(backbone, GroundingSet(folder, backbone.tokenizer))
    shutil.rmtree(folder)
    return Result({name: round(value, 3) for name, value in figures.items()})


def _demonstrate(config: QuickstartConfig, out: Path) -> Result:
    from envs.demos.record import record
    from envs.seeds import DEMO_BLOCK
    from vla.backbones.hub import load as load_backbone

    pixels = load_backbone(imitation(config).model.backbone).image_size
    with console.progress("demonstrations", config.demos) as update:
        record(
            config.suite, config.demos, out / "demos", seed0=config.seed * DEMO_BLOCK, num_workers=config.workers,
            image_size=pixels, perturb=training_perturbation(config),
            on_progress=lambda p: update(p.kept, note=f"{p.tried - p.kept} failed"),
        )  # fmt: skip
    return Result({"episodes": config.demos})


def _imitate(config: QuickstartConfig, out: Path) -> Result:
    import torch

    from vla.data.lerobot_dataset import load_dataset
    from vla.training.train import build_vla, train

    threads = torch.get_num_threads()
    recipe = replace(imitation(config), steps=config.imitation_steps, seed=config.seed, num_threads=threads)
    demos, folder = load_dataset(out / "demos"), out / "imitation"
    model = build_vla(recipe, demos)
    with console.progress("imitation", recipe.steps) as update:
        done = train(
            recipe, model, demos, folder, resume=True,
            on_step=lambda p: update(p.done, total=p.total, note=p.stage if p.loss is None else f"loss {p.loss:.3f}"),
        )  # fmt: skip
    if done.interrupted:
        raise KeyboardInterrupt
    rows = read_log(folder)
    return Result(
        {"frames": len(demos.proprio), "steps": recipe.steps, "loss": round(rows[-1]["loss"], 4)},
        {"curves": {"imitation_loss": {"step": [r["step"] for r in rows], "loss": [r["loss"] for r in rows]}}},
    )


def _judge_imitation(config: QuickstartConfig, out: Path, worlds: _Worlds) -> Result:
    from vla.model.model import VLA

    envs, seeds = worlds.trained, evaluation_seeds(config)
    few = seeds[: config.control_episodes]
    before = _evaluate(VLA.load(out / "imitation"), envs, seeds, config, "imitation", films=4)
    controls = _floor(envs, seeds, config)
    swapped = _evaluate(VLA.load(out / "imitation"), envs, few, config, "", swap=True)
    before.controls["swapped_instruction"] = _brief(swapped)
    other = _evaluate(VLA.load(out / "imitation"), worlds.heldout, few, config, "")
    before.controls["heldout_phrasing"] = _brief(other)
    parts = {"imitation": before.to_dict() | provenance(), "controls": controls}
    return Result({}, parts, _films(before, "imitation"))


def _judge_rl(config: QuickstartConfig, out: Path, worlds: _Worlds) -> Result:
    from vla.model.model import VLA

    model, envs, seeds = VLA.load(out / "rl" / "best"), worlds.trained, evaluation_seeds(config)
    after = _evaluate(model, envs, seeds, config, "rl", films=6)
    swapped = _evaluate(model, envs, seeds[: config.control_episodes], config, "", swap=True)
    after.controls["swapped_instruction"] = _brief(swapped)
    other = _evaluate(model, worlds.heldout, seeds, config, "")
    after.controls["heldout_phrasing"] = _brief(other)
    return Result({}, {"rl": after.to_dict() | provenance(), "controls": dict(after.controls)}, _films(after, "rl"))


def _films(played: Any, stage: str) -> list[dict[str, Any]]:
    return [
        {"caption": film.caption, "frames": np.stack(film.frames), "success": bool(film.success),
         "wrong_object": bool(film.wrong_object), "stage": stage}
        for film in played.films
    ]  # fmt: skip


def _evaluate(
    model: Any, envs: Any, seeds: list[int], config: QuickstartConfig, name: str, *, swap: bool = False, films: int = 0
) -> Any:
    from envs.evaluation.evaluate import evaluate
    from vla.model.policy import VLAPolicy

    with console.progress(f"evaluate {name}".strip(), len(seeds)) as update:
        return evaluate(
            VLAPolicy(model), envs, seeds, name=name, suite=config.suite, swap_instruction=swap, num_films=films,
            on_progress=lambda done, total, won: update(done, note=f"{won} succeeded"),
        )  # fmt: skip


def _floor(envs: Any, seeds: list[int], config: QuickstartConfig) -> dict[str, dict[str, Any]]:
    """Controls that must fail."""
    from envs.evaluation.baselines import BlindReplay, RandomPolicy, ZeroPolicy, expert_actions
    from envs.evaluation.evaluate import evaluate
    from envs.seeds import DEMO_BLOCK

    policies: dict[str, Any] = {
        "zero": ZeroPolicy(envs.action_spec),
        "random": RandomPolicy(envs.action_spec, seed=config.seed),
        "blind": BlindReplay(expert_actions(config.suite, config.seed * DEMO_BLOCK), envs.num_envs),
    }
    few = seeds[: config.control_episodes]
    return {name: _brief(evaluate(policy, envs, few, suite=config.suite)) for name, policy in policies.items()}


def _serve(config: QuickstartConfig, out: Path) -> Result:
    """Start `vla serve` as its own process and let its client drive the simulated robot."""
    from bascule.quickstart.serve import policy_server
    from envs import make_vec
    from envs.evaluation.evaluate import evaluate
    from policies.serving.client import PolicyClient

    seeds = evaluation_seeds(config)[: config.served_episodes]
    robot = make_vec(config.suite, 1, num_workers=1, image_size=_pictures(out / "rl" / "best"))
    try:
        with policy_server(out / "rl" / "best", out / "stages" / "serve.log") as uri, PolicyClient(uri) as client:
            report = evaluate(client, robot, seeds, name="served", suite=config.suite)
            waits = np.array(client.latencies_ms)
    finally:
        robot.close()
    p50, p99 = (float(np.percentile(waits, percent)) for percent in (50, 99))
    return Result(
        {"episodes": report.episodes, "successes": report.successes, "decisions": len(waits)},
        {"latency_ms": {"p50": p50, "p99": p99, "decisions": len(waits)}},
    )
