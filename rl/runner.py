"""The loop of online RL: calibrate the noise, then collect, estimate advantages and update, evaluating on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from envs.registry import scenes_digest
from rl import streams
from rl.algorithm import make_algorithm
from rl.algorithms.policy_gradient import OBJECTIVES
from rl.configs.run import RunnerConfig, RunResult
from rl.models.actor import GreedyPolicy
from rl.models.vla_network import make_actor, serve_as_trained
from rl.rewards.shaping import Shaping, learn_process_reward
from rl.rollout.calibration import calibrate_std
from rl.rollout.curriculum import make_curriculum
from rl.rollout.step_collector import Collector, totals
from rl.run_checkpoint import (
    BEST,
    LEARNER,
    REWARD,
    TEACHER,
    Groups,
    frozen_digest,
    load_run,
    require_same_base,
    require_same_conditions,
    require_same_scenes,
    save_run,
)
from rl.run_checks import require_fit
from rl.selection import Selection
from rl.teacher.distill import Distillation
from rl.teacher.state_teacher import Teacher
from rl.teacher.train_teacher import train_teacher
from vla.backbones.features import hears_noise
from vla.core.checkpoint import CONFIG
from vla.core.config import encode, save_json
from vla.core.types import Policy, VecEnv
from vla.runtime.distributed import Team
from vla.runtime.locks import locked, refuse_used
from vla.runtime.process import keep_freed_memory, restored_threads
from vla.runtime.run_log import Metrics

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet

Evaluate = Callable[[Policy], tuple[int, int]]
"""Plays a policy on fixed evaluation seeds -> (successes, episodes). It may use the runner's own environment."""


