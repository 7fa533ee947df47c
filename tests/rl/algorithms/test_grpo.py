"""GRPO, leave-one-out and filtered imitation: the groups' arithmetic, what is kept, and that they learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from envs.sim.render_options import RenderOptions
from rl.algorithms.filtered_bc import FilteredImitation
from rl.algorithms.grpo import GRPO, group_advantages
from rl.algorithms.policy_gradient import clipped_surrogate
from rl.configs.learning import FilteredConfig, GRPOConfig
from rl.models.vla_network import make_actor
from rl.rollout.episode_collector import EpisodeCollector
from rl.rollout.step_collector import Collector
from rl.runner import Runner
from rl.storage.episode_buffer import EpisodeBuffer
from tests.rl.toy import CHUNK, SPEC, PointReach, ToyVLA, config, evaluate


def setup(cloned, how, num_envs=32, **collect) -> tuple[GRPO, EpisodeCollector, EpisodeBuffer]:
    model = ToyVLA()
    model.load_state_dict(cloned)
    actor = make_actor(model, SPEC.names)
    kind = GRPO if isinstance(how, GRPOConfig) else FilteredImitation
    learner = kind(actor, how, generator=torch.Generator().manual_seed(0))
    worlds = Collector(
        actor, PointReach(num_envs), generator=torch.Generator().manual_seed(1), train_seeds=(0, 1000), n_action_steps=2
    )
    settings = {"group_size": getattr(how, "group_size", 1), "wanted": 64, "max_rounds": 3, "judge": learner.judge}
    gather = EpisodeCollector(worlds, **(settings | collect))
    return learner, gather, EpisodeBuffer(gather.capacity)


def test_grpo_group_math():
    returns = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    expected = (returns - returns.mean(1, keepdim=True)) / returns.std(1, unbiased=False, keepdim=True)
    assert torch.allclose(group_advantages(returns, "grpo"), expected, atol=1e-4)
    rloo = group_advantages(returns, "rloo")
    assert torch.allclose(rloo[0], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))


@pytest.mark.parametrize("baseline", ["grpo", "rloo"])
def test_grpo_zero_variance_groups_give_exactly_zero(baseline):
    returns = torch.tensor([0.0, 1.0, 0.1, 1 / 3])[:, None].expand(4, 7)
    assert torch.equal(group_advantages(returns, baseline), torch.zeros(4, 7))


def test_grpo_filter_bounds_are_inclusive(cloned):
    learner, *_ = setup(cloned, GRPOConfig(group_size=10, keep=(0.1, 0.9)), num_envs=40)
    returns = torch.zeros(5, 10)
    for group, successes in enumerate((0, 1, 5, 9, 10)):
        returns[group, :successes] = 1.0
    assert learner.judge(returns)[0].tolist() == [False, True, True, True, False]
    learner.config = replace(learner.config, keep=(0.2, 0.8))
    assert learner.judge(returns)[0].tolist() == [False, False, True, False, False]


def test_grpo_groups_share_the_exact_initial_state():
    from envs.backends.cpu_worlds import TabletopWorlds
    from envs.registry import load_suite

    worlds = TabletopWorlds(load_suite("tabletop-pick"), 4, render=RenderOptions(image_size=16))
    worlds.render_images = False
    worlds.reset(seeds=[7, 7, 8, 7])
    states = [data.qpos.copy() for data in worlds.data]
    assert np.array_equal(states[0], states[1]) and np.array_equal(states[0], states[3])
    assert not np.array_equal(states[0], states[2])


def test_rloo_is_unbiased_on_a_bandit():
    """A Bernoulli policy with success probability p: the exact gradient of p is p (1 - p) in its logit."""
    generator = torch.Generator().manual_seed(0)
    p = 0.3
    action = (torch.rand(60_000, 4, generator=generator) < p).float()
    reward = action  # pulling the arm is the success
    score = action - p  # d log pi / d logit
    assert float((group_advantages(reward, "rloo") * score).mean()) == pytest.approx(p * (1 - p), rel=0.02)
    # GRPO's division by the group's deviation weights groups differently: another, biased, objective
    assert float((group_advantages(reward, "grpo") * score).mean()) != pytest.approx(p * (1 - p), rel=0.2)


def test_clip_higher_and_dual_clip():
    ratio = torch.tensor([0.7, 1.25, 1.35, 1.25, 5.0])
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    log_ratio = ratio.log().requires_grad_()
    loss, outside = clipped_surrogate(log_ratio, advantage, 0.2, clip_high=0.28, dual_clip=3.0)
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    assert (gradient == 0).tolist() == [False, False, True, False, True]
    assert outside == pytest.approx(3 / 5)


def test_only_mixed_groups_and_executed_decisions_are_kept(cloned):
    learner, gather, buffer = setup(cloned, GRPOConfig(group_size=8, keep=(0.0, 1.0)), wanted=10_000)
    metrics = gather.collect(buffer)
    seeds = gather.collector.env.seeds_seen
    assert all(len(set(seeds[i : i + 8])) == 1 for i in range(0, len(seeds), 8)), "a group is one seed"
    assert len(set(seeds)) == len(seeds) // 8 == 12 and metrics["rounds"] == 3
    assert 0 < metrics["kept_groups"] < 12 and metrics["kept_episodes"] == 8 * metrics["kept_groups"]
    executed = buffer.flat("executed")[: buffer.size]
    assert executed.any(1).all() and not executed[:, 2:].any(), "rows that moved something, two steps of four"
    advantages = buffer.advantages_B
    assert (advantages != 0).all() and len(advantages) == buffer.size
    # right after the rollout the ratio is 1
    _, log_ratio, _ = learner.policy_loss(buffer.policy_batch(torch.arange(buffer.size)))
    assert log_ratio.abs().max() < 1e-5
    assert learner.update(buffer)["policy_steps"] > 0


def test_without_a_mixed_group_nothing_moves(cloned):
    learner, gather, buffer = setup(cloned, GRPOConfig(group_size=8), wanted=8, max_rounds=1)
    gather.collector.env.radius = 0.0  # nobody succeeds
    before = [p.detach().clone() for p in learner.policy_parameters]
    metrics = gather.collect(buffer) | learner.update(buffer)
    assert metrics["kept_groups"] == 0 and metrics["skipped"] == 1 and metrics["success_rate"] == 0
    assert all(map(torch.equal, before, learner.policy_parameters))


def test_filtered_keeps_successes_only_and_leaves_the_spread(cloned):
    learner, gather, buffer = setup(cloned, FilteredConfig(lr=1e-3, epochs=2), wanted=20)
    std = learner.actor.log_std.detach().clone()
    metrics = gather.collect(buffer)
    assert metrics["kept_episodes"] == round(metrics["success_rate"] * metrics["episodes"]) >= 20
    head = [p.detach().clone() for p in learner.actor.model.head.parameters()]
    assert learner.update(buffer)["policy_steps"] > 0
    assert torch.equal(std, learner.actor.log_std)
    assert not all(map(torch.equal, head, learner.actor.model.head.parameters()))


def run(cloned, out, how, updates, **changes):
    model = ToyVLA()
    model.load_state_dict(cloned)
    settings = replace(config(num_envs=64, max_updates=updates, eval_every=updates, **changes), method=how)
    return Runner(model, PointReach(64), settings, out, evaluate=evaluate)


def test_grpo_learns_and_resumes_exactly(cloned, tmp_path):
    how = GRPOConfig(lr=6e-4, epochs=4, minibatch_size=256, group_size=8, kl_stop=0.1, episodes_per_update=96)
    result = run(cloned, tmp_path / "whole", how, 24).run()
    (_, before, n), *_, (_, after, _) = result.evaluations
    assert 0.4 <= before / n <= 0.6 and after / n >= 0.85
    settings = {"max_updates": 4}
    whole = run(cloned, tmp_path / "a", how, 2)
    whole.config = replace(whole.config, **settings)
    whole.run()
    run(cloned, tmp_path / "b", how, 2).run()
    parts = run(cloned, tmp_path / "b", how, 2)
    parts.config = replace(parts.config, **settings)
    parts.run(resume=True)
    for name, tensor in whole.learner.tensors().items():
        assert torch.equal(tensor, parts.learner.tensors()[name]), name


def test_filtered_imitation_learns_something(cloned, tmp_path):
    how = FilteredConfig(lr=6e-4, epochs=4, minibatch_size=256, episodes_per_update=48)
    (_, before, _), *_, (_, after, n) = run(cloned, tmp_path, how, 16).run().evaluations
    assert after > before + 0.1 * n


def test_groups_must_fit_the_worlds(cloned):
    with pytest.raises(ValueError, match="groups of 5"):
        setup(cloned, GRPOConfig(group_size=5))
    for wrong in ({"group_size": 1}, {"keep": (0.9, 0.1)}, {"max_rounds": 0}):
        assert GRPOConfig(**wrong).problem()
    assert CHUNK == 4
