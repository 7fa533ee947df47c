"""`vla rl`: refine a policy by online RL in simulation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from bascule.commands.base import Command, check_numbers, chosen_perturbation, given, refuse_idle, stays
from vla.core.checkpoint import CONFIG, weights_digest
from vla.core.config import lookup
from vla.runtime.devices import choose_device
from vla.runtime.locks import refuse_used

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation
    from vla.core.types import Policy
    from vla.data.lerobot_dataset import DemoSet


@dataclass(frozen=True)
class RL(Command):
    """Refine a policy by online RL in simulation."""

    recipe: Positional[str]
    """Name of the recipe, which sets the method and its budgets; see `vla list recipes`. `vla rl reset-free --help`
    has flags of its own."""
    init: Path
    """Checkpoint to start from."""
    embodiment: str | None = None
    """The robot to refine, for a checkpoint trained for several; the result is a policy for this robot only."""
    suite: str | None = None
    """The suite to train in. Default: the recipe's."""
    out: Path = Path("runs/rl")
    """The folder of the run: OUT/best is the policy, OUT/last is where --resume continues."""
    updates: int | None = None
    """Updates to make. Default: the recipe's, which learn as much on a busy machine as on an idle one."""
    minutes: float | None = None
    """Train for this time instead of the recipe's updates; beside --updates it is a limit."""
    seed: int | None = None
    """Seed of scenes, exploration and fresh weights. Default: the recipe's."""
    resume: bool = False
    """Continue the run in OUT bit-exactly; start it if there is none yet."""
    workers: int = 2
    """Simulation worker processes of each learning process."""
    processes: int = 1
    """Learning processes on this machine, started by torchrun, each with its share of the environments. On two cores,
    two of them with one worker each take a sixth less time than one."""
    backend: Literal["cpu", "warp"] = "cpu"
    """cpu: MuJoCo in worker processes. warp: MuJoCo Warp, all environments on one device."""
    num_envs: int | None = None
    """Environments that play at the same time, over all processes. Default: the recipe's."""
    horizon: int | None = None
    """Control steps of a training episode, fewer than the suite's; `vla eval` always uses the suite's."""
    demos: Path | None = None
    """Folder of demonstrations, for recipes that learn a teacher from them (multitask, ...-guided)."""
    curriculum: str | None = None
    """Rule by which tasks are sampled from their success rates: uniform, vla-rl, frontier, weakest."""
    retain: tuple[str, ...] = ()
    """Suites on which the policy is compared before and after, per task; written to OUT/retention.json."""
    retain_episodes: int = 96
    """Episodes per task for --retain."""
    track: tuple[str, ...] = ()
    """Trackers to log to in addition to OUT/metrics.jsonl: tensorboard, wandb, trackio."""
    randomise: tuple[str, ...] = ()
    """Domain randomisation for training and validation: light, medium, strong or robust, and AXIS=FROM:TO to change a
    mix; plain=SHARE leaves that share of the episodes as they are. Its patterns, colours, light directions, camera
    orbits and words are none of the tests' (--perturb). Default: the recipe's."""
    perturb: tuple[str, ...] = ()
    """Perturbations as in `vla eval`, AXIS=FROM:TO each: for tests rather than for training."""
    late_steps: int = 0
    """Train for latency: each chunk is executed with a delay of up to this many control steps after its observation,
    drawn per episode. A chunk must have this many actions more than are executed between two decisions."""
    device: str = "auto"
    """Torch's device, such as cpu or cuda:0. auto: the first GPU if there is one, else the CPU."""

    @classmethod
    def variant(cls, args: list[str]) -> tuple[type[Command], list[str]]:
        """`vla rl reset-free` has flags of its own."""
        if args[:1] != ["reset-free"]:
            return cls, args
        from bascule.commands.learning.reset_free import ResetFree

        return ResetFree, args[1:]

    def run(self) -> None:
        """Refine the policy and write checkpoints to `out`; `out`/best is the best on validation scenes. ValueError for
        invalid arguments."""
        from rl.recipes import RECIPES

        recipe = lookup(self.recipe, RECIPES, "recipe")
        from bascule.catalogue import trained

        refuse_used(self.out / "last" / CONFIG, self.out, "a run", resume=self.resume)
        init = trained(self.init)
        self._check()
        from policies.load import chosen_embodiment, picture_size, reads_depth
        from vla.runtime.console import say
        from vla.runtime.distributed import launch, launched

        member = chosen_embodiment(init, self.embodiment)
        config, size = self._config(recipe()), max(self.processes, launched()[1])
        if self.demos is not None and config.guide is None:
            say(f"warning: recipe '{self.recipe}' has no teacher to learn from --demos, which is not used; "
                "multitask and ...-guided have one")  # fmt: skip
        elif self.demos is not None:
            from bascule.teachers import refuse_other_suite

            refuse_other_suite(self.demos, config.suite)
        if config.num_envs % size:
            raise ValueError(f"--num-envs {config.num_envs} does not divide among {size} processes")
        if self.processes != 1 and launched()[1] == 1:
            launch(self.processes)
        from envs.evaluation.evaluate import evaluate
        from envs.seeds import VALIDATION_SEED0
        from rl.budget import cut_short, shown, sufficient_seconds
        from rl.runner import Runner
        from vla.core.config import load_json
        from vla.model.model import VLA
        from vla.runtime.distributed import assemble
        from vla.runtime.process import use_idle_cores

        team = assemble(shard=False)
        if team.size == 1:
            use_idle_cores()
        perturb = chosen_perturbation(self.perturb, self.randomise or (() if self.perturb else config.randomise))
        pixels, depth = picture_size(init, member), reads_depth(init)
        env = self._worlds(config.suite, config.num_envs // team.size, pixels, perturb, config.horizon, depth=depth)
        if self.late_steps:
            env = self._late(env, config, init, member)
        demos = None
        if self.demos is not None:
            from vla.data.lerobot_dataset import load_dataset
            from vla.training.interventions import demonstrated

            demos = demonstrated(load_dataset(self.demos))

        def play(policy: Policy) -> tuple[int, int]:
            # The best checkpoint is chosen on other scenes than those `vla eval` reports on.
            seeds = range(VALIDATION_SEED0, VALIDATION_SEED0 + 2 * config.num_envs)[team.rank :: team.size]
            report = evaluate(policy, env, seeds, suite=config.suite)
            return report.successes, report.episodes

        try:
            with shown(config) as (show, show_teacher):
                model = VLA.load(init, member=member).to(choose_device(self.device))
                model.members = {}  # the weights they share are refined for one of them
                self._check_retained(model, pixels, depth)
                runner = Runner(
                    model, env, config, self.out, evaluate=play, demos=demos, team=team,
                    conditions=self._conditions(perturb, demos) | {"policy (--init)": weights_digest(init)},
                    on_update=show if team.rank == 0 else None,
                    on_teacher_update=show_teacher if team.rank == 0 else None,
                )  # fmt: skip
                result = runner.run(resume=self.resume)
        finally:
            env.close()
        if team.rank == 0:
            say(f"best policy (update {result.best_update} of {result.updates}) in {self.out / 'best'}")
            taught = self.out / "teacher.json"
            if lost := cut_short(config, result, load_json(taught) if taught.is_file() else None):
                go_on = "continue with --resume" if result.stopped_by == "seconds" else "run again with"
                count = "" if config.max_updates is None else f"--updates {config.max_updates} "
                minutes = sufficient_seconds(config, result) // 60
                say(f"warning: {lost}: this policy had less training than was planned; {go_on} {count}--minutes "
                    f"{minutes}")  # fmt: skip
            if self.retain:
                self._report_retention(init, member, pixels, depth)

    def _check(self) -> None:
        """Raise ValueError for invalid arguments before any work."""
        check_numbers(
            self, updates=(1, 10**9), minutes=(0.01, 1e6), seed=(0, 2**31), workers=(1, 1024), processes=(1, 1024),
            num_envs=(1, 100_000), horizon=(1, 10**9), retain_episodes=(1, 1_000_000), late_steps=(0, 10_000),
        )  # fmt: skip
        from envs.registry import load_suite

        suites = [load_suite(name) for name in (*self.retain, *([] if self.suite is None else [self.suite]))]
        if self.demos is not None and not (self.demos / "meta" / "info.json").is_file():
            raise ValueError(f"--demos {self.demos} is not a folder of demonstrations: it has no meta/info.json")
        from envs.make import worlds_class

        for suite in suites:
            worlds_class(suite)  # refuses one whose package is not installed
        if not self.retain:
            refuse_idle(self, "without --retain, whose episodes they are", "retain_episodes")
        if self.backend == "warp":
            refuse_idle(self, "with --backend warp, which simulates in this process", "workers")
        chosen_perturbation(self.perturb, self.randomise)
        from vla.runtime.run_log import check_trackers

        check_trackers(self.track)
        if self.curriculum is not None:
            from rl.rollout.curriculum import RULES

            lookup(self.curriculum, RULES, "curriculum")
            from rl.recipes import RECIPES

            name = self.suite or RECIPES[self.recipe]().suite
            if len(load_suite(name).tasks) == 1:
                raise ValueError(f"--curriculum draws among tasks, and suite {name} has one: leave it out")

    def _config(self, config: Any) -> Any:
        """The recipe with this command's changes."""
        from rl.budget import by_the_clock, with_updates
        from rl.configs.run import CurriculumConfig

        if self.updates is not None:
            config = with_updates(config, self.updates)
        if self.minutes is not None and self.updates is None:
            config = by_the_clock(config, 60 * self.minutes)
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
        self,
        suite: str,
        num_envs: int,
        pixels: int | None,
        perturb: Perturbation | None = None,
        horizon: int | None = None,
        *,
        depth: bool = False,
    ) -> Any:
        from envs import make_vec
        from vla.core.types import IMAGE_SIZE

        device = None if self.backend == "cpu" else choose_device(self.device)
        return make_vec(
            suite, num_envs, num_workers=self.workers, backend=self.backend, device=device, perturb=perturb,
            horizon=horizon, image_size=pixels or IMAGE_SIZE, depth=depth, calibration=depth,
        )  # fmt: skip

    def _late(self, env: Any, config: Any, init: Path, member: str | None) -> Any:
        """The worlds with answers that come late, as many control steps apart as the policy will be asked."""
        from envs.backends.delayed_env import DelayedVecEnv
        from vla.model.model import VLA
        from vla.model.policy import VLAPolicy

        policy = VLAPolicy(VLA.load(init, member=member))
        between, chunk_size = config.n_action_steps or policy.spec.n_action_steps, policy.spec.chunk_size
        if between + self.late_steps > chunk_size:
            env.close()
            raise ValueError(
                f"--late-steps {self.late_steps}: chunks of {chunk_size} actions, {between} of them played between "
                f"decisions, leave room for {chunk_size - between}"
            )
        return DelayedVecEnv(env, n_action_steps=between, late_steps=self.late_steps)

    def _conditions(self, perturb: Perturbation | None, demos: DemoSet | None) -> dict[str, str]:
        """The things that a resumed run must have in common with its beginning, beside configuration and policy."""
        from vla.training.run_identity import fingerprint

        drawn = {} if perturb is None or not perturb.any() else asdict(perturb)
        return {
            "perturbations (--randomise, --perturb)": "; ".join(
                f"{axis} {value}" for axis, value in drawn.items() if value not in (0.0, ())
            )
            or "none",
            "--late-steps": str(self.late_steps),
            "--backend": self.backend,
            "demonstrations (--demos)": "none" if demos is None else fingerprint([demos]),
        }

    def _check_retained(self, model: Any, pixels: int | None, depth: bool) -> None:
        """ValueError for a suite of --retain in which the policy cannot be played: now, not when the run is over."""
        from vla.core.compatibility import require_same

        for suite in self.retain:
            env = self._worlds(suite, 1, pixels, depth=depth)
            try:
                require_same(model, env, where=f"suite {suite} of --retain")
            finally:
                env.close()

    def _report_retention(self, init: Path, member: str | None, pixels: int | None, depth: bool) -> None:
        from envs.evaluation.evaluate import evaluate
        from envs.registry import load_suite
        from envs.seeds import RETENTION_SEED0
        from rl.retention import retention
        from vla.core.config import save_json
        from vla.model.model import VLA
        from vla.model.policy import VLAPolicy
        from vla.runtime.console import format_rate, stdout, table

        def play(policy: Policy, suite: str) -> Any:
            env = self._worlds(suite, min(48, self.retain_episodes), pixels, depth=depth)
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
        """The last evaluated checkpoint is kept after Ctrl-C."""
        told = f"the last evaluated checkpoint stays in {self.out}; add --resume to continue"
        return stays(self.out / "last" / CONFIG, told)
