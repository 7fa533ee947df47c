"""Commands that learn: pre-training, imitation, online RL, and all of them in a row."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from bascule.commands.base import Command, check_numbers, given
from bascule.quickstart.config import QuickstartConfig
from vla.core.checkpoint import CONFIG
from vla.core.config import lookup
from vla.runtime.devices import choose_device
from vla.runtime.locks import refuse_used

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation
    from vla.core.types import Policy
    from vla.training.train_config import TrainConfig


@dataclass(frozen=True)
class Quickstart(Command):
    """Teach a policy from demonstrations, refine it by online RL, serve it; writes report.html."""

    out: Path = Path(QuickstartConfig.out)
    resume: bool = False
    """Go on in OUT with the first stage that is not done, as the run began; begin it if there is none yet."""
    suite: str | None = None
    """Default: tabletop-pick."""
    seed: int | None = None
    """Default: 0."""
    demos: int | None = None
    """Default: 20, scarce on purpose: with 60 imitation alone reaches 92% and leaves RL little to do."""
    imitation_steps: int | None = None
    """Default: 700."""
    rl_seconds: float | None = None
    """Default: 240; with --smoke as long as its updates take."""
    rl_updates: int | None = None
    """At most. Default: 400."""
    eval_episodes: int | None = None
    """Default: 400."""
    control_episodes: int | None = None
    """Default: 200."""
    served_episodes: int | None = None
    """Default: 12."""
    workers: int | None = None
    """Processes that simulate. Default: 2."""
    smoke: bool = False
    """Everything once, with tiny budgets: proves that it runs, teaches nothing."""

    def run(self) -> int | None:
        from bascule.quickstart.job import quickstart

        asked = {name: value for name, value in vars(self).items() if name != "resume" and value is not False}
        asked = given(**asked | {"out": str(self.out)})
        report = quickstart(QuickstartConfig(**asked), resume=self.resume, given=asked)
        if failed := [stage for stage in report["stages"] if stage["state"] == "failed"]:
            told = "; ".join(f"{stage['name']}: {stage['reason']}" for stage in failed)
            print(f"vla: error: {told}; vla quickstart --resume --out {self.out} tries again", file=sys.stderr)
            return 1
        return None

    def kept(self) -> str:
        return f"what finished stays in {self.out}; vla quickstart --resume --out {self.out} goes on"


@dataclass(frozen=True)
class Pretrain(Command):
    """Pre-train the embedded vision-language backbone on what `vla ground-data` made."""

    data: tuple[Path, ...] = (Path("runs/ground-data"),)
    """Folders of `vla ground-data`; the last 256 scenes of each are kept to measure with."""
    weights: tuple[float, ...] = ()
    """How often each of several folders is drawn. Default: by their sizes."""
    out: Path = Path("runs/backbone")
    minutes: float = 45.0
    """Wall-clock budget; the learning rate decays to its end."""
    steps: int | None = None
    """Stop after so many steps, if that is sooner."""
    initial: str | None = None
    """Go on from this backbone (a name or a folder) instead of from random weights; it learns the words it lacks."""
    only_pointer: bool = False
    """Train only the second look of `initial`, at the picture itself; all else stays."""
    lr: float | None = None
    """Default: 1.2e-3 from random weights, 7e-4 from `initial`."""
    questions: int | None = None
    """Of a scene's five questions that name something, ask so many at each step. Default: 3."""
    seed: int = 0

    def run(self) -> None:
        from vla.data.dataset_meta import require_grounding_set

        if self.only_pointer and self.initial is None:
            raise ValueError("--only-pointer needs a backbone to sharpen: --initial tiny, or a folder")
        refuse_used(self.out / "bascule.json", self.out, "a backbone", resume=None)
        for folder in self.data:
            require_grounding_set(folder)
        from vla.runtime.console import progress, table
        from vla.runtime.console import stdout as results
        from vla.training.pretrain import PretrainConfig, pretrain

        config = PretrainConfig(only_pointer=self.only_pointer)
        if self.initial is not None and not self.only_pointer:  # the reader starts anew, the backbone does not
            config = replace(config, lr=7e-4, reader_weight=0.3)
        changes = given(
            minutes=self.minutes, max_steps=self.steps, seed=self.seed, weights=self.weights, lr=self.lr,
            points_per_scene=self.questions,
        )  # fmt: skip
        config = replace(config, **changes)
        with progress("pre-training", self.steps, unit="steps") as update:
            figures = pretrain(
                config,
                self.data,
                self.out,
                on_step=lambda row: update(row.get("step", 0), f"loss {row['loss']:.3f}"),
                initial=self.initial,
            )
        results().print(table("held-out scenes", ("figure", "value"), list(figures.items())))

    def kept(self) -> str:
        return f"a backbone saved earlier in {self.out} is untouched"


