"""PPO's update: ratio 1 at the start, what is masked, clipped, frozen, stopped and refused; and the buffer."""

import dataclasses
import re

import pytest
import torch

from rl.algorithms.policy_gradient import clipped_surrogate, kl_estimate
from rl.algorithms.ppo import PPO
from rl.configs.learning import PPOConfig
from rl.models.critic import Critic
from rl.models.vla_network import make_actor
from rl.rollout.step_collector import Collector
from rl.storage.rollout_buffer import NonFiniteError, RolloutBuffer
from tests.rl.toy import CHUNK, SPEC, Endless, PointReach, ToyVLA

N, T = 16, 8


def setup(cloned, env=None, **ppo) -> tuple[PPO, Collector, RolloutBuffer]:
    model = ToyVLA().train()
    model.load_state_dict(cloned)
    env = env or PointReach(N)
    actor = make_actor(model, SPEC.names)
    torch.manual_seed(0)
    critic = Critic(env.privileged_dim, env.proprio_dim)
    learner = PPO(actor, critic, PPOConfig(**({"minibatch_size": 50, "critic_warmup": 0} | ppo)),
                  generator=torch.Generator().manual_seed(0))  # fmt: skip
    collector = Collector(actor, env, generator=torch.Generator().manual_seed(1), train_seeds=(0, 1000))
    return learner, collector, RolloutBuffer(T, env.num_envs)


def snapshot(learner: PPO) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.policy_parameters]


def same(a, b) -> bool:
    return all(map(torch.equal, a, b))


def test_ratio_is_1_before_the_first_step_whatever_the_batch_size(cloned):
    learner, collector, buffer = setup(cloned)
    collector.collect(buffer)
    assert (buffer.flat("n_steps") < CHUNK).any(), "the rollout must contain chunks cut by success"
    learner.actor.train()
    learner.estimate(buffer)
    for size in (1, 7, 50, N * T):
        for index in buffer.parts(-(-buffer.size // size), learner.generator):
            _, log_ratio, _ = learner.policy_loss(buffer.policy_batch(index))
            assert (log_ratio.exp() - 1).abs().max() < 1e-5


def test_a_policy_that_is_not_the_one_that_acted_is_refused(cloned):
    learner, collector, buffer = setup(cloned)
    collector.collect(buffer)
    learner.actor.model.head.train()  # dropout
    before = snapshot(learner)
    with pytest.raises(RuntimeError, match="not the one that acted"):
        learner.update(buffer)
    assert same(before, snapshot(learner))


def test_what_was_not_executed_changes_nothing(cloned):
    learner, collector, buffer = setup(cloned)
    collector.collect(buffer)
    learner.estimate(buffer)
    batch = buffer.policy_batch(torch.arange(buffer.size))
    idle = ~batch.executed_BC
    assert idle.any()
    results = []
    for garbage in (0.0, 123.0, float("nan")):
        action = torch.where(idle[..., None], batch.action + garbage, batch.action)
        loss, _, _ = learner.policy_loss(dataclasses.replace(batch, action=action))
        results.append([loss, *torch.autograd.grad(loss, learner.policy_parameters)])
    assert all(g.abs().max() > 0 for g in results[0][1:])
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_gradient_is_zero_exactly_where_the_clip_says():
    ratio = torch.tensor([0.7, 0.7, 1.0, 1.0, 1.3, 1.3])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    log_ratio = ratio.log().requires_grad_()
    loss, outside = clipped_surrogate(log_ratio, advantage, 0.2)
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    assert (gradient == 0).tolist() == [False, True, False, False, True, False]
    assert torch.allclose(gradient[[0, 5]], -(ratio * advantage / 6)[[0, 5]])
    assert outside == pytest.approx(4 / 6)


def test_kl_estimate_is_the_kl_of_two_gaussians():
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    old, new = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.2, 1.1)
    exact = float(torch.distributions.kl_divergence(old, new))
    assert kl_estimate(new.log_prob(x) - old.log_prob(x)) == pytest.approx(exact, rel=0.03)


def test_critic_warm_up_leaves_the_policy_bit_equal(cloned):
    learner, collector, buffer = setup(cloned, critic_warmup=2)
    before, critic = snapshot(learner), [p.detach().clone() for p in learner.critic.parameters()]
    for warm in (True, True, False):
        buffer.clear()
        collector.collect(buffer)
        learner.update(buffer)
        assert same(before, snapshot(learner)) == warm
    assert not same(critic, list(learner.critic.parameters()))


def test_the_backbone_is_frozen(cloned):
    learner, collector, buffer = setup(cloned)
    collector.collect(buffer)
    learner.update(buffer)
    assert all(torch.equal(p, cloned[f"backbone.{n}"]) for n, p in learner.actor.model.backbone.named_parameters())


def test_kl_stop_ends_the_policy_steps_but_not_the_critics(cloned):
    learner, collector, buffer = setup(cloned, lr=3e-3, epochs=20, kl_stop=0.005)
    collector.collect(buffer)
    metrics = learner.update(buffer)
    assert metrics["kl_stopped"] == 1 and metrics["policy_steps"] < 20 * 3
    assert metrics["kl_last"] > 0.005 >= metrics["kl"]
    assert metrics["value_loss"] > 0


@pytest.mark.parametrize("part", ["loss", "grad", "obs", "obs (privileged", "action", "reward", "value"])
def test_nan_is_named_and_reaches_no_parameter(cloned, part):
    learner, collector, buffer = setup(cloned)
    before = snapshot(learner)
    env = collector.env

    def poison(attribute: str, name: str):
        real = getattr(env, attribute)

        def broken(*args, **kwargs):
            out = real(*args, **kwargs)
            getattr(out, name)[3] = float("nan")
            return out

        setattr(env, attribute, broken)

    if part == "obs":
        poison("reset", "proprio")
    elif part == "obs (privileged":
        poison("reset", "privileged")
    elif part == "reward":
        poison("step_chunk", "reward")
    elif part == "action":
        collector.actor.mean = lambda features, proprio: torch.full((N, CHUNK, 3), float("nan"))
    if part in ("obs", "obs (privileged", "action", "reward"):
        with pytest.raises(NonFiniteError, match=f"^{re.escape(part)}"):
            collector.collect(buffer)
        return
    collector.collect(buffer)
    if part == "value":
        with torch.no_grad():
            learner.critic.net[-1].bias.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="^value"):
            learner.update(buffer)
        assert same(before, snapshot(learner))
        return
    if part == "loss":
        real_mean = learner.actor.mean
        learner.actor.mean = lambda features, proprio: real_mean(features, proprio) * float("nan")
    else:
        learner.policy_parameters[0].register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteError, match=f"^{part}.*policy update 0"):
        learner.update(buffer)
    assert same(before, snapshot(learner))


