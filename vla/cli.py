"""The command line, and the only argument parser of the project. It sees every room, and imports one when needed."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import Positional

from vla.config import lookup, unknown
from vla.quickstart import VALIDATION_SEED0, QuickstartConfig, quickstart

if TYPE_CHECKING:
    from envs.rollout import EvalReport
    from vla.types import Policy, VecEnv

AGENTS = ("expert", "zero", "random", "blind")
"""Accepted by `vla eval` in place of a checkpoint."""


class Command(ABC):
    """One subcommand: a frozen dataclass whose fields are its arguments. The docstring's first line is its help."""

    @abstractmethod
    def run(self) -> int | None:
        """Do it; the exit code, None for 0. User errors are raised as ValueError or OSError."""

    def kept(self) -> str:
        """After Ctrl-C: what is left, and how to go on."""
        return "nothing was written"


@dataclass(frozen=True)
class Quickstart(QuickstartConfig, Command):
    """Teach a policy from demonstrations, refine it by online RL, serve it; writes report.html."""

    def run(self) -> None:
        quickstart(self)

    def kept(self) -> str:
        return f"what finished stays in {self.out}; remove it, or give another --out, to start again"


@dataclass(frozen=True)
class Demos(Command):
    """Record demonstrations of the scripted expert as a LeRobotDataset v3."""

    suite: Positional[str]
    episodes: int = 200
    out: Path | None = None
    """The dataset's folder. Default: runs/demos/SUITE."""
    seed: int = 0
    """Scene of the first episode; the following ones count up."""
    noise: float = 0.15
    """Disturbs the expert's commands, so that demonstrations show recoveries too."""
    workers: int = 2

    def _out(self) -> Path:
        return self.out or Path("runs/demos") / self.suite

    def run(self) -> None:
        from envs.demos import record
        from envs.suites import load_suite
        from vla.console import progress, say

        load_suite(self.suite)
        with progress("demonstrations", self.episodes, unit="episodes") as update:
            out = record(
                self.suite,
                self.episodes,
                self._out(),
                seed0=self.seed,
                num_workers=self.workers,
                noise=self.noise,
                on_progress=lambda state: update(state.kept, f"{state.tried - state.kept} discarded"),
            )
        say(f"{self.episodes} demonstrations in {out}")

    def kept(self) -> str:
        return f"finished episodes stay in {self._out()}; the same command continues"


@dataclass(frozen=True)
class GroundData(Command):
    """Render scenes with questions and answers about them, for the backbone's pre-training."""

    out: Path = Path("runs/ground-data")
    scenes: int = 20_000
    seed: int = 0
    workers: int = 2

    def run(self) -> None:
        from envs.grounding import generate
        from vla.console import progress

        with progress("scenes", self.scenes) as update:
            generate(
                self.scenes,
                self.out,
                seed=self.seed,
                num_workers=self.workers,
                on_progress=lambda done, total: update(done),
            )

    def kept(self) -> str:
        return "nothing: the folder appears when it is complete"


@dataclass(frozen=True)
class Pretrain(Command):
    """Pre-train the embedded vision-language backbone on what `vla ground-data` made."""

    data: Path = Path("runs/ground-data")
    out: Path = Path("runs/backbone")
    minutes: float = 45.0
    """Wall-clock budget; the learning rate decays to its end."""
    steps: int | None = None
    """Stop after so many steps, if that is sooner."""
    seed: int = 0

    def run(self) -> None:
        from vla.console import progress, table
        from vla.console import stdout as results
        from vla.pretrain import PretrainConfig, pretrain

        config = replace(PretrainConfig(), **_given(minutes=self.minutes, max_steps=self.steps, seed=self.seed))
        with progress("pre-training", self.steps, unit="steps") as update:
            figures = pretrain(
                config, self.data, self.out, on_step=lambda row: update(row.get("step", 0), f"loss {row['loss']:.3f}")
            )
        results().print(table("held-out scenes", ("figure", "value"), list(figures.items())))

    def kept(self) -> str:
        return f"a backbone saved earlier in {self.out} is untouched"


@dataclass(frozen=True)
class Train(Command):
    """Train a policy on demonstrations (any LeRobotDataset v3 folder) by imitation."""

    dataset: Path
    """The dataset's folder."""
    out: Path = Path("runs/policy")
    recipe: str = "tabletop"
    """What the run is; `vla list recipes` names them. The flags below change it."""
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int | None = None
    resume: bool = False
    """Continue the run in OUT, exactly."""

    def run(self) -> int | None:
        from vla.recipes import RECIPES

        recipe = lookup(self.recipe, RECIPES, "recipe")
        from vla.console import progress, say
        from vla.data import load_dataset
        from vla.model import VLA
        from vla.train import build_vla, train

        changes = _given(steps=self.steps, batch_size=self.batch_size, lr=self.lr, seed=self.seed)
        config = replace(recipe(), **changes)
        demos = load_dataset(self.dataset, config.cameras)
        resuming = self.resume and (self.out / "config.json").exists()
        model = VLA.load(self.out) if resuming else build_vla(config, demos)
        with progress("imitation", config.steps, unit="steps") as update:

            def show(state: Any) -> None:
                loss = "encoding images" if state.loss is None else f"loss {state.loss:.4f}"
                update(state.done, loss, total=state.total)

            report = train(config, model, demos, self.out, on_step=show, resume=self.resume)
        if report.interrupted:
            raise KeyboardInterrupt
        say(f"policy after {report.step} steps in {self.out}")
        return None

    def kept(self) -> str:
        return f"the last checkpoint stays in {self.out}; add --resume to continue"


