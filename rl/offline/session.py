"""From a policy, its demonstrations and environments to a run without resets: logs, reward, agent, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.backends.reset_free_env import ResetCounts, ResetFreeVecEnv
from envs.evaluation.evaluate import evaluate
from envs.evaluation.one_task import OneTask
from envs.registry import scenes_digest
from envs.seeds import RL_TRAIN_SEEDS
from rl.configs.offline import ResetFreeConfig
from rl.offline.agent import Agent
from rl.offline.judges import ClassifierJudge, Judge, SimulatorJudge
from rl.offline.logs import Logs, log
from rl.offline.practice import PracticeEnv
from rl.offline.run import Draws, Evaluate, Outcome, ResetFreeRun
from rl.rewards.success_classifier import fit_classifier, shuffled
from rl.run_checkpoint import frozen_digest
from rl.run_checks import ORDER
from vla.core.checkpoint import CONFIG
from vla.core.compatibility import require_same
from vla.core.config import save_json
from vla.core.types import VecEnv
from vla.data.fitting import aligned
from vla.data.lerobot_dataset import DemoSet
from vla.model.advantage import refuse_guided
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.training.run_identity import fingerprint


def learn_without_resets(
    vla: VLA, worlds: MujocoVecEnv, demos: DemoSet, config: ResetFreeConfig, out: Path, **how: Any
) -> Outcome:
    """Learn in simulated environments; `how`: as of `practise`. ValueError for a suite without the pair of tasks,
    too."""
    refuse_unfit(vla)
    draws = Draws(config.seed, RL_TRAIN_SEEDS)
    env = ResetFreeVecEnv(worlds, config.pair, draws, reset_every=config.reset_every, horizon=config.horizon)
    require_same(vla, env, remedy=ORDER)
    return practise(vla, env, demos, config, out, draws=draws, **how)


def practise(
    vla: VLA,
    env: PracticeEnv,
    demos: DemoSet,
    config: ResetFreeConfig,
    out: Path,
    *,
    draws: Draws,
    evaluate: Evaluate,
    logs_at: Path | None = None,
    resume: bool = False,
    on_window: Callable[[dict[str, Any]], None] | None = None,
    on_logged: Callable[[int], None] = lambda episodes: None,
    judge: Callable[[PracticeEnv], Judge] | None = None,
) -> Outcome:
    """Learn from `demos` and logged episodes, then online, in `out`; `vla` gets a residual. `draws`: the scenes of
    `env`'s resets, which the run counts. `logs_at`: where the logs are kept, for other runs from the same policy
    (OUT/logs). `on_logged`: told how many episodes are logged. `judge`: makes who rewards; None: as `config` says.
    ValueError for a policy that has been refined."""
    refuse_unfit(vla)
    demos, _ = aligned(vla.processor, demos)
    agent = Agent(vla, env.action_spec.names, config.n_action_steps, config.agent, seed=config.seed)
    folder = logs_at or out / "logs"
    begun = {"policy": frozen_digest(agent.vla), "recording": fingerprint([demos])}
    if (scenes := scenes_digest(config.suite)) is not None:
        begun |= {"suite file": scenes, "horizon": str(env.horizon)}
    logs = Logs.load(folder, config, begun) if (folder / CONFIG).is_file() else None
    if logs is not None:
        draws.count = logs.figures["scenes"]
    if logs is None or not logs.finished(config):
        if logs is not None:
            env.counts = ResetCounts(**logs.figures["resets"])

        def keep(logs: Logs) -> None:
            logs.figures |= {"scenes": draws.count, "resets": vars(env.counts).copy(), **begun}
            logs.save(folder, config)
            on_logged(logs.figures["episodes"])

        logs = log(agent, env, demos, config, kept=logs, keep=keep)
        env.counts = ResetCounts()  # those of the logs are told apart
    rewards = _judge(logs, config, out, env.num_envs, backbone=vla.config.backbone) if judge is None else judge(env)
    run = ResetFreeRun(agent, env, logs, rewards, config, out, evaluate=evaluate, draws=draws, on_window=on_window)
    return run.run(resume=resume)


def refuse_unfit(vla: VLA) -> None:
    """ValueError for a policy of which no agent can be made."""
    refuse_guided(vla)
    if problem := _unfit(vla):
        raise ValueError(f"{problem}: start from a policy of imitation (`vla train`) without that")


def _unfit(vla: VLA) -> str | None:
    """Why no agent can be made of this policy; None where one can."""
    reasons = {
        "this policy has been refined by RL already": vla.refiner is not None,
        "learning without resets does not train a policy that remembers": vla.config.memory is not None,
        "learning without resets does not train modulators": vla.pool is not None,
        "learning without resets reads no depth": vla.config.xyz is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _judge(logs: Logs, config: ResetFreeConfig, out: Path, num_envs: int, *, backbone: str) -> Judge:
    """Who rewards. A classifier is learnt from the logs, and kept in OUT/classifier with its errors beside it."""
    if config.reward == "simulator":
        return SimulatorJudge(num_envs)
    watched = logs.watched
    if config.reward == "shuffled":
        watched = shuffled(watched, seed=config.seed)
    classifier, report = fit_classifier(watched, config.classifier, seed=config.seed)
    classifier.save(out / "classifier", backbone)
    save_json(out / "classifier.json", report.to_dict())
    return ClassifierJudge(num_envs, classifier)


def true_success(vla: VLA, referee: VecEnv, tasks: Sequence[str], seeds: range) -> Evaluate:
    """The function that plays each of `tasks` on the scenes `seeds` of `referee`, with real resets: {task: [successes,
    episodes]}, by the simulator's word."""

    def play() -> dict[str, list[int]]:
        counts = {}
        for task in tasks:
            report = evaluate(VLAPolicy(vla), OneTask(referee, task), seeds)  # type: ignore[arg-type]
            counts[task] = [report.successes, report.episodes]
        return counts

    return play
