"""What the critic reads: the simulator's state, the policy's latents, or both; and that the policy never notices."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.configs.learning import ActorConfig, CriticConfig
from rl.models.actor import GaussianChunkActor
from rl.models.critic import Critic
from rl.models.policy_inputs import summary
from rl.recipes import RECIPES
from rl.rollout.step_collector import Collector
from rl.runner import Runner
from rl.storage.rollout_buffer import RolloutBuffer
from tests.rl.test_learning import rates
from tests.rl.test_vla import make_vla
from tests.rl.toy import SPEC, PointReach, ToyVLA, config, learning_config


class Unknown(PointReach):
    """As a real robot: there is no simulator's state to read."""

    privileged_dim = 0

    def _obs(self):
        obs = super()._obs()
        obs.privileged = None
        return obs


def collected(reads, env, refiner_width=0):
    actor = GaussianChunkActor(make_vla(), SPEC.names, ActorConfig(refiner_width=refiner_width))
    worlds = Collector(actor, env, generator=torch.Generator().manual_seed(1), train_seeds=(0, 1000))
    worlds.critic_reads = reads
    buffer = RolloutBuffer(4, env.num_envs)
    worlds.collect(buffer)
    return actor, buffer


@pytest.mark.parametrize("refiner_width", [0, 8])
def test_the_critic_reads_what_it_is_told(refiner_width):
    buffers = {reads: collected(reads, PointReach(8), refiner_width) for reads in ("privileged", "latents", "both")}
    for name in ("action", "log_prob", "reward", "proprio"):
        ours = [buffer.flat(name) for _, buffer in buffers.values()]
        assert torch.equal(ours[0], ours[1]) and torch.equal(ours[0], ours[2]), "the rollout is the same"
    actor, buffer = buffers["latents"]
    state, elapsed = buffer.flat("state"), buffers["privileged"][1].flat("state")[:, -1:]
    conditions = buffer.conditions(torch.arange(buffer.size))
    latents = summary(conditions, buffer.flat("proprio"))
    assert torch.equal(state, torch.cat([latents, elapsed], 1)) and not latents.requires_grad
    both, told = buffers["both"][1].flat("state"), buffers["privileged"][1].flat("state")
    assert torch.equal(both, torch.cat([told[:, :4], state], 1))
    # A chunk ends where the next one begins, unless the episode ended: then in its own last state.
    done = (buffer.time_major("terminated") | buffer.time_major("truncated"))[:-1]
    state, after = buffer.time_major("state"), buffer.time_major("next_state")
    assert torch.allclose(after[:-1][~done], state[1:][~done], atol=5e-3), "kept in half precision"
    assert not done.any() or (after[:-1][done] != state[1:][done]).any(1).all()


def test_without_privileged_state_the_latents_do(cloned, tmp_path):
    model = ToyVLA()
    model.load_state_dict(cloned)
    settings = config(max_updates=3, num_envs=8)
    with pytest.raises(ValueError, match=r"reads='latents'"):
        Runner(model, Unknown(8), settings, tmp_path / "blind").run()
    told = replace(settings, critic=CriticConfig(reads="both"))
    with pytest.raises(ValueError, match=r"reads='latents'"):
        Runner(model, Unknown(8), told, tmp_path / "both").run()
    seen = replace(settings, critic=CriticConfig(reads="latents"))
    rows = []
    Runner(model, Unknown(8), seen, tmp_path / "seen", on_update=rows.append).run()
    assert [row["policy_steps"] > 0 for row in rows[1:]] == [True, True]


@pytest.mark.parametrize("reads", ["latents", "both"])
def test_ppo_learns_with_a_shared_critic_and_resumes_exactly(cloned, tmp_path, reads):
    settings = replace(learning_config(), critic=CriticConfig(reads=reads))
    before, *_, after = rates(cloned, tmp_path / "whole", settings)
    assert before <= 0.6 and after >= 0.9
    short = replace(config(num_envs=8), critic=CriticConfig(reads=reads))
    short = replace(short, ppo=replace(short.ppo, critic_memory=3, critic_lam=0.9))

    def run(out, updates, resume=False):
        model = ToyVLA()
        model.load_state_dict(cloned)
        runner = Runner(model, PointReach(8), replace(short, max_updates=updates), tmp_path / out)
        runner.run(resume=resume)
        return runner.learner.tensors()

    whole = run("a", 4)
    run("b", 2)
    parts = run("b", 4, resume=True)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_the_value_sends_no_gradient_into_the_policy():
    actor, buffer = collected("latents", PointReach(8))
    critic = Critic(0, 2, CriticConfig(reads="latents"), latent_dim=buffer.flat("state").shape[1] - 1)
    critic(buffer.flat("state")).sum().backward()
    assert all(p.grad is None for p in actor.parameters()) and all(p.grad is not None for p in critic.parameters())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="latent_dim"):
        Critic(4, 2, CriticConfig(reads="latents"))
    actor = GaussianChunkActor(make_vla(), SPEC.names, ActorConfig(trains="all"))
    with pytest.raises(ValueError, match="learning backbone"):
        actor.latents_of(*actor.encode(PointReach(2).reset(seeds=[0, 1])))


def test_the_default_is_the_simulators_state():
    assert CriticConfig().reads == "privileged" and Critic(4, 2).state_dim == 7
    assert all(make().critic.reads == "privileged" for make in RECIPES.values())
    assert np.isfinite(Critic(4, 2)(torch.zeros(3, 7)).detach().numpy()).all()
