"""`vla eval`: success in simulation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from bascule.agents import AGENTS, resolve_policy
from bascule.commands.base import Command, check_file, check_numbers, from_flags, refuse_idle, stays

if TYPE_CHECKING:
    from envs.evaluation.evaluate import EvalReport


@dataclass(frozen=True)
class Eval(Command):
    """Measure a checkpoint's success rate in simulation, with intervals and controls."""

    policy: Positional[str]
    """A checkpoint folder; or expert, zero, random, blind (one demonstration replayed open-loop)."""
    embodiment: str | None = None
    """The robot to control, for a policy trained for several."""
    cameras: tuple[str, ...] = ()
    """Cameras that the suite calls otherwise: POLICY=SUITE each, the policy's name and the suite's, e.g.
    cam_high=front; or wrist=none, which the policy then sees black."""
    suite: str = "tabletop-pick"
    """The suite to measure in, see `vla list suites`; or a .toml file."""
    episodes: int = 300
    """Number of scenes, one episode each."""
    until_width: float | None = None
    """Count no more scenes than make the 95% interval this narrow, in percentage points; --episodes is the most."""
    json: Path | None = None
    """Write the result to this file too; `vla report compare` compares such files."""
    seed0: int | None = None
    """Seed of the first scene. Default: the suite's first evaluation seed, which is never a training seed; of
    a checkpoint that plays scenes below, which it may have learnt, a warning tells."""
    phrasings: Literal["train", "heldout", "novel"] = "train"
    """heldout: instructions phrased as in no demonstration; novel: objects in colours that no demonstration handles."""
    controls: bool = True
    """Also evaluate with swapped instructions, which name another object than the one counted and should fail."""
    hold_ungrounded: bool = False
    """Hold the robot still until the policy first sees in an episode what the instruction names, and count how often
    that was. Only for policies whose backbone was calibrated for it, see docs/evaluate.md."""
    num_envs: int = 48
    """Environments that play at the same time; of LIBERO at most 8, which take some hundred megabytes each."""
    workers: int = 2
    """Processes that simulate."""
    perturb: tuple[str, ...] = ()
    """Perturbations of the environment, AXIS=SEVERITY from 0 to 1 or AXIS=FROM:TO each; axes: camera, light, texture,
    distractors, layout, robot, instruction, noise, materials, shadows, motion, compression. azimuths=-30,0,30: the
    fixed camera is turned about the table, in every episode by one of these degrees."""
    backend: Literal["cpu", "warp"] = "cpu"
    """cpu: MuJoCo in worker processes. warp: MuJoCo Warp, all environments on one device."""
    device: str | None = None
    """warp: the device. Default: the first GPU, else Warp's CPU device."""
    robustness: bool = False
    """Evaluate along every axis of --perturb and at every severity in turn, on the same scenes, and write OUT with the
    table and pictures of the worst failures: report.html and report.json."""
    axes: tuple[str, ...] = ()
    """robustness: the axes. Default: all."""
    severities: tuple[float, ...] | None = None
    """robustness: from 0 to 1. Default: 0.5 and 1. Plain scenes are always played."""
    out: Path | None = None
    """robustness: folder of the report, and of the cells that are finished. Default: runs/robustness."""
    resume: bool = False
    """robustness: continue the report in OUT; begin it if there is none yet."""

    def writes(self) -> tuple[Path, ...]:
        """--json, and the folder of a robustness report."""
        return (*([self._out()] if self.robustness else []), *([self.json] if self.json else []))

    def kept(self) -> str:
        """Finished cells of a robustness report are kept after Ctrl-C."""
        if not self.robustness:
            return super().kept()
        return stays(self._out(), f"finished cells stay in {self._out()}; add --resume to continue")

    def _out(self) -> Path:
        return self.out or Path("runs") / "robustness"

    def run(self) -> None:
        """Evaluate the policy, print the table and write --json. ValueError for unknown names or numbers out of
        range."""
        from envs.registry import load_suite
        from policies.load import backbone_named, checkpoint

        suite = load_suite(self.suite)
        folder = None if self.policy in AGENTS else checkpoint(self.policy, AGENTS)
        check_numbers(self, episodes=(1, 10_000_000), num_envs=(1, 100_000), workers=(1, 1024), seed0=(0, 2**53))
        check_numbers(self, until_width=(0.1, 99.9))
        if self.backend == "cpu":
            refuse_idle(self, "without --backend warp, whose device it is", "device")
        else:
            refuse_idle(self, "with --backend warp, which simulates in this process", "workers")
        if folder is None and self.embodiment is not None:
            raise ValueError(
                f"--embodiment {self.embodiment} is for checkpoints; '{self.policy}' acts as the suite asks"
            )
        check_file("--json", self.json)
        if self.cameras and (folder is None or self.robustness):
            raise ValueError(
                "--cameras is for the plain evaluation of a checkpoint: "
                + ("leave out --robustness" if self.robustness else f"'{self.policy}' looks through no camera")
            )
        if self.robustness and self.hold_ungrounded:
            raise ValueError("--hold-ungrounded is not for `vla eval --robustness`, which counts what a policy does")
        if self.robustness and self.until_width is not None:
            raise ValueError("--until-width is not for `vla eval --robustness`, whose cells all have the same scenes")
        if folder is not None:
            tell_seeds(suite.eval_seed0 if self.seed0 is None else self.seed0, self.episodes)
        if self.robustness:
            self._report_robustness(listens=folder is not None)
            return
        for flag, value in (("axes", self.axes), ("severities", self.severities), ("out", self.out)):
            if value:
                raise ValueError(f"--{flag} is for `vla eval --robustness`")
        if self.resume:
            raise ValueError("--resume is for `vla eval --robustness`: another evaluation is played anew")
        from bascule.experiments.arms import made_of
        from envs import make_vec
        from envs.evaluation.evaluate import Count, evaluate
        from envs.perturb.perturbation import parse
        from envs.sim.render_options import drawn_for
        from vla.core.compatibility import fitted
        from vla.core.config import save_json
        from vla.core.grounding import threshold_of
        from vla.processing.cameras.camera_map import CameraMap
        from vla.runtime.console import eval_table, progress, say, stdout
        from vla.runtime.process import keep_freed_memory, use_idle_cores
        from vla.runtime.provenance import provenance

        use_idle_cores()
        keep_freed_memory()
        perturb = parse(self.perturb) if self.perturb else None
        if perturb is not None and not perturb.any():
            say(f"--perturb {' '.join(self.perturb)} leaves the scenes as they are: plain ones are played")
            perturb = None
        made = made_of(folder or self.policy, self.suite)  # before they are read: a training may go on
        loaded = (
            None
            if folder is None
            else resolve_policy(self.policy, None, self.suite, self.embodiment, CameraMap.parse(self.cameras))
        )
        if self.hold_ungrounded:
            if loaded is None:  # refused before any environment is made
                raise ValueError(f"--hold-ungrounded is for checkpoints; '{self.policy}' looks at nothing")
            threshold_of(loaded)
        seed0 = suite.eval_seed0 if self.seed0 is None else self.seed0
        worlds = min(self.num_envs, self.episodes, getattr(suite, "max_envs", self.num_envs))
        env = make_vec(
            self.suite,
            worlds,
            num_workers=self.workers,
            phrasings=self.phrasings,
            backend=self.backend,
            device=self.device,
            **drawn_for(loaded),
            perturb=perturb,
        )
        seeds = range(seed0, seed0 + self.episodes)
        env.set_rendering(loaded is not None)  # agents look at no pictures
        try:
            policy = resolve_policy(self.policy, env, self.suite) if loaded is None else fitted(loaded, env, say=say)

            def play(what: str, scenes: range, *, swap: bool = False, width: float | None = None) -> EvalReport:
                with progress(what, len(scenes), unit="episodes") as update:
                    return evaluate(
                        policy,
                        env,
                        scenes,
                        name=self.policy,
                        suite=self.suite,
                        backend=self.backend,
                        swap_instruction=swap,
                        hold_ungrounded=self.hold_ungrounded,
                        until_width=width,
                        on_progress=lambda done, total, won: update(done, f"{won} succeeded"),
                    )

            width = None if self.until_width is None else self.until_width / 100
            report = play("evaluation", seeds, width=width)
            if self.controls and folder is not None:  # scripted agents ignore the instruction
                swapped = play("swapped instruction", seeds[: report.episodes], swap=True)
                report.controls["swapped_instruction"] = Count(swapped.successes, swapped.episodes).to_dict()
        finally:
            env.close()
        result = {**report.to_dict(), "phrasings": self.phrasings, "backbone": backbone_named(folder) if folder else ""}
        looks = {"embodiment": self.embodiment, "cameras": " ".join(self.cameras) or None}
        result |= {name: chosen for name, chosen in looks.items() if chosen is not None}
        result |= ({} if perturb is None else {"perturb": asdict(perturb)}) | made | provenance()
        result |= suite.summary({task: part["success_rate"] for task, part in result["per_task"].items()})
        stdout().print(eval_table(result))
        low, high = result["wilson95"]
        if width is not None and high - low > width:
            say(f"the interval is still {100 * (high - low):.1f} points wide: raise --episodes to play more scenes")
        if self.json is not None:
            save_json(self.json, result)

    def _report_robustness(self, *, listens: bool) -> None:
        """Play the cells that OUT lacks; print the table, write the report and --json. A policy that `listens` also
        gets swapped instructions."""
        from bascule.experiments.robustness.cells import Setting, chosen_axes
        from bascule.experiments.robustness.report import CELLS, console_table, measure
        from bascule.report.page import data_of, write_report
        from vla.core.config import save_json
        from vla.runtime.console import progress, say, stdout
        from vla.runtime.locks import command_line, refuse_used
        from vla.runtime.process import keep_freed_memory, use_idle_cores
        from vla.runtime.provenance import provenance

        if self.perturb:
            raise ValueError("--perturb is one perturbation and --robustness plays all: give one of them, or --axes")
        check_numbers(self, severities=(0, 1))
        axes, out = chosen_axes(self.axes), self._out()
        resuming = refuse_used(out / CELLS, out, "a robustness report", resume=self.resume)
        if not resuming and (out / "report.json").exists():
            raise ValueError(f"{out} holds another report: choose another folder (--out)")
        use_idle_cores()
        keep_freed_memory()
        setting = from_flags(Setting, self)
        with progress("robustness", unit="episodes") as update:
            report = measure(
                setting, axes, (0.5, 1.0) if self.severities is None else self.severities, out,
                swapped=self.controls and listens,
                on_progress=lambda done, total, words: update(done, words, total=total),
            )  # fmt: skip
        report |= {"command": command_line(), **provenance()}
        page = write_report(report, out)
        stdout().print(console_table(report))
        say(f"table and worst failures: {page}")
        if self.json is not None:
            save_json(self.json, data_of(report))


def tell_seeds(seed0: int, episodes: int) -> None:
    """Say that these scenes are not for evaluation, if they are not."""
    from envs.seeds import chosen_by
    from vla.runtime.console import say

    if warning := chosen_by(range(seed0, seed0 + episodes)):
        say(warning)
