"""Parts that learn and parts that stand still: head, bridge and head, a flow head; on the real VLA."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.algorithms.ppo import PPO
from rl.configs.learning import ActorConfig, PPOConfig
from rl.models.critic import Critic
from rl.models.vla_network import make_actor
from rl.rollout.step_collector import Collector
from rl.runner import Runner
from rl.storage.rollout_buffer import RolloutBuffer
from tests.rl.models.test_vla import _one_view, make_vla
from tests.rl.toy import SPEC, PointReach, config
from tests.vla.toy_backbone import load_toy
from vla.model.heads.residual import Latents
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

OPTIONS = {
    "head": ActorConfig(trains="head"),
    "bridge": ActorConfig(),
    "flow": ActorConfig(trains="head", noise="flow"),
    "flow-bridge": ActorConfig(noise="flow"),
}


def fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def vla_for(option: str) -> VLA:
    return make_vla(head="flow" if option.startswith("flow") else "l1")


@pytest.mark.parametrize("option", OPTIONS)
def test_frozen_vlm_and_greedy_is_the_imitation_at_first(option, tmp_path):
    vla, obs = vla_for(option), PointReach(8).reset(seeds=range(8))
    imitation, before = VLAPolicy(vla).act(obs), {n: fingerprint(getattr(vla, n)) for n in ("backbone", "bridge")}
    settings = config(num_envs=8, max_updates=4, ppo={"lr": 1e-3, "minibatch_size": 16})
    settings = replace(settings, actor=OPTIONS[option])
    rows = []
    runner = Runner(vla, PointReach(8), settings, tmp_path, evaluate=lambda p: (1, 2), on_update=rows.append)
    assert np.array_equal(runner.greedy_policy().act(obs), imitation), "sft -> rl: the same greedy action at step 0"
    inputs, _ = runner.actor.encode(obs)
    assert isinstance(inputs, Latents) == (option in ("head", "flow"))
    runner.run()
    assert all(row["first_log_ratio"] < 1e-5 for row in rows[1:]) and sum(row["policy_steps"] for row in rows[1:]) > 0
    assert fingerprint(vla.backbone) == before["backbone"]
    assert all(p.grad is None for p in vla.backbone.parameters())
    assert (fingerprint(vla.bridge) == before["bridge"]) == (option in ("head", "flow"))
    now = runner.greedy_policy().act(obs)
    assert not np.array_equal(now, imitation)
    saved = VLA.load(tmp_path / "best", load_backbone=lambda spec: _one_view(load_toy(spec)))
    assert np.allclose(VLAPolicy(saved).act(obs), now, atol=1e-5)


def test_features_are_computed_once_per_decision():
    vla, calls = vla_for("bridge"), []
    vla.backbone.register_forward_hook(lambda *_: calls.append(1))
    learner, collector, buffer = setup(vla, OPTIONS["bridge"], epochs=3, minibatch_size=1000)
    collector.collect(buffer)
    learner.update(buffer)
    assert len(calls) == 3


def setup(vla, actor_config, **ppo):
    env = PointReach(8)
    actor = make_actor(vla, SPEC.names, actor_config)
    torch.manual_seed(0)
    settings = PPOConfig(**({"critic_warmup": 0, "kl_stop": 1e9, "minibatch_size": 16} | ppo))
    critic = Critic(env.privileged_dim, env.proprio_dim)
    learner = PPO(actor, critic, settings, generator=torch.Generator().manual_seed(0))
    worlds = Collector(actor, env, generator=torch.Generator().manual_seed(1), train_seeds=(0, 1000))
    return learner, worlds, RolloutBuffer(3, 8)


def test_ratio_first_epoch_with_a_backbone_in_bfloat16():
    vla = make_vla(backbone_dtype="bfloat16").train()
    learner, worlds, buffer = setup(vla, ActorConfig())
    worlds.collect(buffer)
    learner.estimate(buffer)
    for size in (5, 24):
        for index in buffer.parts(-(-buffer.size // size), learner.generator):
            _, log_ratio, _ = learner.policy_loss(buffer.policy_batch(index))
            assert log_ratio.dtype == torch.float32 and log_ratio.abs().max() < 2e-3


def test_flow_chain_learns_by_the_same_ppo():
    """One step of PPO raises the density of what had positive advantage and lowers that of the rest."""
    learner, worlds, buffer = setup(vla_for("flow"), OPTIONS["flow"], epochs=1, minibatch_size=1000, lr=1e-4)
    worlds.collect(buffer)
    assert buffer.flat("action").shape[1:] == (6, 8, 3), "the chain is what is stored"
    learner.estimate(buffer)
    batch = buffer.policy_batch(torch.arange(24))
    learner.improve(buffer)
    _, log_ratio, _ = learner.policy_loss(batch)
    # Adam's first step follows the gradient's sign: the gain is first order
    assert float((log_ratio * batch.advantage_B).mean().detach()) > 0


def test_noise_of_a_flow_needs_a_flow_head_and_a_refiner_excludes_what_it_freezes():
    with pytest.raises(ValueError, match="start from one of `vla train --head flow`"):
        make_actor(make_vla(), SPEC.names, ActorConfig(noise="flow"))
    with pytest.raises(ValueError, match="refiner"):
        make_actor(make_vla(), SPEC.names, ActorConfig(trains="head", refiner_width=8))
    with pytest.raises(ValueError, match="correlation"):
        make_actor(make_vla(), SPEC.names, ActorConfig(correlation=1.0))
