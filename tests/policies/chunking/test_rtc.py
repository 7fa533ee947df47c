"""Real-time chunking: weights, joins and delays by hand; a flow head really led, and not where it is not to be."""

import numpy as np
import pytest
import torch

from policies.chunking.merge import Blend, DelayEstimate, Ensemble
from policies.control.playback import Plan
from vla.core.types import ActionSpec, Observation, Prefix, executed
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.heads.flow import FlowHead, prefix_weights
from vla.model.model import VLA
from vla.model.policy import VLAPolicy, continue_chunk
from vla.processing.processor import Stats

SPEC = ActionSpec(("dx", "dy", "gripper"), (-1.0,) * 3, (1.0,) * 3, 20.0)


def test_weights_are_the_papers():
    weight = prefix_weights(np.array([2, 0, 9]), np.array([5, 0, 4]), 8)
    c = np.array([3, 2, 1]) / 4
    np.testing.assert_allclose(weight[0], [1, 1, *(c * np.expm1(c) / np.expm1(1)), 0, 0, 0], atol=1e-6)
    assert not weight[1].any(), "nothing is left: the chunk is free"
    np.testing.assert_array_equal(weight[2], [1, 1, 1, 1, 0, 0, 0, 0])


def test_an_ensemble_averages_what_overlaps():
    plan = Plan(("displacement", "switch"), ticks_per_step=1, rest=(0, 1), join=Ensemble(decay=0.5))
    w = np.exp(-0.5 * np.arange(3))
    plan.install(np.array([[1.0, 1.0]] * 6), asked_at_step=0, seen_s=0)
    plan.advance(), plan.advance()
    assert plan.install(np.array([[4.0, -1.0]] * 6), asked_at_step=1, seen_s=0) == 1
    assert plan.wanted() == pytest.approx(((w[0] + 4 * w[1]) / (w[0] + w[1]), -1.0))
    plan.advance()
    plan.install(np.array([[9.0, 1.0]] * 6), asked_at_step=3, seen_s=0)
    played = []
    while plan.remaining:
        played.append(plan.wanted()[0])
        plan.advance()
    three = w @ [1, 4, 9] / w.sum()
    second = (w[1] * 4 + w[2] * 9) / (w[1] + w[2])  # of steps that the first chunk does not reach
    np.testing.assert_allclose(played, [three] * 3 + [second, 9, 9], rtol=1e-6)


def test_the_delay_is_the_most_that_was_really_played_and_the_warm_up_does_not_count():
    delay = DelayEstimate(memory=3)
    assert delay.steps == 1
    delay.add(40)
    assert delay.steps == 1, "a cold start says nothing about the next answer"
    for seen in (2, 5, 3):
        delay.add(seen)
    assert delay.steps == 5
    for seen in (0, 0, 0):
        delay.add(seen)
    assert delay.steps == 1
    with pytest.raises(ValueError, match="blend_steps"):
        Blend(-1)


def test_a_flow_is_led_to_the_prefix_and_free_beyond_it():
    torch.manual_seed(0)
    head = FlowHead(width=16, action_dim=2, sampling_steps=5)
    x = torch.randn(3, 8, 16)
    free = head(x)
    target = torch.full((3, 8, 2), 0.7)
    nothing = head(x, prefix=(target, torch.zeros(3, 8)))
    torch.testing.assert_close(nothing, free)
    weight = torch.zeros(3, 8)
    weight[:, :4] = 1.0
    led = head(x, prefix=(target, weight))
    before, after = (free - target)[:, :4].abs().mean(), (led - target)[:, :4].abs().mean()
    assert after < 0.1 * before, (after, before)
    assert not led.requires_grad
    # Steps that are not weighted move only through the attention between steps, far less than those that are.
    assert (led[:, 4:] - free[:, 4:]).abs().mean() < 0.2 * (led[:, :4] - free[:, :4]).abs().mean()


@pytest.fixture(scope="module", params=["flow", "l1"])
def policy(request):
    rng = np.random.default_rng(0)
    switch = np.where(rng.random((50, 1)) < 0.5, -1.0, 1.0)
    stats = Stats.from_arrays(
        rng.normal(size=(50, 4)), np.concatenate([rng.uniform(-0.8, 0.8, (50, 2)), switch], axis=1)
    )
    config = VLAConfig(backbone="tiny", bridge=BridgeConfig(width=32), head=request.param, n_action_steps=4)
    return VLAPolicy(VLA.build(config, stats=stats, action_spec=SPEC, cameras=("front", "wrist")).eval())


def observation(count, seed=0):
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (count, 84, 84, 3), dtype=np.uint8) for camera in ("front", "wrist")}
    return Observation(images, rng.normal(size=(count, 4)).astype(np.float32), ["pick up the red cube"] * count)


def test_a_policy_goes_on_from_what_is_left(policy):
    obs = observation(2)
    free = policy.act(obs)
    assert free.shape == (2, 8, 3), "whole chunks, however few are meant to be played"
    np.testing.assert_array_equal(executed(policy.spec, free), free[:, :4])
    left = np.full((2, 6, 3), 0.5, np.float32)
    # The second world has nothing left: what stands in its row must not count.
    chunk = go_on(policy, obs, Prefix(left, np.array([6, 0]), np.array([3, 0])))
    np.testing.assert_allclose(chunk[1], free[1], atol=1e-5)
    assert np.abs(chunk[0, :3] - 0.5).max() < 0.15 * np.abs(free[0, :3] - 0.5).max() + 1e-6
    assert np.abs(chunk[0, 3] - 0.5).max() < np.abs(free[0, 3] - 0.5).max()
    longer = Prefix(np.full((2, 20, 3), 0.5, np.float32), np.array([20, 20]), np.array([1, 1]))
    assert go_on(policy, obs, longer).shape == (2, 8, 3)
    assert policy.spec.takes_prefix == (policy.vla.config.head == "flow")
    np.testing.assert_array_equal(policy.act(obs, prefix=longer), go_on(policy, obs, longer))


def go_on(policy, obs, prefix):
    return continue_chunk(policy.vla, policy.vla.processor.prepare(obs), prefix, obs.proprio)


def test_a_damaged_policy_says_so(policy):
    with torch.no_grad():
        parameter = policy.vla.head.out.bias
        kept = parameter.clone()
        parameter.fill_(float("nan"))
    prefix = Prefix(np.zeros((1, 4, 3), np.float32), np.array([4]), np.array([1]))
    with pytest.raises(FloatingPointError):
        go_on(policy, observation(1), prefix)
    with torch.no_grad():
        parameter.copy_(kept)
