"""The L1 head: what it starts as, what its mask ignores, and that it learns."""

import torch

from vla.model.heads.registry import HEADS, L1Head, masked_l1


def make(seed=0):
    torch.manual_seed(seed)
    return L1Head(width=16, action_dim=3), torch.randn(4, 5, 16)


def test_starts_near_zero_in_float32_under_autocast():
    head, x = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        action = head(x.bfloat16())
    assert action.shape == (4, 5, 3) and action.dtype == torch.float32
    assert 0 < action.abs().max() < 0.3
    assert torch.equal(action, head(x.bfloat16().float()))


def test_loss_is_the_mean_over_unmasked_steps():
    head, x = make()
    target, mask = torch.randn(4, 5, 3), torch.rand(4, 5) > 0.4
    by_hand = [abs(head(x)[b, c, a] - target[b, c, a]) for b, c in mask.nonzero().tolist() for a in range(3)]
    torch.testing.assert_close(head.loss(x, target, mask), torch.stack(by_hand).mean())
    wild = torch.where(mask[..., None], target, torch.full_like(target, 1e6))
    assert torch.equal(head.loss(x, target, mask), head.loss(x, wild, mask))
    assert head.loss(x, target, torch.zeros(4, 5)).item() == 0.0


def test_weights_equal_by_step_not_by_world():
    error = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]])
    assert masked_l1(error, torch.tensor([[1, 1], [1, 0]])).item() == 3.0


def test_learns_the_median_and_every_weight_moves():
    head, x = make()
    target = torch.tanh(x[..., :3] * 2)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in head.parameters()]
    first = None
    for _ in range(150):
        loss = head.loss(x, target, torch.ones(4, 5))
        first = first or loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.15 * first
    assert all((a != b).any() for a, b in zip(before, head.parameters(), strict=True))
    assert HEADS["l1"] is L1Head
