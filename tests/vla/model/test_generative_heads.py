"""Flow matching and discretised heads: one interface with L1, two-mode targets, masks, sampling, the whole model."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import load_toy, toy_observation, toy_vla
from vla.model.config import BridgeConfig
from vla.model.heads.flow import FlowHead
from vla.model.heads.registry import HEADS
from vla.model.heads.tokens import BinHead, FrequencyHead, cosine_basis
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

NEW = ("linear", "flow", "bins", "frequencies")
SMALL = BridgeConfig(width=16, heads=2, kv_heads=1, gate_init=0.3)


def make(name, seed=0, batch=4, width=32):
    torch.manual_seed(seed)
    return HEADS[name](width=width, action_dim=3), torch.randn(batch, 5, width)


def train(head, x, target, steps, lr=3e-3, mask=None):
    mask = torch.ones(target.shape[:2]) if mask is None else mask
    optimiser = torch.optim.Adam(head.parameters(), lr=lr)
    for _ in range(steps):
        loss = head.loss(x, target, mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


@pytest.mark.parametrize("name", NEW)
def test_acts_in_float32_deterministically_from_near_zero(name):
    head, x = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        action = head(x.bfloat16())
    assert action.shape == (4, 5, 3) and action.dtype == torch.float32 and action.abs().max() < 0.5
    assert torch.equal(action, head(x.bfloat16().float()))
    torch.testing.assert_close(head(x[1:2]), head(x)[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NEW)
def test_masked_steps_and_components_do_not_matter(name):
    head, x = make(name)
    target, mask = torch.rand(4, 5, 3) * 2 - 1, torch.ones(4, 5)
    mask[0, 2:], mask[3] = 0, 0
    components = mask[..., None].expand(-1, -1, 3).clone()
    components[:, :, 1] = 0

    def loss(change, mask):
        torch.manual_seed(1)
        return head.loss(x, target + change, mask)

    for keep in (mask, components):
        wild = torch.where(keep.bool() if keep.ndim == 3 else keep.bool()[..., None], 0.0, 1e6)
        assert torch.equal(loss(torch.zeros_like(target), keep), loss(wild + torch.zeros_like(target), keep))
        assert not torch.equal(loss(torch.zeros_like(target), keep), loss(torch.full_like(target, 0.1), keep))
    assert head.loss(x, target, torch.zeros(4, 5)).item() == 0.0


@pytest.mark.parametrize("name", NEW)
def test_actions_have_gradients_of_every_weight(name):
    """RL reinforces the greedy action, whatever the head; and no weight is dead in the head's own loss."""
    head, x = make(name)
    head(x).square().sum().backward()
    moved = {n for n, p in head.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert moved == {n for n, _ in head.named_parameters()}
    head.zero_grad()
    head.loss(x, torch.rand(4, 5, 3), torch.ones(4, 5)).backward()
    assert all((p.grad != 0).any() for p in head.parameters())


@pytest.mark.parametrize(("name", "near"), [("linear", 0.15), ("flow", 0.1), ("bins", 0.05), ("frequencies", 0.05)])
def test_learns_to_regress(name, near):
    head, x = make(name, batch=16)
    target = torch.tanh(x[..., :3])
    train(head, x, target, 300)
    assert (head(x) - target).abs().mean() < near


@pytest.mark.parametrize("name", ["flow", "bins"])
def test_one_of_two_modes_not_their_mean(name):
    """Half the demonstrations go left, half right, told apart by nothing: the mean, 0, is what nobody did."""
    torch.manual_seed(0)
    head, x = HEADS[name](width=32, action_dim=1), torch.zeros(256, 2, 32)
    target = torch.where(torch.rand(256, 1, 1) < 0.6, 0.8, -0.8).expand(-1, 2, -1)
    train(head, x, target, 250)
    if name == "bins":
        assert (head(x[:1]) - 0.8).abs().max() < 0.1
    else:
        sample = head(x, generator=torch.Generator().manual_seed(3))
        near = ((sample.abs() - 0.8).abs() < 0.3).float().mean()
        assert near > 0.85 and 0.4 < (sample > 0).float().mean() < 0.8
        # a step's noise must not decide for that step alone: both steps of a chunk go the same way
        assert (sample[:, 0].sign() == sample[:, 1].sign()).float().mean() > 0.9


def test_flow_samples_follow_the_generator_and_greedy_needs_none():
    head, x = make("flow")
    draw = lambda seed: head(x, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    head(x), draw(1)
    assert torch.equal(torch.rand(1), expected)  # neither touches torch's own random state


def test_flow_integrates_its_velocity():
    """With a velocity that is known, Euler's steps must give the known end: x' = a - x from 0 gives a (1 - (1-h)^n)."""

    class Known(FlowHead):
        def velocity(self, x_BCD, noisy_BCA, time_B):
            self.times.append(time_B[0].item())
            return x_BCD[..., :3] - noisy_BCA

    torch.manual_seed(0)
    head, x = Known(width=16, action_dim=3, sampling_steps=4), torch.randn(2, 5, 16)
    head.times = []
    expected = head.norm(x)[..., :3] * (1 - 0.75**4)
    torch.testing.assert_close(head(x), expected)
    assert head.times == [0.0, 0.25, 0.5, 0.75]


def test_flow_loss_is_zero_for_the_true_velocity():
    class True_(FlowHead):
        def velocity(self, x_BCD, noisy_BCA, time_B):  # every target is 0.5, so noise = (noisy - 0.5 t) / (1 - t)
            at = time_B[:, None, None]
            return 0.5 - (noisy_BCA - 0.5 * at) / (1 - at)

    head = True_(width=16, action_dim=3)
    assert head.loss(torch.randn(8, 5, 16), torch.full((8, 5, 3), 0.5), torch.ones(8, 5)) < 1e-6


def test_bins_interpolate_and_clip():
    head = BinHead(width=16, action_dim=1, bins=16, limit=1.0, spread=0.0)
    torch.nn.init.zeros_(head.out.weight)
    x = torch.zeros(1, 1, 16)
    for target in (-1.0, 0.123, 0.9, 7.0):
        clipped = min(target, 1.0)
        place = (clipped + 1) / 2 * 15
        low = min(math.floor(place), 14)
        by_hand = torch.zeros(16)
        by_hand[low], by_hand[low + 1] = 1 - (place - low), place - low
        log_p = head.out.bias.detach().log_softmax(0)
        expected = -(by_hand * log_p).sum()
        torch.testing.assert_close(head.loss(x, torch.tensor([[[target]]]), torch.ones(1, 1)).detach(), expected)
        with torch.no_grad():
            saved = head.out.bias.clone()
            head.out.bias.copy_((by_hand + 1e-9).log())
            assert head(x).item() == pytest.approx(clipped, abs=1e-4)
            head.out.bias.copy_(saved)


@pytest.mark.parametrize("kind", [BinHead, FrequencyHead])
def test_bins_near_the_target_are_nearly_right(kind):
    """The loss against a slow reference, and the action that the wanted distribution stands for."""
    torch.manual_seed(0)
    head, x, target = kind(width=8, action_dim=2, bins=32, spread=0.2), torch.randn(3, 4, 8), torch.randn(3, 4, 2) / 3
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    numbers, counts = head._target(target, mask)
    centres = [k * 2 / 31 - 1 for k in range(32)]
    wide = 0.2 / head.reach(4)
    total, wanted = [], torch.zeros(3, 4, 2, 32)
    for place in itertools.product(range(3), range(4), range(2)):
        weights = [math.exp(-0.5 * ((c - float(numbers[place])) / wide) ** 2) for c in centres]
        log_p = head.logits(x)[place].log_softmax(0).tolist()
        if counts[place]:
            total.append(-sum(w * p for w, p in zip(weights, log_p, strict=True)) / sum(weights))
        wanted[place] = torch.tensor(weights).log()
    assert head.loss(x, target, mask).item() == pytest.approx(sum(total) / len(total), rel=1e-4)
    torch.testing.assert_close(head.decode(wanted), head.from_code(numbers), atol=0.03, rtol=0)


def test_bins_from_before_there_was_a_spread_act_as_they_did():
    old = BinHead(width=8, action_dim=2, spread=0.0)
    saved = {name: tensor for name, tensor in old.state_dict().items() if name != "spread"}
    torch.nn.init.normal_(saved["out.weight"])
    old.load_state_dict(saved)
    now, x = BinHead(width=8, action_dim=2), torch.randn(5, 4, 8)
    assert not torch.equal(now(x), old(x))
    now.load_state_dict(saved)
    assert torch.equal(now(x), old(x)) and now.spread == 0


def test_frequencies_are_an_orthonormal_cosine_transform():
    basis = cosine_basis(8)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8), atol=1e-6, rtol=0)
    by_hand = [
        [math.cos(math.pi / 8 * (c + 0.5) * k) * math.sqrt((1 if k == 0 else 2) / 8) for c in range(8)]
        for k in range(8)
    ]
    torch.testing.assert_close(basis, torch.tensor(by_hand), atol=1e-6, rtol=0)
    head = FrequencyHead(width=16, action_dim=3)
    action = torch.rand(2, 8, 3) * 2 - 1
    torch.testing.assert_close(head.from_code(head.to_code(action)), action, atol=1e-5, rtol=0)
    assert head.to_code(action).abs().max() <= 1


