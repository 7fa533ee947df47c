"""Our PPO with chunks of one control step against Stable-Baselines3's: same task, network, hyperparameters, env steps.

    python -m bascule.experiments.sb3_parity [--tasks Pendulum-v1 ...] [--seeds 3] [--steps N] [--json FILE]

Prints the return of the deterministic policy after training, per seed the mean of 20 episodes; then mean and 95%
interval (Student's t over the seeds) of each implementation and of their difference (Welch). What is not the same: our
critic has its own optimiser, normalises its input and reads the time as well; SB3 normalises advantages per minibatch.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from stable_baselines3 import PPO

from bascule.experiments.gym_control import ClassicConfig, learn, returns_of
from rl.external.sb3 import leave_no_log
from vla.core.config import save_json
from vla.core.types import ActionChunk, Observation, PolicySpec
from vla.runtime.provenance import provenance

EPISODES = 20
TASKS = {
    "Pendulum-v1": (100_000, {"gamma": 0.9, "lr": 1e-3}),
    "InvertedPendulum-v5": (60_000, {"gamma": 0.99, "lr": 1e-3}),
}
"""Control steps, and what the task is usually run with."""


def config_of(task: str) -> ClassicConfig:
    """Both learners' hyperparameters."""
    settings = TASKS[task][1]
    base = ClassicConfig()
    rates = dict.fromkeys(("lr", "log_std_lr", "critic_lr"), settings["lr"])
    return replace(base, ppo=replace(base.ppo, gamma=settings["gamma"], **rates))


class Sb3Policy:
    """An SB3 model as a policy: its deterministic action is a chunk of one step."""

    spec = PolicySpec(chunk_size=1)

    def __init__(self, model: PPO) -> None:
        self.model = model

    def reset(self, env_ids: object = None) -> None:
        """Does nothing: the model has no state."""

    def act(self, obs: Observation) -> ActionChunk:
        """The deterministic actions (B, 1, A)."""
        return self.model.predict(obs.proprio, deterministic=True)[0][:, None]


def sb3_model(task: str, config: ClassicConfig, seed: int) -> PPO:
    """SB3's PPO with the same hyperparameters."""
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv

    ppo = config.ppo
    return PPO(
        "MlpPolicy", DummyVecEnv([lambda: gymnasium.make(task)] * config.num_envs), learning_rate=ppo.lr,
        n_steps=config.steps_per_update, batch_size=ppo.minibatch_size, n_epochs=ppo.epochs, gamma=ppo.gamma,
        gae_lambda=ppo.lam, clip_range=ppo.clip, max_grad_norm=ppo.max_grad_norm, seed=seed, device="cpu",
        policy_kwargs={"net_arch": list(config.hidden)},
    )  # fmt: skip


def play(task: str, config: ClassicConfig, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Both, trained on one seed: {name: {"return", "steps", "seconds"}}."""
    out = {}
    began = time.process_time()
    policy, taken = learn(task, config, seed=seed, steps=steps)
    seconds = time.process_time() - began
    out["bascule"] = {"return": float(returns_of(policy, task, EPISODES).mean()), "steps": taken, "seconds": seconds}
    began = time.process_time()
    model = sb3_model(task, config, seed)
    leave_no_log(model)
    model.learn(steps)
    seconds = time.process_time() - began
    theirs = float(returns_of(Sb3Policy(model), task, EPISODES).mean())
    out["sb3"] = {"return": theirs, "steps": model.num_timesteps, "seconds": seconds}
    return out


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of the 95% interval) over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """(mean of ours minus theirs, low, high): Welch's 95% interval."""
    if np.ptp(ours) == np.ptp(theirs) == 0:  # no spread to test by
        return (float(np.mean(ours) - np.mean(theirs)),) * 3
    low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return float(np.mean(ours) - np.mean(theirs)), float(low), float(high)


def summary(rows: list[dict[str, dict[str, float]]]) -> dict[str, object]:
    """Mean, interval and difference of the returns over one task's seeds, as JSON values."""
    returns = {name: [row[name]["return"] for row in rows] for name in ("bascule", "sb3")}
    gap, low, high = difference(returns["bascule"], returns["sb3"])
    return {
        "returns": returns,
        "mean": {name: interval(values)[0] for name, values in returns.items()},
        "half_interval95": {name: interval(values)[1] for name, values in returns.items()},
        "difference": {"mean": gap, "interval95": [low, high], "contains_0": bool(low <= 0 <= high)},
        "env_steps": {name: rows[0][name]["steps"] for name in returns},
        "cpu_seconds": {name: float(np.mean([row[name]["seconds"] for row in rows])) for name in returns},
    }


def main() -> None:
    """Train both learners on every task and seed, print the returns and write --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="control steps (default: the task's own)")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.seeds < 2:
        parser.error("an interval needs at least 2 seeds")
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    print(f"{'task':<22}{'env steps':>10}{'bascule':>20}{'sb3':>20}   difference, 95%")
    for task in asked.tasks:
        steps = asked.steps or TASKS[task][0]
        rows = [play(task, config_of(task), seed, steps) for seed in range(asked.seeds)]
        results[task] = found = summary(rows)
        cells = [f"{found['mean'][n]:.0f} +- {found['half_interval95'][n]:.0f}" for n in ("bascule", "sb3")]
        gap = found["difference"]
        print(
            f"{task:<22}{steps:>10}{cells[0]:>20}{cells[1]:>20}   "
            f"{gap['mean']:+.0f} [{gap['interval95'][0]:+.0f}, {gap['interval95'][1]:+.0f}]",
            flush=True,
        )
        if asked.json:
            report = {"bench": "parity", **provenance(), "seeds": asked.seeds, "episodes": EPISODES, "tasks": results}
            save_json(asked.json, report)


if __name__ == "__main__":
    main()