@dataclass(frozen=True)
class RL(Command):
    """Refine a policy by online RL in simulation."""

    recipe: Positional[str]
    """What the run is; `vla list recipes` names them."""
    init: Path
    """Checkpoint to start from."""
    suite: str | None = None
    """Another suite than the recipe's."""
    out: Path = Path("runs/rl")
    minutes: float | None = None
    seed: int | None = None
    resume: bool = False
    """Continue the run in OUT, exactly."""
    workers: int = 2

    def run(self) -> None:
        from rl.recipes import RECIPES

        recipe = lookup(self.recipe, RECIPES, "recipe")
        from vla.catalogue import checkpoint

        init = checkpoint(self.init)
        from envs import make_vec
        from envs.rollout import evaluate
        from rl.runner import Runner
        from vla.console import progress, say
        from vla.model import VLA

        seconds = None if self.minutes is None else 60 * self.minutes
        config = replace(recipe(), **_given(suite=self.suite, max_seconds=seconds, seed=self.seed))
        env = make_vec(config.suite, config.num_envs, num_workers=self.workers)

        def play(policy: Policy) -> tuple[int, int]:
            # The best checkpoint is chosen on other scenes than those `vla eval` reports on.
            seeds = range(VALIDATION_SEED0, VALIDATION_SEED0 + 2 * config.num_envs)
            report = evaluate(policy, env, seeds, suite=config.suite)
            return report.successes, report.episodes

        try:
            with progress("online RL", config.max_updates, unit="updates") as update:

                def show(row: Mapping[str, float]) -> None:
                    update(row["update"], f"success {row.get('success_rate', 0):.2f} while exploring")

                runner = Runner(VLA.load(init), env, config, self.out, evaluate=play, on_update=show)
                result = runner.run(resume=self.resume)
        finally:
            env.close()
        say(f"best policy (update {result.best_update} of {result.updates}) in {self.out / 'best'}")

    def kept(self) -> str:
        return f"the last evaluated checkpoint stays in {self.out}; add --resume to continue"


@dataclass(frozen=True)
class Eval(Command):
    """Measure a checkpoint's success rate in simulation, with intervals and controls."""

    policy: Positional[str]
    """A checkpoint folder; or expert, zero, random, blind (one demonstration replayed without looking)."""
    suite: str = "tabletop-pick"
    episodes: int = 300
    json: Path | None = None
    """Write the result to this file too."""
    seed0: int | None = None
    """First scene. Default: the suite's first evaluation scene, far from every training scene."""
    phrasings: Literal["train", "heldout"] = "train"
    """heldout: instructions worded as in no demonstration."""
    controls: bool = True
    """Also ask for another object than the one counted."""
    num_envs: int = 48
    workers: int = 2

    def run(self) -> None:
        from envs.suites import load_suite
        from vla.catalogue import checkpoint

        suite = load_suite(self.suite)
        folder = None if self.policy in AGENTS else checkpoint(self.policy, AGENTS)
        from envs import make_vec
        from envs.rollout import Count, evaluate
        from vla.config import save_json
        from vla.console import eval_table, progress, stdout
        from vla.report import provenance

        seed0 = suite.eval_seed0 if self.seed0 is None else self.seed0
        worlds = min(self.num_envs, self.episodes)
        env = make_vec(self.suite, worlds, num_workers=self.workers, phrasings=self.phrasings)
        seeds = range(seed0, seed0 + self.episodes)
        try:
            policy = _agent(self.policy, env, self.suite) if folder is None else _load_policy(folder)

            def play(what: str, swap: bool) -> EvalReport:
                with progress(what, self.episodes, unit="episodes") as update:
                    return evaluate(
                        policy,
                        env,
                        seeds,
                        name=self.policy,
                        suite=self.suite,
                        swap_instruction=swap,
                        on_progress=lambda done, total, won: update(done, f"{won} succeeded"),
                    )

            report = play("evaluation", False)
            # An agent without ears cannot be misled.
            if self.controls and folder is not None:
                swapped = play("swapped instruction", True)
                report.controls["swapped_instruction"] = Count(swapped.successes, swapped.episodes).to_dict()
        finally:
            env.close()
        result = {**report.to_dict(), **provenance()}
        stdout().print(eval_table(result))
        if self.json is not None:
            save_json(self.json, result)