def test_frequencies_hold_the_last_action_of_a_cut_chunk():
    head = FrequencyHead(width=16, action_dim=2)
    action = torch.tensor([[[1.0, 0.2], [0.5, 0.3], [9.0, 9.0]]])
    code, keep = head._target(action, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(head.from_code(code), torch.tensor([[[1.0, 0.2], [0.5, 0.3], [0.5, 0.3]]]))
    assert keep.all()
    assert not head._target(action, torch.zeros(1, 3))[1].any()


@pytest.mark.parametrize("name", NEW)
def test_the_whole_model_takes_any_head(name, tmp_path):
    vla = toy_vla(bridge=SMALL, head=name, chunk_size=5)
    obs = toy_observation()
    expected = VLAPolicy(vla).act(obs)
    np.testing.assert_array_equal(VLAPolicy(vla).act(obs), expected)
    vla.save(tmp_path)
    back = VLA.load(tmp_path, load_backbone=load_toy)
    assert back.config == vla.config and type(back.head) is HEADS[name]
    np.testing.assert_array_equal(VLAPolicy(back).act(obs), expected)


@pytest.mark.parametrize("name", NEW)
def test_rl_takes_any_head(name):
    from rl.models.actor import GreedyPolicy
    from rl.models.vla_network import make_actor

    vla = toy_vla(bridge=SMALL, head=name).eval()
    actor = make_actor(vla, vla.action_spec.names)
    obs = toy_observation()
    greedy = GreedyPolicy(actor, vla.action_spec, vla.chunk_size).act(obs)
    np.testing.assert_allclose(greedy, VLAPolicy(vla).act(obs), atol=1e-6)
    features, state = actor.encode(obs)
    with torch.no_grad():
        action = actor.distribution(features, state).sample(torch.Generator().manual_seed(0))
    actor.distribution(features, state).log_prob(action, torch.ones(3, 8, dtype=torch.bool)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vla.head.parameters())
