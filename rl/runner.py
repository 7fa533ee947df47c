"""The loop: calibrate the noise, then collect -> advantages -> update, evaluating and checkpointing on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rl.configs.rewards import ShapingConfig
from rl.configs.run import BUDGET_FIELDS, RunnerConfig, RunResult
from rl.configs.teacher import GuideConfig, PracticeConfig
from rl.models.actor import GaussianChunkActor, GreedyPolicy, SampledPolicy
from rl.rewards.process_reward import ProgressModel, Shaping, fit_progress, watch
from rl.rollout.curriculum import Curriculum
from rl.rollout.step_collector import Collector, play
from rl.run_config import make_method
from rl.storage.demonstrations import DemoRows
from rl.teacher.distill import Guide
from rl.teacher.state_teacher import Teacher, TeacherPolicy, fit_teacher
from rl.teacher.teacher_ppo import practise, undrawn
from vla.core.checkpoint import CONFIG, load_checkpoint, save_checkpoint
from vla.core.compatibility import require_same
from vla.core.config import encode, fill_defaults, save_json
from vla.core.types import Policy, VecEnv
from vla.model.config import VLAConfig, check_loads
from vla.runtime.distributed import Team
from vla.runtime.locks import locked, refuse_used
from vla.runtime.process import keep_freed_memory
from vla.runtime.run_log import Metrics

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet

__all__ = ["Evaluate", "Runner", "RunnerConfig", "RunResult"]

_ORDER = "`vla eval` reorders, training does not; name the demonstrations' components in the environment's order first"
Evaluate = Callable[[Policy], tuple[int, int]]
"""Plays a policy on fixed evaluation seeds -> (successes, episodes). It may use the runner's own environment."""