def test_buffer_gives_each_transition_once_an_epoch_in_even_parts(cloned):
    _, collector, buffer = setup(cloned)
    with pytest.raises(RuntimeError, match="only 0 of 8"):
        next(buffer.parts(4, torch.Generator()))
    collector.collect(buffer)
    generator = torch.Generator().manual_seed(0)
    first, second = (list(buffer.parts(-(-buffer.size // 50), generator)) for _ in range(2))
    for epoch in (first, second):
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(N * T))
        assert {len(part) for part in epoch} <= {42, 43}
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_buffer_rows_belong_together_and_overflow_is_an_error(cloned):
    learner, collector, buffer = setup(cloned)
    collector.collect(buffer)
    learner.estimate(buffer)
    index = torch.tensor([5, 0, N * T - 1, N + 2])
    batch = buffer.policy_batch(index)
    # the toy's features encode the goal, which the critic's state also holds: recompute one from the other
    goal = buffer.flat("state")[index, :2]
    pixels = torch.cat([((goal + 1) * 127.5).round(), torch.zeros(4, 1)], 1)[:, None, None].expand(4, 4, 4, 3)
    expected = learner.actor.model.backbone(pixels.mean((1, 2)) / 127.5 - 1)
    assert torch.allclose(batch.inputs.raw_BLND[:, 0, 0], expected, atol=2e-3)
    assert batch.inputs.raw_BLND.dtype == torch.float32 and buffer._inputs.raw_BLND.dtype == torch.float16
    assert torch.equal(batch.action[3], buffer.time_major("action")[1, 2])
    with pytest.raises(RuntimeError, match="overflow"):
        buffer.put_inputs(batch.inputs)


def test_a_finished_episode_keeps_its_final_state_and_the_world_gets_a_fresh_seed(cloned):
    _, collector, buffer = setup(cloned)
    collector.collect(buffer)
    state, after = buffer.time_major("state"), buffer.time_major("next_state")
    done = (buffer.time_major("terminated") | buffer.time_major("truncated"))[:-1]
    assert done.any() and not done.all()
    assert torch.equal(after[:-1][~done], state[1:][~done])
    assert (after[:-1][done] != state[1:][done]).any(1).all()
    assert (state[1:][done][:, -1] == 0).all() and (after[:-1][done][:, -1] > 0).all(), "elapsed time restarts"
    terminated = buffer.time_major("terminated")
    gap = after[terminated][:, 2:4].norm(dim=1)
    assert (gap < 0.15).all(), "a success ends within the radius: the final state, not a reset"
    assert not (buffer.time_major("terminated") & buffer.time_major("truncated")).any()
    seeds = collector.env.seeds_seen
    assert len(set(seeds)) == len(seeds) and max(seeds) < 1000


def test_values_see_through_time_limits_but_not_through_endings(cloned):
    """Reward 1 for ever at gamma 0.8 is worth 5, although every episode is cut after 3 decisions."""
    worth = {}
    for terminal in (False, True):
        learner, collector, buffer = setup(
            cloned, Endless(N, terminal=terminal), gamma=0.8, critic_warmup=10**9, critic_lr=3e-3, critic_epochs=8
        )
        for _ in range(30):
            buffer.clear()
            collector.collect(buffer)
            metrics = learner.update(buffer)
        worth[terminal] = metrics["value_mean"]
    assert worth[False] == pytest.approx(5.0, abs=0.3)
    assert worth[True] < 2.5


def test_critic_and_policy_may_look_ahead_differently(cloned):
    """The advantages are those of `lam`, the targets those of `critic_lam`."""
    learners = {
        name: setup(cloned, **lams)[0]
        for name, lams in {"short": {"lam": 0.1}, "long": {"lam": 0.9}, "both": {"lam": 0.1, "critic_lam": 0.9}}.items()
    }
    _, collector, buffer = setup(cloned)
    collector.collect(buffer)
    targets, advantages = {}, {}
    for name, learner in learners.items():
        targets[name], _ = learner.estimate(buffer)
        advantages[name] = buffer.advantages_TN
    assert torch.equal(targets["both"], targets["long"]) and not torch.allclose(targets["both"], targets["short"])
    assert torch.equal(advantages["both"], advantages["short"])


def test_the_critic_remembers_the_rollouts_it_is_told_to(cloned):
    """A rollout of two updates ago still moves the critic, one of three updates ago does not."""

    def weights(memory: int, *, spoil: int | None) -> list[torch.Tensor]:
        learner, collector, buffer = setup(cloned, critic_memory=memory, critic_warmup=99, critic_lr=0.0)
        for i in range(3):
            buffer.clear()
            collector.collect(buffer)
            if i == spoil:
                buffer.flat("reward").add_(10.0)
            if i == 2:
                learner.critic_optimiser = torch.optim.Adam(learner.critic.parameters(), lr=1e-3)
            learner.update(buffer)
        return [p.detach().clone() for p in learner.critic.parameters()]

    # with a rate of 0 and nothing learnt before the last update, only what is remembered can differ there
    assert same(weights(2, spoil=0), weights(2, spoil=None))
    assert not same(weights(3, spoil=0), weights(3, spoil=None))
    with pytest.raises(ValueError, match="critic_memory"):
        setup(cloned, critic_memory=0)


def test_evaluation_seeds_are_refused_for_training(cloned):
    with pytest.raises(ValueError, match="evaluation"):
        learner, collector, _ = setup(cloned)
        Collector(learner.actor, collector.env, generator=torch.Generator(), train_seeds=(0, 6_000_000))


def test_rate_and_noise_shrink_over_the_stated_updates(cloned):
    annealed = {"anneal_updates": 6, "lr": 1e-3, "log_std_lr": 0.0}
    learner, collector, buffer = setup(cloned, critic_warmup=2, **annealed)
    before = learner.actor.log_std.detach().exp()
    rates = []
    for _ in range(8):
        buffer.clear()
        collector.collect(buffer)
        learner.update(buffer)
        rates.append(learner.policy_optimiser.param_groups[0]["lr"])
    assert rates[:2] == [1e-3, 1e-3], "nothing shrinks while only the critic learns"
    assert rates[1:6] == sorted(rates[1:6], reverse=True) and rates[5:] == [pytest.approx(1e-4)] * 3
    assert torch.allclose(learner.actor.log_std.detach().exp(), before * 0.5 ** (4 / 6), atol=1e-5)
