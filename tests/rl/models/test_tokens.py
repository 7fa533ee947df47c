"""Tokens of the heads `bins` and `frequencies` as what PPO acts with: densities, masks, temperatures, whole runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.algorithms.ppo import PPO
from rl.configs.learning import ActorConfig, CriticConfig, FilteredConfig, GRPOConfig, PPOConfig
from rl.models.actor import GreedyPolicy, SampledPolicy
from rl.models.critic import Critic, seen_state
from rl.models.tokens import TokenChunk
from rl.models.vla_network import make_actor
from rl.recipes import tabletop_pick_guided
from rl.rollout.step_collector import Collector
from rl.runner import Runner
from rl.storage.rollout_buffer import RolloutBuffer
from tests.rl.models.test_vla import _one_view, make_vla
from tests.rl.toy import SPEC, PointReach, config, evaluate
from tests.vla.toy_backbone import load_toy
from vla.model.config import model_problem
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

B, C, A, K = 5, 4, 3, 7
TOKENS = ActorConfig(noise="tokens", temperature=1.5, refiner_width=16)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefix() -> torch.Tensor:
    """Five decisions of 0, 1, ... 4 executed steps."""
    return torch.arange(C) < torch.arange(B)[:, None]


def chunk(spans_chunk: bool = False, temperature: float = 1.5) -> tuple[TokenChunk, torch.Tensor]:
    policy = TokenChunk(3 * draws(B, C, A, K), temperature, spans_chunk)
    return policy, policy.sample(torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spans_chunk", [False, True])
def test_log_prob_is_a_loop_over_tokens(spans_chunk):
    policy, sample = chunk(spans_chunk)
    ours = policy.log_prob(sample, prefix())
    for b in range(B):
        by_hand = 0.0
        for c in range(C):
            if prefix()[b, c] or (spans_chunk and prefix()[b].any()):
                for a in range(A):
                    weights = [math.exp(float(x) / 1.5) for x in policy.logits_BCAK[b, c, a]]
                    by_hand += math.log(weights[sample[b, c, a]] / sum(weights))
        assert float(ours[b]) == pytest.approx(by_hand, abs=1e-4)
    assert torch.equal(ours, policy.token_log_prob(sample, prefix()).sum((1, 2)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_what_is_drawn_is_what_is_scored_at_every_temperature(temperature):
    logits = 2 * draws(1, 1, 1, K)
    policy = TokenChunk(logits.expand(60_000, 1, 1, K), temperature)
    sample = policy.sample(torch.Generator().manual_seed(2)).flatten()
    every = TokenChunk(logits.expand(K, 1, 1, K), temperature)
    scored = every.log_prob(torch.arange(K)[:, None, None], torch.ones(K, 1, dtype=torch.bool)).exp()
    assert float(scored.sum()) == pytest.approx(1.0, abs=1e-5)
    drawn = torch.bincount(sample, minlength=K) / len(sample)
    assert (drawn - scored).abs().max() < 0.01
    hotter = TokenChunk(logits.expand(60_000, 1, 1, K), 2 * temperature).sample(torch.Generator().manual_seed(2))
    wider = policy.sample(torch.Generator().manual_seed(2), std_scale=2.0)
    assert torch.equal(hotter, wider) and not torch.equal(wider.flatten(), sample)


def test_bins_without_probability_are_never_drawn():
    logits = torch.full((100_000, 1, 1, 4), -1e4)
    logits[..., 2] = 0.0
    assert (TokenChunk(logits).sample(torch.Generator().manual_seed(0)) == 2).all()


@pytest.mark.parametrize("bad", [float("nan"), 50.0])
def test_masked_tokens_change_neither_log_prob_nor_gradient(bad):
    logits, sample = 3 * draws(B, C, A, K), draws(B, C, A, K, seed=3).argmax(-1)

    def scored(logits: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        log_prob = TokenChunk(leaf, 1.5).log_prob(sample, prefix())
        log_prob.sum().backward()
        return log_prob.detach(), leaf.grad

    masked = ~prefix()[..., None].expand(B, C, A)
    other = torch.where(masked, (sample + 1) % K, sample)
    wrong = torch.where(masked[..., None] & (torch.arange(K) == 0), bad, logits)
    clean, dirty = scored(logits, sample), scored(wrong, other)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert (clean[1][masked] == 0).all() and (clean[1][~masked] != 0).any() and clean[0][0] == 0


def test_logits_that_are_not_finite_are_told_before_anything_moves():
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        TokenChunk(torch.full((1, 1, 1, 4), float("nan"))).sample(torch.Generator())


@pytest.mark.parametrize("head", ["bins", "frequencies"])
def test_greedy_is_the_heads_own_forward_and_tokens_are_centres(head):
    vla, obs = make_vla(head=head).eval(), PointReach(8).reset(seeds=range(8))
    imitation = VLAPolicy(vla).act(obs)
    actor = make_actor(vla, SPEC.names, TOKENS)
    assert np.array_equal(GreedyPolicy(actor, SPEC, 4).act(obs), imitation)
    inputs, proprio = actor.encode(obs)
    tokens = actor.distribution(inputs, proprio).sample(torch.Generator().manual_seed(0))
    centres = torch.linspace(-1, 1, vla.head.bins)
    assert torch.allclose(actor.chunk_of(tokens), vla.head.from_code(centres[tokens]))
    # the bin that a token's own centre falls into is that token: no half-bin bias
    back = (vla.head.to_code(actor.chunk_of(tokens)) + 1) / 2 * (vla.head.bins - 1)
    assert (back - tokens).abs().max() < 0.05
    cold = SampledPolicy(actor, SPEC, 4, generator=torch.Generator().manual_seed(0), std_scale=1e-6)
    likeliest = actor.to_env(actor.chunk_of(actor.distribution(inputs, proprio).logits_BCAK.argmax(-1)), SPEC, obs)
    assert np.array_equal(cold.act(obs), likeliest)


def setup(head: str, actor: ActorConfig = TOKENS, **ppo):
    env, vla = PointReach(8), make_vla(head=head)
    policy = make_actor(vla, SPEC.names, actor)
    settings = PPOConfig(**({"critic_warmup": 0, "kl_stop": 1e9, "minibatch_size": 16} | ppo))
    learner = PPO(policy, Critic(4, 2), settings, generator=torch.Generator().manual_seed(0))
    kind = type(learner._objective)
    worlds = Collector(
        policy, env, generator=torch.Generator().manual_seed(1), train_seeds=(0, 1000), n_action_steps=4,
        score=kind.score,
    )  # fmt: skip
    return learner, worlds, RolloutBuffer(3, 8)


@pytest.mark.parametrize("ratio", ["chunk", "token"])
@pytest.mark.parametrize("head", ["bins", "frequencies"])
@pytest.mark.parametrize("actor", [TOKENS, replace(TOKENS, refiner_width=0)], ids=["residual", "bridge"])
def test_ratio_is_1_right_after_a_rollout_and_a_step_raises_what_was_good(head, ratio, actor):
    learner, worlds, buffer = setup(head, actor, ratio=ratio, lr=1e-3, epochs=1, minibatch_size=24)
    worlds.collect(buffer)
    learner.estimate(buffer)
    assert buffer.flat("action").dtype == torch.int64
    for index in buffer.parts(5, learner.generator):
        _, log_ratio, _ = learner.policy_loss(buffer.policy_batch(index))
        assert log_ratio.abs().max() < 1e-5 and log_ratio.dim() == (3 if ratio == "token" else 1)
    batch = buffer.policy_batch(torch.arange(24))
    assert not batch.executed_BC.all(), "only part of a chunk is executed"
    learner.improve(buffer)
    _, log_ratio, metrics = learner.policy_loss(batch)
    gain = log_ratio.flatten(1).sum(1) if ratio == "token" else log_ratio
    assert float((gain * batch.advantage_B).mean().detach()) > 0 and metrics["kl"] > 0


def test_the_loss_of_token_ratios_is_a_loop_over_tokens():
    learner, worlds, buffer = setup("bins", ratio="token", clip=0.1, clip_high=0.2, lr=5e-3, epochs=4)
    worlds.collect(buffer)
    learner.estimate(buffer)
    learner.improve(buffer)  # ratios of all sizes
    batch = buffer.policy_batch(torch.arange(24))
    loss, _, metrics = learner.policy_loss(batch)
    policy = learner.actor.distribution(batch.inputs, batch.proprio_BP)
    new = policy.token_log_prob(batch.action, batch.executed_BC)
    means, outside, divergence = [], [], 0.0
    for m in range(24):
        gains = []
        for c in range(8):
            for a in range(3):
                if batch.executed_BC[m, c]:
                    ratio = math.exp(float(new[m, c, a].detach() - batch.log_prob[m, c, a]))
                    advantage = float(batch.advantage_B[m])
                    gains.append(min(ratio * advantage, min(max(ratio, 0.9), 1.2) * advantage))
                    outside.append(ratio > 1.2 or ratio < 0.9)
                    divergence += (ratio - 1 - math.log(ratio)) / 24
        means.append(sum(gains) / max(1, len(gains)))
    assert float(loss.detach()) == pytest.approx(-sum(means) / 24, abs=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(sum(outside) / len(outside), abs=1e-6) and any(outside)
    assert metrics["kl"] == pytest.approx(divergence, rel=1e-3)


@pytest.mark.parametrize("ratio", ["chunk", "token"])
def test_what_was_not_executed_changes_no_gradient(ratio):
    learner, worlds, buffer = setup("bins", ratio=ratio)
    worlds.collect(buffer)
    learner.estimate(buffer)
    batch = buffer.policy_batch(torch.arange(24))

    def gradients(batch) -> list[torch.Tensor]:
        learner.policy_optimiser.zero_grad()
        learner.policy_loss(batch)[0].backward()
        return [p.grad.clone() for p in learner.actor.model.refiner.parameters()]

    executed = batch.executed_BC[..., None]
    other = replace(batch, action=torch.where(executed, batch.action, (batch.action + 40) % 128))
    expected = gradients(batch)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(other), strict=True))
    assert any(g.abs().max() > 0 for g in expected)


@pytest.mark.parametrize(("head", "ratio"), [("bins", "token"), ("frequencies", "chunk")])
def test_a_run_resumes_exactly_and_what_it_saves_acts_the_same(head, ratio, tmp_path):
    rows: dict[str, list[dict[str, float]]] = {}

    def run(name: str, updates: int, resume: bool = False) -> Runner:
        settings = config(
            num_envs=8, max_updates=updates, calibrate_scales=(1.0, 0.5), calibrate_episodes=8, n_action_steps=4,
            ppo={"ratio": ratio, "lr": 1e-3, "critic_warmup": 1, "anneal_updates": 6, "epochs": 2},
        )  # fmt: skip
        settings = replace(settings, actor=TOKENS)
        note = rows.setdefault(name, []).append
        runner = Runner(
            make_vla(head=head), PointReach(8), settings, tmp_path / name, evaluate=evaluate_few, on_update=note
        )
        runner.run(resume=resume)
        return runner

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume=True)
    ours, theirs = whole.learner.tensors(), parts.learner.tensors()
    assert "policy.log_temperature" in ours and ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    # only the anneal (and calibration before it) changes the temperature: no gradient does
    last = rows["whole"][-1]["temperature"]
    assert last == pytest.approx(1.5 * whole.std_scale * 0.5 ** (3 / 6), rel=1e-5) == rows["parts"][-1]["temperature"]
    saved = VLA.load(tmp_path / "whole/best", load_backbone=lambda spec: _one_view(load_toy(spec)))
    assert saved.config.refines == "logits" and model_problem(saved.config) is None
    obs = PointReach(8).reset(seeds=range(8))
    assert np.array_equal(VLAPolicy(saved).act(obs), whole.greedy_policy().act(obs))
    if whole.selection.best_update:
        assert not np.array_equal(VLAPolicy(saved).act(obs), VLAPolicy(make_vla(head=head).eval()).act(obs))


@pytest.mark.parametrize("trains", ["residual", "bridge"])
def test_a_critic_of_latents_sees_what_comes_next_and_moves_no_weight_of_the_policy(trains, tmp_path):
    """VL-DAC's value: of the policy's own latents, behind a stop-gradient."""
    settings = config(num_envs=8, max_updates=2, critic=CriticConfig(reads="latents"), ppo={"time_limit": "terminal"})
    settings = replace(settings, actor=TOKENS if trains == "residual" else replace(TOKENS, refiner_width=0))
    runner = Runner(make_vla(head="bins"), PointReach(8), settings, tmp_path)
    runner.collector.collect(runner.buffer)
    state, after = runner.buffer.time_major("state"), runner.buffer.time_major("next_state")
    ended = runner.buffer.time_major("terminated") | runner.buffer.time_major("truncated")
    for t in range(3):
        assert torch.equal(after[t][~ended[t]], state[t + 1][~ended[t]]) and torch.isfinite(after[t]).all()
    inputs, proprio = runner.actor.encode(runner.env.observation())
    now = seen_state(inputs, proprio, runner.collector._elapsed_fraction())
    assert torch.allclose(after[3][~ended[3]], now[~ended[3]], atol=1e-2) and ended.any() and not ended.all()
    learner = runner.learner
    leaf = replace(inputs, **{next(iter(inputs.tensors())): next(iter(inputs.tensors().values())).requires_grad_()})
    learner.critic(seen_state(leaf, proprio.requires_grad_(), runner.collector._elapsed_fraction())).sum().backward()
    assert all(p.grad is None for p in runner.model.parameters()) and proprio.grad is None
    assert any(p.grad is not None for p in learner.critic.parameters())
    before = {name: p.clone() for name, p in runner.model.state_dict().items()}
    first = [p.clone() for p in learner.critic.parameters()]
    learner.update(runner.buffer)  # critic_warmup: values alone
    assert all(torch.equal(p, before[name]) for name, p in runner.model.state_dict().items())
    assert not all(torch.equal(a, b) for a, b in zip(first, learner.critic.parameters(), strict=True))
    runner.run()


def evaluate_few(policy: GreedyPolicy) -> tuple[int, int]:
    return evaluate(policy, 8)[0], 8


@pytest.mark.parametrize(
    "method", [GRPOConfig(ratio="token", episodes_per_update=8, group_size=4, max_rounds=1), FilteredConfig()]
)
def test_other_algorithms_take_tokens_too(method, tmp_path):
    method = replace(method, episodes_per_update=8, max_rounds=1)
    settings = replace(config(num_envs=8, max_updates=2, method=method), actor=TOKENS)
    Runner(make_vla(head="bins"), PointReach(8), settings, tmp_path).run()


def test_combinations_that_make_no_sense_are_refused(tmp_path):
    def start(vla: VLA, **changes) -> Runner:
        return Runner(vla, PointReach(16), replace(config(), **changes), tmp_path)

    with pytest.raises(ValueError, match="vla train --head bins"):
        start(make_vla(), actor=TOKENS)
    with pytest.raises(ValueError, match="only tokens have a ratio each"):
        start(make_vla(head="bins"), ppo=PPOConfig(ratio="token"))
    with pytest.raises(ValueError, match="a teacher corrects actions"):
        start(make_vla(head="bins"), actor=TOKENS, guide=tabletop_pick_guided().guide)
    with pytest.raises(ValueError, match="filtered imitation has no ratio"):
        start(make_vla(head="bins"), actor=TOKENS, method=FilteredConfig(ratio="token"))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        start(make_vla(head="bins"), actor=replace(TOKENS, temperature=0.0))
    latent = {"actor": TOKENS, "critic": CriticConfig(reads="latents")}
    with pytest.raises(ValueError, match="cannot bootstrap at the time limit"):
        start(make_vla(head="bins"), **latent)
    with pytest.raises(ValueError, match="beside a teacher the critic reads"):
        start(make_vla(head="bins"), **latent, guide=tabletop_pick_guided().guide)
    for first, second in ((TOKENS, ActorConfig(refiner_width=16)), (ActorConfig(refiner_width=16), TOKENS)):
        vla = make_vla(head="bins")
        make_actor(vla, SPEC.names, first)
        with pytest.raises(ValueError, match="already: go on with a recipe of"):
            make_actor(vla, SPEC.names, second)
    assert "needs a head that has some" in model_problem(replace(make_vla().config, refines="logits"))