class Runner:
    """Refines a VLA, `model` (changed in place), in `env` by chunk-level PPO or the configured method.

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
        conditions: Mapping[str, str] | None = None,
        team: Team | None = None,
        on_update: Callable[[dict[str, float]], None] | None = None,
        on_teacher_update: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """`conditions`: what the run depends on beside its configuration, in words by what it is called; it must be the
        same when the run is resumed. `team` is the processes that learn together, each with its share of the
        environments and of the evaluation episodes. `on_teacher_update` receives the teacher's updates. ValueError for
        what does not fit together."""
        self.team = team = team or Team()
        self.model, self.env, self.config, self.out = model, env, config, Path(out)
        self.evaluate, self.demos = evaluate, demos
        self.on_update, self.on_teacher_update = on_update, on_teacher_update
        require_fit(model, env, config, demos, team)
        team.place(model)
        self.actor = make_actor(model, env.action_spec.names, config.actor, seed=config.seed)
        n_action_steps = serve_as_trained(model, config.n_action_steps)
        shaping = config.shaping
        self.shaping = shaping and Shaping(env.num_envs, coef=shaping.coef, gamma=config.ppo.gamma)
        self.collector = Collector(
            self.actor,
            env,
            generator=streams.exploration(config.seed, team.rank),
            train_seeds=config.train_seeds,
            first_seed=config.seed,
            # environments that answer late play more of a chunk than passes between two decisions
            n_action_steps=env.chunk_steps or n_action_steps,
            curriculum=make_curriculum(config.curriculum, env, config.seed, team.rank),
            shaping=self.shaping,
            critic=config.critic.reads if config.method is None else None,
            score=OBJECTIVES[(config.method or config.ppo).ratio].score,
            share=(team.rank, team.size),
            word_noise=config.word_noise if hears_noise(getattr(model, "backbone", None)) else 0.0,
        )
        self.algorithm = make_algorithm(config, self.actor, self.collector, team)
        self.learner, self.buffer = self.algorithm.learner, self.algorithm.buffer
        self.distillation: Distillation | None = None  # made with its teacher, when the run begins or is loaded
        self.selection = Selection(self.actor, self.out / "best", team)
        self.std_scale = 1.0
        self._base = frozen_digest(model)
        self._scenes = scenes_digest(config.suite)
        # `scenes_digest` leaves out how long an episode lasts, which a suite file may have said otherwise.
        self._conditions = {**(conditions or {}), "episodes of control steps": str(env.horizon)}
        self._seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def env_steps(self) -> int:
        """Control steps so far, over all processes."""
        return int(self.team.total(float(self.collector.env_steps))[0])

    @property
    def seconds(self) -> float:
        """Wall clock used, including resumed sessions."""
        return self._seconds_before + time.monotonic() - self._started

    def greedy_policy(self) -> GreedyPolicy:
        """Return the current mean-action policy."""
        return GreedyPolicy(self.actor, self.env.action_spec, self.collector.n_action_steps)

    def run(self, *, resume: bool = False) -> RunResult:
        """Train until target or budget; then the model holds the best parameters (without `evaluate`: the last).

        `resume` continues the checkpoint in `out` if there is one, bit-exactly on CPU, and else begins: a run killed
        before its first checkpoint (calibration and teacher come before it) does the same again. ValueError when `out`
        holds a run and `resume` is not asked, or one of another configuration, or another process writes there. Ctrl-C
        at any moment leaves the checkpoint of the last evaluation.
        """
        with locked(self.out), restored_threads():
            self._started = time.monotonic()
            keep_freed_memory()
            begun = refuse_used(self.out / "last" / CONFIG, self.out, "a run", resume=resume)
            self.team.wait()  # all must have looked before the first of them writes
            if begun:
                self.load()
            else:
                self.begin()
            stopped_by = self._stop_reason()
            updates, log = self.learner.num_updates, None
            if self.team.rank == 0:  # only rank 0 logs
                log = Metrics(self.out, self.config.trackers, first_step=updates, config=encode(self.config))
            with log or nullcontext():
                while not stopped_by:
                    stopped_by = self._one_update(log)
            if not self.selection.best:
                with self.learner.averaged():
                    self.selection.keep(self.learner.num_updates)
            self.selection.restore()
            return RunResult(
                updates=self.learner.num_updates, env_steps=self.env_steps, seconds=self.seconds,
                std_scale=self.std_scale, best_update=self.selection.best_update,
                evaluations=tuple(self.selection.evaluations), stopped_by=stopped_by,
            )  # fmt: skip

    def begin(self) -> None:
        """Prepare the first update: calibration, the learnt reward, the teacher, the first checkpoint."""
        config = self.config
        self.out.mkdir(parents=True, exist_ok=True)
        self.std_scale = calibrate_std(self.collector, config, self.team)
        if self.shaping is not None and config.shaping is not None:
            report, steps = learn_process_reward(
                self.shaping, self.actor, self.env, self.collector.next_seeds, config.shaping,
                n_action_steps=self.collector.n_action_steps, seed=config.seed,
            )  # fmt: skip
            save_json(self.out / "progress.json", report.to_dict())
            self.collector.env_steps += steps
            self.collector.forget_worlds()
        if config.guide is not None and self.demos is not None:
            teacher, played = train_teacher(
                self.demos, self.model.processor, self.collector, config, team=self.team,
                seconds=lambda: self.seconds, on_update=self.on_teacher_update,
            )  # fmt: skip
            if self.team.rank == 0:
                save_json(self.out / "teacher.json", played)
            self.distillation = self._distillation(teacher)
        self._evaluate()
        self.save()

    def _distillation(self, teacher: Teacher) -> Distillation:
        order = streams.distillation(self.config.seed, self.team.rank)
        return Distillation(self.actor, teacher, self.config.guide, generator=order, team=self.team)

    def _one_update(self, log: Metrics | None) -> str:
        """Collect, update, and at the right moments evaluate and checkpoint. Returns why to stop, or ''."""
        began = time.monotonic()
        self.buffer.clear()
        metrics = totals(self.algorithm.collector.collect(self.buffer), self.team)
        collected = time.monotonic()
        metrics |= self.learner.update(self.buffer)
        if self.distillation is not None:  # after the policy's own steps, which must start from the policy that acted
            metrics |= self.distillation.improve(self.buffer)
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
        if log is not None:
            log.log(self.learner.num_updates, row)
        if boundary:
            self.save()
        if self.on_update is not None:
            self.on_update(row)
        return stopped_by

    def _stop_reason(self) -> str:
        return self.selection.stop_reason(
            self.config, updates=self.learner.num_updates, env_steps=self.env_steps, seconds=self.seconds
        )

    def _evaluate(self) -> float:
        """Return the greedy success rate; the best parameters are kept. NaN without `evaluate`."""
        if self.evaluate is None:
            return float("nan")
        with self.learner.averaged():
            return self.selection.record(self.learner.num_updates, *self.evaluate(self.greedy_policy()))

    def save(self) -> None:
        """Checkpoint the run. All environments then start new episodes, here as in the continuation."""
        self.collector.forget_worlds()
        groups: Groups = {LEARNER: self.learner.tensors(), BEST: self.selection.best}
        if self.shaping is not None:
            groups[REWARD] = self.shaping.model.state_dict()
        if self.distillation is not None:
            groups[TEACHER] = self.distillation.teacher.state_dict()
        state = {
            "learner": self.learner.trainer_state(),
            "collector": self.collector.state(),
            "std_scale": self.std_scale,
            "seconds": self.seconds,
            "processes": self.team.size,
            "base": self._base,
            "scenes": self._scenes,
            "conditions": self._conditions,
            "guide": None if self.distillation is None else self.distillation.state(),
            **self.selection.state(),
        }
        save_run(self.out, self.config, groups, state, self.team)

    def load(self) -> None:
        """Restore the checkpoint in `out`. ValueError when another configuration made it, or another policy, in
        other scenes or under other conditions."""
        groups, state = load_run(self.out, self.config, self.team)
        require_same_base(self.out, state, self._base)
        require_same_scenes(self.out, state, self._scenes)
        require_same_conditions(self.out, state, self._conditions)
        self.learner.load_tensors(groups[LEARNER])
        if self.shaping is not None:
            self.shaping.load(groups[REWARD], self.actor.device)
        if self.config.guide is not None:
            teacher = Teacher.from_tensors(groups[TEACHER], self.actor.chunk_size, self.config.guide.teacher)
            self.distillation = self._distillation(teacher.to(self.actor.device))
            self.distillation.load_state(state["guide"])
        self.learner.load_trainer_state(state.get("learner", state.get("ppo")))
        self.collector.load_state(state["collector"])
        self.std_scale = state["std_scale"]
        self.selection.load_state(state, groups[BEST])
        self._seconds_before = state["seconds"]
