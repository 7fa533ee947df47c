"""The Gaussian over chunks: its density, its mask, its greedy limit; the critic's input normalisation."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from rl.configs.learning import ActorConfig
from rl.models.actor import GaussianChunkActor, GreedyPolicy, SampledPolicy
from rl.models.critic import Critic, critic_state
from rl.models.distribution import ChunkGaussian
from rl.models.running_norm import RunningNorm
from rl.models.vla_network import make_actor
from tests.rl.toy import CHUNK, SPEC, PointReach, ToyVLA
from vla.core.types import executed


def actor_with(**config) -> GaussianChunkActor:
    return make_actor(ToyVLA(), SPEC.names, ActorConfig(**config))


def test_log_prob_is_the_masked_sum_of_torch_normals():
    actor = actor_with()
    generator = torch.Generator().manual_seed(0)
    mean, action = torch.randn(2, 9, CHUNK, 3, generator=generator)
    executed = torch.arange(CHUNK) < torch.randint(0, CHUNK + 1, (9, 1), generator=generator)
    density = torch.distributions.Normal(mean, actor.log_std.exp()).log_prob(action)
    expected = (density * executed[..., None]).sum((1, 2))
    ours = ChunkGaussian(mean, actor.log_std).log_prob(action, executed)
    assert torch.allclose(ours, expected, atol=1e-4)
    theirs = norm.logpdf(action.numpy(), mean.numpy(), actor.log_std.exp().detach().numpy())
    assert np.allclose(ours.detach().numpy(), (theirs * executed[..., None].numpy()).sum((1, 2)), atol=1e-4)


def test_gripper_has_its_own_spread_and_std_is_clamped():
    actor = actor_with(motion_std=0.1, gripper_std=0.4, std_min=0.05, std_max=0.5)
    assert torch.allclose(actor.log_std.exp(), torch.tensor([0.1, 0.1, 0.4]))
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor([-9.0, -1.0, 9.0]))
    actor.clamp_spread()
    assert torch.allclose(actor.log_std.exp(), torch.tensor([0.05, float(np.exp(-1)), 0.5]))
    with pytest.raises(ValueError, match="std_max"):
        actor_with(motion_std=0.9)


def test_samples_have_the_stated_spread():
    actor = actor_with()
    mean = torch.zeros(20_000, CHUNK, 3)
    sample = ChunkGaussian(mean, actor.log_std).sample(torch.Generator().manual_seed(1), std_scale=0.5)
    assert torch.allclose(sample.std((0, 1)), torch.tensor([0.1, 0.1, 0.15]), rtol=0.02)


def test_greedy_policy_is_the_imitation_policy_exactly():
    model = ToyVLA().train()  # dropout on: the actor must switch it off
    actor = make_actor(model, SPEC.names).train()
    obs = PointReach(6).reset(seeds=range(6))
    policy = GreedyPolicy(actor, SPEC, CHUNK)
    assert not any(m.training for m in model.modules())
    imitation = model.predict(model.processor.prepare(obs))
    assert np.array_equal(policy.act(obs), imitation)
    assert np.array_equal(policy.act(obs), policy.act(obs))
    short = GreedyPolicy(actor, SPEC, 2)
    assert np.array_equal(executed(short.spec, short.act(obs)), imitation[:, :2])


def test_policies_keep_within_the_bounds_of_the_environment():
    policy = SampledPolicy(actor_with(std_max=50, motion_std=40), SPEC, CHUNK, generator=torch.Generator())
    action = policy.act(PointReach(8).reset(seeds=range(8)))
    assert action.dtype == np.float32 and np.abs(action[..., :2]).max() == np.float32(SPEC.high[0])


def test_only_the_head_and_the_spread_are_trained():
    names = {name for name, _ in actor_with().named_policy_parameters()}
    assert "log_std" in names and any("head" in n for n in names) and not any("backbone" in n for n in names)
    model = ToyVLA().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_actor(model, SPEC.names)


def test_running_norm_merges_batches_into_the_statistics_of_all():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 5.0, 0.1]) + 7
    norm = RunningNorm(3)
    for part in x.split([1, 99, 200]):
        norm.update(part)
    assert torch.allclose(norm.mean.float(), x.mean(0), atol=1e-5)
    assert torch.allclose(norm.var.float(), x.var(0, unbiased=False), rtol=1e-5)
    assert torch.allclose(norm(x).std(0), torch.ones(3), atol=0.01)


def test_critic_reads_privileged_state_proprio_and_time():
    env = PointReach(5)
    obs = env.reset(seeds=range(5))
    state = critic_state(obs, np.linspace(0, 1, 5, dtype=np.float32))
    assert state.shape == (5, env.privileged_dim + env.proprio_dim + 1) and state.dtype == torch.float32
    assert Critic(env.privileged_dim, env.proprio_dim)(state).shape == (5,)
    obs.privileged = None
    with pytest.raises(ValueError, match="privileged"):
        critic_state(obs, np.zeros(5, np.float32))
