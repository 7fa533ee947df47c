"""parity: with chunks of one control step our PPO is Stable-Baselines3's, in one update exactly and in returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from bascule.experiments.gym_control import ClassicConfig, GymWorlds, MlpNetwork, learn, returns_of
from rl.algorithms.ppo import PPO
from rl.models.actor import GaussianChunkActor
from rl.models.critic import Critic
from rl.rollout.step_collector import Collector
from rl.storage.rollout_buffer import RolloutBuffer
from vla.core.types import VecEnv

ROOT = Path(__file__).resolve().parents[3]
PENDULUM = "InvertedPendulum-v5"
pytest.importorskip("stable_baselines3")


def benchmark():
    from bascule.experiments import sb3_parity

    return sb3_parity


def test_gym_worlds_are_the_tasks_themselves():
    worlds, alone = GymWorlds(PENDULUM, 2), gymnasium.make(PENDULUM)
    assert isinstance(worlds, VecEnv) and (worlds.horizon, worlds.proprio_dim) == (1000, 4)
    worlds.reset(seeds=[5, 7])
    seen, _ = alone.reset(seed=7)
    rng, total, steps = np.random.default_rng(0), 0.0, 0
    over = False
    while not over:
        chunk = rng.uniform(-3, 3, (2, 4, 1)).astype(np.float32)
        result = worlds.step_chunk(chunk)
        for action in chunk[1, : result.n_steps[1]]:
            seen, reward, terminated, truncated, _ = alone.step(action)
            total, steps, over = total + reward, steps + 1, terminated or truncated
        assert np.array_equal(result.obs.proprio[1], seen.astype(np.float32))
        assert (terminated, truncated) == (result.terminated[1], result.truncated[1])
    assert terminated and 0 < steps < 1000 and worlds.step_chunk(chunk).n_steps[1] == 0
    with pytest.raises(ValueError, match="continuous action"):
        GymWorlds("CartPole-v1", 1)


def test_one_update_is_sb3s():
    """Same weights, same rollout, same advantages: after three full-batch epochs the policies are still the same."""
    from rl.external.sb3 import leave_no_log

    parity = benchmark()
    ppo = {"epochs": 3, "minibatch_size": 256, "lr": 1e-3, "log_std_lr": 1e-3, "clip": 0.02}
    config = ClassicConfig(num_envs=4, steps_per_update=64)
    config = replace(config, ppo=replace(config.ppo, **ppo))
    worlds = GymWorlds(PENDULUM, 4)
    actor = GaussianChunkActor(MlpNetwork(4, 1, hidden=config.hidden, seed=3), worlds.action_spec.names, config.actor)
    learner = PPO(actor, Critic(0, 4), config.ppo, generator=torch.Generator().manual_seed(0))
    buffer = RolloutBuffer(64, 4)
    collector = Collector(actor, worlds, generator=torch.Generator().manual_seed(1), train_seeds=(0, 1000))
    collector.collect(buffer)
    learner.estimate(buffer)
    assert buffer.flat("terminated").any()

    theirs = parity.sb3_model(PENDULUM, config, seed=0)
    # What belongs to the value is left out: it would share the limit on the gradient's norm.
    theirs.vf_coef, theirs.policy.optimizer.param_groups[0]["eps"] = 0.0, 1e-8
    theirs.learning_rate = theirs.lr_schedule = lambda _: 1e-3
    ours_to_theirs = [
        (actor.model[0], theirs.policy.mlp_extractor.policy_net[0]),
        (actor.model[2], theirs.policy.mlp_extractor.policy_net[2]),
        (actor.model[4], theirs.policy.action_net),
    ]
    with torch.no_grad():
        for mine, other in ours_to_theirs:
            other.load_state_dict(mine.state_dict())
        theirs.policy.log_std.copy_(actor.log_std)
    taken = theirs.rollout_buffer
    taken.reset()
    rows = {name: buffer.time_major(name).numpy() for name in ("proprio", "action", "log_prob")}
    taken.observations[:], taken.actions[:] = rows["proprio"], rows["action"][:, :, 0]
    taken.log_probs[:], taken.advantages[:] = rows["log_prob"], buffer.advantages_TN.numpy()
    taken.full = True
    leave_no_log(theirs)
    theirs.train()

    before = [p.detach().clone() for p in learner.policy_parameters]
    metrics = learner.improve(buffer)
    assert metrics["policy_steps"] == 3 and metrics["clip_fraction"] > 0.05, "the clip must have had something to say"
    assert all((a - b).abs().max() > 5e-4 for a, b in zip(before, learner.policy_parameters, strict=True))
    for mine, other in ours_to_theirs:
        for name, value in mine.state_dict().items():
            assert torch.allclose(value, other.state_dict()[name], atol=2e-5), name
    assert torch.allclose(actor.log_std, theirs.policy.log_std, atol=2e-5)


def test_both_learn_to_balance():
    """A short run: an untrained policy holds the pole for some 30 steps."""
    parity = benchmark()
    config = replace(parity.config_of(PENDULUM), num_envs=8)
    untrained, _ = learn(PENDULUM, config, seed=0, steps=0)
    start = returns_of(untrained, PENDULUM, 10).mean()
    found = parity.play(PENDULUM, config, 0, 8192)
    assert found["bascule"]["steps"] == found["sb3"]["steps"] == 8192
    assert start < 50 and found["bascule"]["return"] > 90 and found["sb3"]["return"] > 90
    assert 0.4 < found["bascule"]["return"] / found["sb3"]["return"] < 2.5


@pytest.mark.slow
def test_returns_agree_on_two_tasks_over_three_seeds(tmp_path):
    """Ten minutes: `bascule.experiments.sb3_parity`, whose table is in BENCHMARKS.md."""
    out = tmp_path / "parity.json"
    command = [sys.executable, "-m", "bascule.experiments.sb3_parity", "--json", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    tasks = json.loads(out.read_text())["tasks"]
    solved = {"Pendulum-v1": -300.0, "InvertedPendulum-v5": 800.0}
    for task, enough in solved.items():
        assert tasks[task]["difference"]["contains_0"], task
        assert min(tasks[task]["mean"].values()) > enough, task