@dataclass(frozen=True)
class Serve(Command):
    """Serve a checkpoint to robot controllers over a websocket (openpi's protocol)."""

    policy: Positional[Path]
    """A checkpoint folder."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port."""
    api_key: str | None = None
    """What clients must send. Needed to listen to other machines. Default: $BASCULE_API_KEY."""

    def run(self) -> None:
        from vla.catalogue import checkpoint

        folder = checkpoint(self.policy)
        from policies.server import PolicyServer

        policy = _load_policy(folder)
        server = PolicyServer(
            policy,
            action_spec=policy.action_spec,
            cameras=policy.cameras,
            host=self.host,
            port=self.port,
            # A key given as a flag can be read by every user of the machine; one in the environment cannot.
            api_key=self.api_key or os.environ.get("BASCULE_API_KEY"),
            proprio_dim=policy.vla.processor.config.proprio_dim,
            metadata={"policy": folder.name},
        )
        # On stdout and flushed: programs that start a server wait for this line.
        server.run(on_ready=lambda: print(f"serving {folder} at {server.uri} (Ctrl-C ends)", flush=True))

    def kept(self) -> str:
        return "the server has stopped"


@dataclass(frozen=True)
class Bench(Command):
    """Measure speed: sim, serve or model."""

    name: Positional[str]
    """sim, serve or model."""
    json: Path | None = None
    """Write the result to this file too."""

    def run(self) -> None:
        from vla.bench import BENCHES
        from vla.config import save_json
        from vla.console import bench_table, stdout
        from vla.report import provenance

        results = lookup(self.name, BENCHES, "bench")()
        report = {"bench": self.name, **provenance(), "results": results}
        stdout().print(bench_table(report))
        if self.json is not None:
            save_json(self.json, report)


@dataclass(frozen=True)
class List(Command):
    """List suites, recipes or tasks."""

    what: Positional[str]
    """suites, recipes or tasks."""

    def run(self) -> None:
        from vla.catalogue import LISTINGS
        from vla.console import stdout, table

        title, columns, rows = lookup(self.what, LISTINGS, "list")()
        stdout().print(table(title, columns, rows))


@dataclass(frozen=True)
class View(Command):
    """Draw first scenes of a suite, with their instructions, as one picture."""

    suite: Positional[str]
    out: Path | None = None
    """A PNG file. Default: runs/SUITE.png."""
    scenes: int = 12
    seed: int = 0
    phrasings: Literal["train", "heldout"] = "train"

    def run(self) -> None:
        from envs.suites import load_suite

        load_suite(self.suite)
        from envs import make_vec
        from vla.console import say
        from vla.report import contact_sheet

        env = make_vec(self.suite, self.scenes, num_workers=1, image_size=168, phrasings=self.phrasings)
        try:
            obs = env.reset(seeds=range(self.seed, self.seed + self.scenes))
        finally:
            env.close()
        out = self.out or Path("runs") / f"{self.suite}.png"
        contact_sheet(list(obs.images.values()), obs.instruction, out)
        say(f"{self.scenes} scenes in {out}")


COMMANDS: dict[str, type[Command]] = {
    "quickstart": Quickstart,
    "demos": Demos,
    "train": Train,
    "rl": RL,
    "eval": Eval,
    "serve": Serve,
    "view": View,
    "list": List,
    "bench": Bench,
    "ground-data": GroundData,
    "pretrain": Pretrain,
}


def main(argv: list[str] | None = None) -> int:
    """Run `vla ARGV`; the exit code. 2: the user's error, in one line; 130: interrupted."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(version("bascule"))
        return 0
    name, *rest = args
    if name not in COMMANDS:
        print(f"vla: error: {unknown(name, COMMANDS, 'command')}", file=sys.stderr)
        return 2
    command = tyro.cli(COMMANDS[name], args=rest, prog=f"vla {name}")
    from vla.console import run_guarded

    return run_guarded(command.run, kept=command.kept)


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vla COMMAND [ARGS]    (vla COMMAND --help explains its arguments)",
            "",
            *lines,
            "",
            "Errors are one line; BASCULE_TRACEBACK=1 shows where they come from.",
        ]
    )


def _given(**values: object) -> dict[str, Any]:
    """Only the values a user gave."""
    return {name: value for name, value in values.items() if value is not None}


def _load_policy(folder: Path) -> Any:
    from vla.model import VLAPolicy

    return VLAPolicy.load(folder)


def _agent(name: str, env: VecEnv, suite: str) -> Policy:
    """The policy that `expert`, `zero`, `random` or `blind` means in `env`."""
    from envs.baselines import BlindReplay, RandomPolicy, ZeroPolicy, expert_actions
    from envs.experts import TabletopExpert

    makers: dict[str, Callable[[], Policy]] = {
        "expert": lambda: TabletopExpert(env.num_envs),
        "zero": lambda: ZeroPolicy(env.action_spec),
        "random": lambda: RandomPolicy(env.action_spec),
        "blind": lambda: BlindReplay(expert_actions(suite, 0), env.num_envs),
    }
    return makers[name]()


if __name__ == "__main__":
    sys.exit(main())