class Runner:
    """Refines `model` (a `vla.model.model.VLA`, changed in place) in `env` by chunk-level PPO, or by the method
    configured.

    `out` receives `best/` (by `model.save`: the best policy so far according to `evaluate`), `last/` (to resume)
    and `metrics.jsonl`. `evaluate` should use seeds apart from those of the final report, since it selects the best.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        env: VecEnv,
        config: RunnerConfig,
        out: Path | str,
        *,
        evaluate: Evaluate | None = None,
        demos: DemoSet | None = None,
        team: Team | None = None,
        on_update: Callable[[dict[str, float]], None] | None = None,
        on_practice: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """`team`: several processes that learn together (`vla.runtime.distributed.assemble`), each with its share of
        the worlds and of the evaluation episodes. `on_practice` hears of the teacher's own updates, before the
        first."""
        self.team = team = team or Team()
        if env.num_envs * team.size != config.num_envs:
            raise ValueError(
                f"the environment has {env.num_envs} worlds, the configuration asks for {config.num_envs}"
                + (f" over {team.size} processes" if team.size > 1 else "")
            )
        if config.horizon is not None and env.horizon != config.horizon:
            raise ValueError(
                f"the environment's episodes last {env.horizon} steps, the configuration asks for {config.horizon}: "
                f"make_vec(..., horizon={config.horizon})"
            )
        if config.shaping is not None and (config.method is not None or team.size > 1):
            raise ValueError("shaping goes with PPO in one process: episodes compared or filtered need the true reward")
        require_same(model, env, remedy=_ORDER)
        if demos is not None:  # they are normalised and compared component by component
            require_same(model, demos, where="demonstrations", ranges=False)
        team.place(model)
        self.model, self.env, self.config, self.out = model, env, config, Path(out)
        self.evaluate, self.on_update, self.on_practice = evaluate, on_update, on_practice
        if config.guide is not None and (config.method is not None or config.critic.reads != "privileged"):
            raise ValueError("a guide goes with PPO whose critic reads the simulator's state, as its teacher does")
        self.actor = GaussianChunkActor(model, env.action_spec.names, config.actor, seed=config.seed)
        n_action_steps = config.n_action_steps
        if isinstance(getattr(model, "config", None), VLAConfig):
            n_action_steps = n_action_steps or model.config.n_action_steps
            model.config = replace(model.config, n_action_steps=n_action_steps)  # to be served as it was trained
            check_loads(model)
        # worlds that answer late play more of a chunk than passes between two decisions
        n_action_steps = env.chunk_steps or n_action_steps
        self.collector = Collector(
            self.actor,
            env,
            # every process explores on its own
            generator=torch.Generator().manual_seed(2 * config.seed + 1 + 1_000_003 * team.rank),
            train_seeds=config.train_seeds,
            first_seed=config.seed,
            n_action_steps=n_action_steps,
            curriculum=self._curriculum(),
            share=(team.rank, team.size),
        )
        method = make_method(config, self.actor, self.collector, team)
        self.learner, self.gather, self.buffer = method.learner, method.gather, method.buffer
        self.guide: Guide | None = None
        if config.guide is not None:
            order = torch.Generator().manual_seed(2 * config.seed + 3 + 1_000_003 * team.rank)
            self.guide = Guide(self.actor, config.guide, generator=order, team=team)
        self._demos = demos
        needs_demos = config.actor.state_std or self.learner.config.demo_coef
        if (needs_demos or config.guide is not None) and demos is None:
            raise ValueError(
                "a guide, state_std and demo_coef need demonstrations: name a data set (--demos), or leave them off"
            )
        self.learner.demos = DemoRows.of(self.actor, demos, seed=config.seed) if needs_demos and demos else None
        self.std_scale = 1.0
        self.evaluations: list[tuple[int, int, int]] = []
        self.best_update = 0
        self._best: dict[str, torch.Tensor] = {}
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def _curriculum(self) -> Curriculum | None:
        config = self.config.curriculum
        if config is None:
            return None
        tasks = self.env.task_names
        if not tasks:
            raise ValueError(f"a curriculum needs an environment with named tasks; {self.config.suite} has none")
        return Curriculum(config, tasks, seed=self.config.seed + 7919 * self.team.rank)

    @property
    def env_steps(self) -> int:
        """Control steps so far, over all processes."""
        return int(self.team.total(float(self.collector.env_steps))[0])

    @property
    def seconds(self) -> float:
        """Wall clock used, over all sittings."""
        return self._seconds_before + time.monotonic() - self._started

    def greedy_policy(self) -> GreedyPolicy:
        """The current mean-action policy."""
        return GreedyPolicy(self.actor, self.env.action_spec, self.collector.n_action_steps)

    def run(self, *, resume: bool = False) -> RunResult:
        """Train until target or budget; then the model holds the best parameters (without `evaluate`: the last).

        `resume` continues the checkpoint in `out` if there is one, bit-exactly on CPU, and else begins: a run killed
        before its first checkpoint (calibration and teacher come before it) does the same again. ValueError when `out`
        holds a run and `resume` is not asked, or one of another configuration, or another process writes there. Ctrl-C
        at any moment leaves the checkpoint of the last evaluation.
        """
        with locked(self.out):
            return self._run(resume)

    def _run(self, resume: bool) -> RunResult:
        self._started = time.monotonic()
        keep_freed_memory()
        begun = refuse_used(self.out / "last" / CONFIG, self.out, "a run", resume=resume)
        self.team.wait()  # all must have looked before the first of them writes
        if begun:
            self.load()
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.config.actor.state_std:
                self.actor.scale = self.learner.demos.fit_scale(self.actor, seed=self.config.seed)
            self.calibrate()
            if self.config.shaping is not None:
                self._learn_progress(self.config.shaping)
            if self.guide is not None:
                self.guide.teacher = self._find_teacher(self.guide.config)
            self._evaluate()
            self.save()
        stopped_by = self._stop_reason()
        # only the first process keeps the books
        books = None
        if self.team.rank == 0:
            config = encode(self.config)
            books = Metrics(self.out, self.config.trackers, first_step=self.learner.num_updates, config=config)
        with books or nullcontext():
            while not stopped_by:
                stopped_by = self._one_update(books)
        self._restore_best()
        return RunResult(
            updates=self.learner.num_updates,
            env_steps=self.env_steps,
            seconds=self.seconds,
            std_scale=self.std_scale,
            best_update=self.best_update,
            evaluations=tuple(self.evaluations),
            stopped_by=stopped_by,
        )

    def _one_update(self, books: Metrics | None) -> str:
        """Collect, update, and at the right moments evaluate and checkpoint. Returns why to stop, or ''."""
        began = time.monotonic()
        self.buffer.clear()
        metrics = self._together(self.gather.collect(self.buffer))
        collected = time.monotonic()
        metrics |= self.learner.update(self.buffer)
        if self.guide is not None:  # after the policy's own steps: these must start from the policy that acted
            metrics |= self.guide.improve(self.buffer)
        updated = time.monotonic()
        stopped_by = self._stop_reason()
        boundary = bool(stopped_by) or self.learner.num_updates % self.config.eval_every == 0
        if boundary and self.evaluate is not None:
            metrics["eval_success_rate"] = self._evaluate()
            stopped_by = self._stop_reason()
        row = {
            "update": self.learner.num_updates,
            "env_steps": self.env_steps,
            "seconds": self.seconds,
            "seconds_collect": collected - began,
            "seconds_update": updated - collected,
            "seconds_eval": time.monotonic() - updated,
            "env_steps_per_s": metrics["control_steps"] / max(updated - began, 1e-9),
            **metrics,
        }
        if books is not None:
            books.log(self.learner.num_updates, row)
        if boundary:
            self.save()
        if self.on_update is not None:
            self.on_update(row)
        return stopped_by

    def _together(self, metrics: dict[str, float]) -> dict[str, float]:
        """A rollout's counts and rates over all processes."""
        if self.team.size == 1:
            return metrics
        counts = [name for name in ("episodes", "control_steps", "kept_groups", "kept_episodes") if name in metrics]
        rates = ("success_rate", "wrong_object")
        played = metrics["episodes"]
        totals = self.team.total(
            *(metrics[name] for name in counts), *(metrics.get(name, 0.0) * played for name in rates)
        )
        out = metrics | dict(zip(counts, totals, strict=False))
        if out["episodes"]:
            out |= {name: value / out["episodes"] for name, value in zip(rates, totals[len(counts) :], strict=True)}
        return out

    def _stop_reason(self) -> str:
        config = self.config
        target = config.target_success
        rates = [successes / episodes for _, successes, episodes in self.evaluations[-2:]]
        since_best = sum(update > self.best_update for update, _, _ in self.evaluations)
        reasons = {
            "target": target is not None and len(rates) == 2 and min(rates) >= target,
            "patience": config.patience is not None and since_best >= config.patience,
            "updates": self.learner.num_updates >= config.max_updates,
            "env_steps": config.max_env_steps is not None and self.env_steps >= config.max_env_steps,
            # clocks differ: if one process has run out of time, all stop
            "seconds": config.max_seconds is not None and self.team.any(self.seconds >= config.max_seconds),
        }
        return next((name for name, holds in reasons.items() if holds), "")

    def calibrate(self) -> None:
        """Shrink the initial std until noise costs little: where all samples fail there is nothing to learn from.

        The largest of `calibrate_scales` keeping `calibrate_keep` of greedy success, else the smallest. On training
        scenes.
        """
        config = self.config
        if not config.calibrate_scales:
            return
        rounds = -(-config.calibrate_episodes // config.num_envs)
        # one set of scenes for all: the scales are compared, not estimated
        seeds = [self.collector.next_seeds(self.env.num_envs) for _ in range(rounds)]
        greedy = self._successes(self.greedy_policy(), seeds)
        chosen = min(config.calibrate_scales)
        for scale in sorted(config.calibrate_scales, reverse=True):
            policy = SampledPolicy(
                self.actor,
                self.env.action_spec,
                self.collector.n_action_steps,
                generator=torch.Generator().manual_seed(config.seed),
                std_scale=scale,
            )
            if self._successes(policy, seeds) >= config.calibrate_keep * greedy:
                chosen = scale
                break
        self.std_scale = chosen
        with torch.no_grad():
            self.actor.log_std.add_(float(np.log(chosen)))
        self.actor.clamp_std()
        self.collector.forget_worlds()

    def _learn_progress(self, config: ShapingConfig) -> None:
        """Train and calibrate a process reward model on the policy's own episodes; OUT/progress.json says how good."""
        count = -(-config.episodes // self.env.num_envs) * self.env.num_envs
        policy = SampledPolicy(
            self.actor,
            self.env.action_spec,
            self.collector.n_action_steps,
            generator=torch.Generator().manual_seed(self.config.seed + 17),
        )
        episodes = watch(self.actor, policy, self.env, self.collector.next_seeds(count))
        self.collector.env_steps += sum(episode.control_steps for episode in episodes)
        model, report = fit_progress(episodes, config.progress, seed=self.config.seed)
        if self.team.rank == 0:
            save_json(self.out / "progress.json", report.to_dict())
        self._use_progress(model, config)
        self.collector.forget_worlds()

    def _use_progress(self, model: ProgressModel, config: ShapingConfig) -> None:
        gamma = self.config.ppo.gamma if self.config.ppo.discount_per == "chunk" else 1.0
        self.collector.shaping = Shaping(model.to(self.actor.device), self.env.num_envs, coef=config.coef, gamma=gamma)

    def _find_teacher(self, config: GuideConfig) -> Teacher:
        """From the demonstrations, and by practice; OUT/teacher.json says what it reaches by itself, on training
        scenes."""
        assert self._demos is not None, "asked for in __init__"
        env, model, known = self.env, self.model, self._demos.privileged
        if known is not None and known.shape[1] != env.privileged_dim:
            raise ValueError(
                f"the demonstrations hold {known.shape[1]} numbers of the simulator's state, the worlds of "
                f"{self.config.suite} have {env.privileged_dim}: give demonstrations of this suite"
            )
        teacher = fit_teacher(
            self._demos, model.processor, model.chunk_size, config.teacher,
            plane=env.plane, seed=self.config.seed,
        )  # fmt: skip
        teacher.to(self.actor.device)
        report: dict[str, Any] = {"demonstrations": len(self._demos.episodes)}
        with undrawn(env):
            reached, practice = self._worth(teacher), config.practice
            if practice is not None and (practice.enough is None or self._rate(reached) < practice.enough):
                before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
                report |= {"imitation": reached, "control_steps": self._practise(teacher, practice)}
                reached = self._worth(teacher)
                if self._rate(reached) < self._rate(report["imitation"]):  # nothing to learn from, it may lose its way
                    teacher.load_state_dict(before)
                    reached = report["imitation"]
        if self.team.rank == 0:
            save_json(self.out / "teacher.json", report | reached)
        self.collector.forget_worlds()
        return teacher

    def _worth(self, teacher: Teacher) -> dict[str, int]:
        """How often the teacher succeeds by itself: it does not look, so let nothing be drawn."""
        env, rounds = self.env, max(1, 96 // self.config.num_envs)
        policy = TeacherPolicy(teacher, self.actor, env.action_spec, self.collector.n_action_steps)
        successes = self._successes(policy, [self.collector.next_seeds(env.num_envs) for _ in range(rounds)])
        return {"successes": successes, "episodes": rounds * self.config.num_envs}

    @staticmethod
    def _rate(played: dict[str, Any]) -> float:
        return played["successes"] / played["episodes"]

    def _practise(self, teacher: Teacher, config: PracticeConfig) -> int:
        """Returns the control steps that it took, over all processes."""
        ours, team = self.config, self.team

        def spent(steps: int) -> bool:
            seconds = ours.max_seconds is not None and self.seconds >= config.share * ours.max_seconds
            limited = ours.max_env_steps is not None
            return team.any(seconds) or (limited and team.total(float(steps))[0] >= config.share * ours.max_env_steps)

        steps = practise(
            teacher,
            self.model.processor,
            self.env,
            config,
            train_seeds=ours.train_seeds,
            n_action_steps=self.collector.n_action_steps,
            curriculum=self._curriculum(),
            seed=ours.seed,
            team=team,
            worth=lambda: self._rate(self._worth(teacher)),
            spent=spent,
            on_update=self.on_practice,
        )
        self.collector.env_steps += steps  # whatever plays, the world was asked
        return int(team.total(float(steps))[0])

    def _successes(self, policy: Policy, seeds: list[list[int]]) -> int:
        return int(self.team.total(float(sum(play(policy, self.env, s) for s in seeds)))[0])

    def _evaluate(self) -> float:
        """Greedy success rate; keeps the parameters when they are the best so far. NaN without `evaluate`."""
        if self.evaluate is None:
            return float("nan")
        with self.learner.averaged():
            return self._judge(self.evaluate)

    def _judge(self, evaluate: Evaluate) -> float:
        played = evaluate(self.greedy_policy())
        successes, episodes = (int(n) for n in self.team.total(*map(float, played)))
        rate = successes / episodes
        best = max((s / n for _, s, n in self.evaluations), default=-1.0)
        self.evaluations.append((self.learner.num_updates, successes, episodes))
        if rate >= best:  # at equal success the later policy has seen more
            self.best_update = self.learner.num_updates
            self._best = self._parameters()
            self._save_best()
        return rate

    def _save_best(self) -> None:
        if self.team.rank == 0:
            self.model.save(self.out / "best")
        self.team.wait()

    def _restore_best(self) -> None:
        if not self._best:
            self.best_update = self.learner.num_updates
            with self.learner.averaged():
                self._best = self._parameters()
                self._save_best()
        with torch.no_grad():
            for name, p in self.actor.named_policy_parameters():
                p.copy_(self._best[name])

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.actor.named_policy_parameters()}

    def save(self) -> None:
        """Checkpoint what a continuation needs. All worlds then start new episodes, here as in the continuation."""
        self.collector.forget_worlds()
        trainer = {
            "learner": self.learner.trainer_state(),
            "collector": self.collector.state(),
            "std_scale": self.std_scale,
            "evaluations": [list(row) for row in self.evaluations],
            "best_update": self.best_update,
            "seconds": self.seconds,
            "processes": self.team.size,
            "guide": None if self.guide is None else self.guide.state(),
        }
        if self.team.rank:  # what is its own: the rest is the same everywhere, and the first process keeps it
            save_checkpoint(self._own_folder(), config={}, tensors={}, stats={}, trainer_state=trainer)
            self.team.wait()
            return
        tensors = self.learner.tensors() | {f"best.{name}": t for name, t in self._best.items()}
        if self.collector.shaping is not None:
            tensors |= {f"progress.{n}": t for n, t in self.collector.shaping.model.state_dict().items()}
        if self.guide is not None:
            tensors |= {f"teacher.{n}": t for n, t in self.guide.teacher.state_dict().items()}
        save_checkpoint(self.out / "last", config=encode(self.config), tensors=tensors, stats={}, trainer_state=trainer)
        self.team.wait()

    def _own_folder(self) -> Path:
        return self.out / f"last-{self.team.rank}"

    def load(self) -> None:
        """Continue from the checkpoint in `out`."""
        saved = load_checkpoint(self.out / "last")
        ours = encode(self.config)
        theirs = fill_defaults(encode(RunnerConfig()), saved.config)
        differing = sorted(k for k in ours if k not in BUDGET_FIELDS and theirs.get(k) != ours[k])
        if differing:
            k = differing[0]
            raise ValueError(
                f"{self.out} was made with {k}={theirs.get(k)!r}, now it is {ours[k]!r}: resume with the same "
                "configuration (budgets may change) or start a new run in another folder"
            )
        self.learner.load_tensors(saved.tensors)
        self._best = {n.removeprefix("best."): t for n, t in saved.tensors.items() if n.startswith("best.")}
        if self.config.shaping is not None:
            progress = {n.removeprefix("progress."): t for n, t in saved.tensors.items() if n.startswith("progress.")}
            self._use_progress(ProgressModel.from_tensors(progress), self.config.shaping)
        if self.guide is not None:
            tensors = {n.removeprefix("teacher."): t for n, t in saved.tensors.items() if n.startswith("teacher.")}
            teacher = Teacher.from_tensors(tensors, self.model.chunk_size, self.guide.config.teacher)
            self.guide.teacher = teacher.to(self.actor.device)
        trainer = saved.trainer_state
        if trainer.get("processes", 1) != self.team.size:
            raise ValueError(f"{self.out} was made by {trainer.get('processes', 1)} processes: resume it with as many")
        if self.team.rank:
            trainer = load_checkpoint(self._own_folder()).trainer_state
        self.learner.load_trainer_state(trainer.get("learner", trainer.get("ppo")))
        self.collector.load_state(trainer["collector"])
        if self.guide is not None:
            self.guide.load_state(trainer["guide"])
        self.std_scale = trainer["std_scale"]
        self.evaluations = [tuple(row) for row in trainer["evaluations"]]
        self.best_update = trainer["best_update"]
        self._seconds_before = trainer["seconds"]