@dataclass(frozen=True)
class Train(Command):
    """Train a policy on demonstrations (any LeRobotDataset v3 folder) by imitation."""

    dataset: tuple[Path, ...]
    """The dataset's folder; several make one policy for several robots."""
    out: Path = Path("runs/policy")
    recipe: str = "tabletop"
    """What the run is; `vla list recipes` names them. The flags below change it."""
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int | None = None
    resume: bool = False
    """Continue the run in OUT, exactly; begin it if there is none yet."""

    backbone: str | None = None
    """Another vision-language model: a name, a folder, or MODULE:FUNCTION (docs/extend.md)."""
    tune: Literal["frozen", "lora", "full"] | None = None
    """How much of it learns."""
    head: str | None = None
    """Action head: l1, linear, flow, bins, frequencies; or MODULE:CLASS, one of your own (docs/extend.md)."""
    cameras: tuple[str, ...] | None = None
    """Which ones, in order; all of the dataset if not given."""
    image_size: int | None = None
    """Read every picture at this square size in pixels: for cameras that changed their resolution, and to save memory.
    The policy reads its recipe's size either way."""
    weights: tuple[float, ...] | None = None
    """How often each of several datasets is drawn."""
    chunk_size: int | None = None
    """Control steps predicted per decision."""
    n_action_steps: int | None = None
    """Of which so many are played before the policy looks again: at most the chunk's."""
    accumulate: int | None = None
    """Parts a batch is computed in, to save memory."""
    augment: bool = False
    """Random crops and colours; a frozen backbone then runs at every step."""
    language: Path | None = None
    """Folder of `vla ground-data`: keep a backbone that learns in practice with words."""
    checkpointing: bool = False
    """Recompute layers instead of keeping them."""
    compile: bool = False
    keep_features: bool = False
    """A frozen backbone's features on disk in OUT instead of in memory."""
    stream: bool | None = None
    """Leave images on disk and decode them as needed; by default when they would fill half of the free memory."""
    track: tuple[str, ...] = ()
    """Besides OUT/metrics.jsonl: tensorboard, wandb, trackio."""
    num_threads: int | None = None
    """Torch's threads; beside other work as many as cores are left, for threads that wait for each other spin."""
    device: str = "auto"

    def run(self) -> int | None:
        from vla.data.dataset_meta import read_info
        from vla.training.recipes import RECIPES

        config = self._config(lookup(self.recipe, RECIPES, "recipe")())
        if problem := config.problem():
            raise ValueError(problem)
        resuming = refuse_used(self.out / CONFIG, self.out, "a checkpoint", resume=self.resume)
        for dataset in self.dataset:
            read_info(dataset)
        from vla.data.lerobot_dataset import load_datasets
        from vla.model.model import VLA
        from vla.runtime.console import progress, say
        from vla.runtime.console import stderr as console
        from vla.runtime.distributed import launched
        from vla.training.memory_budget import estimate
        from vla.training.train import build_vla, train

        rank, processes = launched()
        demos = load_datasets(self.dataset, config.cameras, image_size=self.image_size, lazy=self.stream)
        model = VLA.load(self.out, merge=False) if resuming else build_vla(config, demos)
        model.to(choose_device(self.device))
        if rank == 0:
            budget = estimate(config, model, demos, processes=processes)
            for line in (*(line for part in demos.items() for line in part[1].summary(part[0])), *budget.lines()):
                say(line)
            for name, part in demos.items():
                for warning in part.warnings():
                    say(f"warning: {name}: {warning}")
            if problem := budget.problem():
                say(f"warning: {problem}")
        quiet = rank > 0 or not console().is_terminal
        with progress("imitation", config.steps, unit="steps") as update:

            def show(state: Any) -> None:
                loss = "encoding images" if state.loss is None else f"loss {state.loss:.4f}"
                update(state.done, loss, total=state.total)
                if quiet and state.stage == "train" and state.done % (10 * config.log_every) == 0:
                    say(f"step {state.done} of {state.total}: {loss}, lr {state.lr:.2g}")

            report = train(config, model, demos, self.out, on_step=show, resume=self.resume)
        if report.interrupted:
            raise KeyboardInterrupt
        if rank == 0:
            say(f"policy after {report.step} steps in {self.out}")
        return None

    def _config(self, config: TrainConfig) -> TrainConfig:
        """The recipe with this command's changes."""
        from vla.backbones.lora import LoRAConfig
        from vla.processing.config import AugmentConfig
        from vla.training.train_config import LanguageConfig

        shape = given(
            backbone=self.backbone, head=self.head, chunk_size=self.chunk_size, n_action_steps=self.n_action_steps,
        )  # fmt: skip
        model = replace(config.model, **shape)
        if self.tune is not None:
            adapters = (model.lora or LoRAConfig()) if self.tune == "lora" else None
            model = replace(model, freeze_backbone=self.tune != "full", lora=adapters)
        changes = given(
            steps=self.steps, batch_size=self.batch_size, lr=self.lr, seed=self.seed, cameras=self.cameras,
            weights=self.weights, accumulate=self.accumulate, trackers=self.track or None,
            augment=AugmentConfig() if self.augment else None,
            language=None if self.language is None else LanguageConfig(data=str(self.language)),
            checkpointing=self.checkpointing or None, keep_features=self.keep_features or None,
            compile="inductor" if self.compile else None, num_threads=self.num_threads,
        )  # fmt: skip
        if self.backbone is not None:
            changes["image_size"] = None  # the recipe's is that of its own backbone
        return replace(config, model=model, **changes)

    def kept(self) -> str:
        return f"the last checkpoint stays in {self.out}; add --resume to continue"


