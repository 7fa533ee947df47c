"""nan_guards: a simulation that blows up in mid-rollout costs its own episode; and the list of all checks is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from bascule.experiments.gym_control import MlpNetwork
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from rl.algorithms.grpo import GRPO
from rl.algorithms.ppo import PPO
from rl.configs.learning import GRPOConfig, PPOConfig
from rl.models.actor import GaussianChunkActor
from rl.models.critic import Critic
from rl.rollout.episode_collector import EpisodeCollector
from rl.rollout.step_collector import Collector
from rl.storage.episode_buffer import EpisodeBuffer
from rl.storage.rollout_buffer import RolloutBuffer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "envs" / "backends"))
from cursed_worlds import CURSED, LAST_STEP, CursedWorlds  # noqa: E402


@pytest.fixture
def worlds(tmp_path, monkeypatch) -> CursedWorlds:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it is called
    worlds = CursedWorlds(load_suite("tabletop-pick"), 4, render=RenderOptions(image_size=16))
    worlds.render_images = False
    return worlds


def actor_for(worlds: CursedWorlds) -> GaussianChunkActor:
    model = MlpNetwork(worlds.proprio_dim, worlds.action_spec.dim, chunk_size=6)
    return GaussianChunkActor(model, worlds.action_spec.names)


def test_rollouts_go_on_after_a_divergence(worlds):
    actor = actor_for(worlds)
    critic = Critic(worlds.privileged_dim, worlds.proprio_dim)
    settings = PPOConfig(critic_warmup=0, minibatch_size=8)
    learner = PPO(actor, critic, settings, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    collector = Collector(actor, worlds, generator=noise, train_seeds=(CURSED - 1, CURSED + 8))
    buffer = RolloutBuffer(3, 4)
    metrics = collector.collect(buffer)
    assert metrics["diverged"] == metrics["episodes"] == 1 and metrics["success_rate"] == 0
    truncated, n_steps = buffer.time_major("truncated"), buffer.time_major("n_steps")
    assert truncated.tolist() == [[False, True, False, False], *[[False] * 4] * 2] and n_steps[0, 1] == LAST_STEP
    assert not buffer.time_major("terminated").any()
    executed = buffer.time_major("executed")[0, 1]
    assert executed[:LAST_STEP].all() and not executed[LAST_STEP:].any()
    # It ended in what was last seen of it, near where it began; the world went on with a fresh seed.
    state, after = buffer.time_major("state"), buffer.time_major("next_state")
    assert torch.isfinite(after).all() and (state[1, 1, :-1] - after[0, 1, :-1]).abs().max() > 0.01
    assert worlds.episodes[1].seed == CURSED + 3 and n_steps[1, 1] == 6
    assert learner.update(buffer)["policy_steps"] > 0
    assert all(torch.isfinite(p).all() for p in [*actor.parameters(), *critic.parameters()])
    buffer.clear()
    assert "diverged" not in collector.collect(buffer)


def test_groups_of_episodes_go_on_too(worlds):
    actor = actor_for(worlds)
    learner = GRPO(actor, GRPOConfig(group_size=2, keep=(0.0, 1.0)), generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    collector = Collector(actor, worlds, generator=noise, train_seeds=(CURSED - 1, CURSED + 1))
    gather = EpisodeCollector(collector, group_size=2, wanted=4, max_rounds=1, judge=learner.judge)
    metrics = gather.collect(EpisodeBuffer(gather.capacity))
    assert metrics["episodes"] == 4 and metrics["control_steps"] == 2 * LAST_STEP + 2 * worlds.horizon


def test_the_list_of_checks_names_tests_that_exist():
    listed = re.findall(r"(\S+\.py)::(\w+)", (HERE / "conftest.py").read_text())
    assert len(listed) >= 40
    sources = {file: (HERE / file).read_text() for file, _ in listed}
    assert [f"{file}::{name}" for file, name in listed if f"def {name}(" not in sources[file]] == []
    numbered = re.findall(r"^ {0,2}(\d+) ", (HERE / "conftest.py").read_text(), re.MULTILINE)
    assert [int(n) for n in numbered] == list(range(1, 26))