@dataclass(frozen=True)
class RL(Command):
    """Refine a policy by online RL in simulation."""

    recipe: Positional[str]
    """What the run is; `vla list recipes` names them."""
    init: Path
    """Checkpoint to start from."""
    embodiment: str | None = None
    """Of a checkpoint trained for several robots, the one to refine; the result is a policy for this one alone."""
    suite: str | None = None
    """Another suite than the recipe's."""
    out: Path = Path("runs/rl")
    minutes: float | None = None
    seed: int | None = None
    resume: bool = False
    """Continue the run in OUT, exactly; begin it if there is none yet."""
    workers: int = 2
    """Processes that simulate, of each process that learns."""
    processes: int = 1
    """Processes that learn together on this machine, each with its share of the worlds: torchrun starts them. On two
    cores two of them, with one worker each, take a sixth less time than one."""
    backend: Literal["cpu", "warp"] = "cpu"
    num_envs: int | None = None
    horizon: int | None = None
    """Control steps of an episode while learning, fewer than the suite's; `vla eval` counts by the suite's."""
    demos: Path | None = None
    """Folder of demonstrations, for recipes that learn a teacher from them (multitask, ...-guided)."""
    curriculum: str | None = None
    """Draw tasks by their success: uniform, vla-rl, frontier, weakest."""
    retain: tuple[str, ...] = ()
    """Suites on which to compare the policy before and after, task by task: OUT/retention.json."""
    retain_episodes: int = 96
    """Per task."""
    track: tuple[str, ...] = ()
    """Besides OUT/metrics.jsonl: tensorboard, wandb, trackio."""
    perturb: tuple[str, ...] = ()
    """Domain randomisation of the worlds it learns and is chosen in: AXIS=FROM:TO each, as in `vla eval`."""
    late_steps: int = 0
    """Train for slow links: a chunk comes into play up to so many control steps after its picture was taken, how many
    is drawn for each episode. The chunk must have so many actions more than are played between two decisions."""
    device: str = "auto"

    def run(self) -> None:
        from rl.recipes import RECIPES

        recipe = lookup(self.recipe, RECIPES, "recipe")
        from bascule.catalogue import trained

        refuse_used(self.out / "last" / CONFIG, self.out, "a run", resume=self.resume)
        init = trained(self.init)
        self._check()
        from policies.load import chosen_embodiment
        from vla.runtime.distributed import launch, launched

        member = chosen_embodiment(init, self.embodiment)
        config, size = self._config(recipe()), max(self.processes, launched()[1])
        if config.num_envs % size:
            raise ValueError(f"--num-envs {config.num_envs} does not divide among {size} processes")
        if self.processes != 1 and launched()[1] == 1:
            launch(self.processes)
        from envs.evaluation.evaluate import evaluate
        from envs.seeds import VALIDATION_SEED0
        from rl.runner import Runner
        from vla.model.model import VLA
        from vla.runtime.console import progress, say
        from vla.runtime.distributed import assemble

        team = assemble(shard=False)
        from envs.perturb.perturbation import parse

        perturb = parse(self.perturb) if self.perturb else None
        env = self._worlds(config.suite, config.num_envs // team.size, perturb, config.horizon)
        if self.late_steps:
            env = self._late(env, config, init)
        demos = None
        if self.demos is not None:
            from vla.data.lerobot_dataset import load_dataset

            demos = load_dataset(self.demos)

        def play(policy: Policy) -> tuple[int, int]:
            # The best checkpoint is chosen on other scenes than those `vla eval` reports on.
            seeds = range(VALIDATION_SEED0, VALIDATION_SEED0 + 2 * config.num_envs)[team.rank :: team.size]
            report = evaluate(policy, env, seeds, suite=config.suite)
            return report.successes, report.episodes

        try:
            with progress("online RL", config.max_updates, unit="updates") as update:

                def show(row: Mapping[str, float]) -> None:
                    update(row["update"], f"success {row.get('success_rate', 0):.2f} while exploring")

                def show_teacher(row: Mapping[str, float]) -> None:
                    rate = row.get("success_rate", 0)
                    update(0, f"training teacher: update {row['update']}/{row['of']}, success {rate:.2f}")

                model = VLA.load(init, member=member).to(choose_device(self.device))
                model.members = {}  # the weights they share are refined for one of them
                runner = Runner(
                    model, env, config, self.out, evaluate=play, demos=demos, team=team,
                    on_update=show if team.rank == 0 else None,
                    on_teacher_update=show_teacher if team.rank == 0 else None,
                )  # fmt: skip
                result = runner.run(resume=self.resume)
        finally:
            env.close()
        if team.rank == 0:
            say(f"best policy (update {result.best_update} of {result.updates}) in {self.out / 'best'}")
            if self.retain:
                self._report_retention(init, member)

    def _check(self) -> None:
        """What can be said before any work. ValueError."""
        check_numbers(
            self, minutes=(0.01, 1e6), seed=(0, 2**31), workers=(1, 1024), processes=(1, 1024), num_envs=(1, 100_000),
            horizon=(1, 10**9), retain_episodes=(1, 1_000_000), late_steps=(0, 10_000),
        )  # fmt: skip
        from envs.perturb.perturbation import parse
        from envs.registry import load_suite
        from rl.rollout.curriculum import RULES

        for suite in (*self.retain, *([] if self.suite is None else [self.suite])):
            load_suite(suite)
        if self.curriculum is not None:
            lookup(self.curriculum, RULES, "curriculum")
        if self.perturb:
            parse(self.perturb)
        if self.demos is not None and not (self.demos / "meta" / "info.json").is_file():
            raise ValueError(f"--demos {self.demos} is not a folder of demonstrations: it has no meta/info.json")

    def _config(self, config: Any) -> Any:
        """The recipe with this command's changes."""
        from rl.configs.run import CurriculumConfig

        seconds = None if self.minutes is None else 60 * self.minutes
        return replace(
            config,
            **given(
                suite=self.suite, max_seconds=seconds, seed=self.seed, num_envs=self.num_envs,
                horizon=self.horizon,
                curriculum=None if self.curriculum is None else CurriculumConfig(rule=self.curriculum),
                trackers=self.track or None,
            ),
        )  # fmt: skip

    def _worlds(
        self, suite: str, num_envs: int, perturb: Perturbation | None = None, horizon: int | None = None
    ) -> Any:
        from envs import make_vec

        device = None if self.backend == "cpu" else choose_device(self.device)
        return make_vec(
            suite, num_envs, num_workers=self.workers, backend=self.backend, device=device, perturb=perturb,
            horizon=horizon,
        )  # fmt: skip

    def _late(self, env: Any, config: Any, init: Path) -> Any:
        """The worlds with answers that come late, as many control steps apart as the policy will be asked."""
        from envs.backends.delayed_env import DelayedVecEnv
        from vla.model.policy import VLAPolicy

        policy = VLAPolicy.load(init)
        between, chunk_size = config.n_action_steps or policy.spec.n_action_steps, policy.spec.chunk_size
        if between + self.late_steps > chunk_size:
            env.close()
            raise ValueError(
                f"--late-steps {self.late_steps}: chunks of {chunk_size} actions, {between} of them played between "
                f"decisions, leave room for {chunk_size - between}"
            )
        return DelayedVecEnv(env, n_action_steps=between, late_steps=self.late_steps)

    def _report_retention(self, init: Path, member: str | None) -> None:
        from envs.evaluation.evaluate import evaluate
        from envs.registry import load_suite
        from envs.seeds import RETENTION_SEED0
        from rl.retention import retention
        from vla.core.config import save_json
        from vla.model.model import VLA
        from vla.model.policy import VLAPolicy
        from vla.runtime.console import format_rate, stdout, table

        def play(policy: Policy, suite: str) -> Any:
            env = self._worlds(suite, min(48, self.retain_episodes))
            try:
                first = RETENTION_SEED0
                count = self.retain_episodes * len(load_suite(suite).tasks)
                return evaluate(policy, env, range(first, first + count), suite=suite)
            finally:
                env.close()

        before, after = VLAPolicy(VLA.load(init, member=member)), VLAPolicy.load(self.out / "best")
        report = retention(before, after, self.retain, play)
        save_json(self.out / "retention.json", report)
        rows = [
            (f"{row['suite']}/{row['task']}", format_rate(row["before"]), format_rate(row["after"]), row["verdict"])
            for row in report["tasks"]
        ]
        stdout().print(table("retention", ("task", "before", "after", ""), rows))

    def kept(self) -> str:
        return f"the last evaluated checkpoint stays in {self.out}; add --resume to continue"
