"""GAE against its definition, its limits, and what an episode's end may and may not cut."""

import numpy as np
import pytest
import torch

from rl.algorithms.advantages import explained_variance, gae, normalise


def by_definition(r, v, nv, term, trunc, disc, lam):
    """Sum over k of (product of discounts times lam) * delta_k up to the first end: O(T^2), world by world."""
    advantages = np.zeros_like(r)
    T, N = r.shape
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                bootstrap = 0.0 if term[k, n] else nv[k, n]
                advantages[t, n] += weight * (r[k, n] + disc[k, n] * bootstrap - v[k, n])
                if term[k, n] or trunc[k, n]:
                    break
                weight *= disc[k, n] * lam
    return advantages


def random_rollout(seed, T=11, N=7, ends=0.2):
    rng = np.random.default_rng(seed)
    r, v, nv = rng.normal(size=(3, T, N))
    term, trunc = rng.random((2, T, N)) < ends
    disc = 0.97 ** rng.integers(1, 9, (T, N))
    return r, v, nv, term, trunc, disc


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_gae_is_its_definition(seed, lam):
    rollout = random_rollout(seed)
    ours = gae(*map(torch.from_numpy, rollout), lam).numpy()
    assert np.allclose(ours, by_definition(*rollout, lam), atol=1e-9)


def test_lambda_0_is_the_td_error_and_1_the_discounted_return():
    r, v, nv, term, trunc, disc = map(torch.from_numpy, random_rollout(5, ends=0.0))
    nv[:-1] = v[1:]  # one unbroken episode
    assert torch.allclose(gae(r, v, nv, term, trunc, disc, 0.0), r + disc * nv - v)
    total = nv[-1]
    for t in range(len(r) - 1, -1, -1):
        total = r[t] + disc[t] * total
    assert torch.allclose(gae(r, v, nv, term, trunc, disc, 1.0)[0], total - v[0])


def test_an_end_cuts_the_recursion_and_only_termination_cuts_the_bootstrap():
    one = torch.ones(2, 3)
    yes, no = torch.tensor([[True], [False]]).expand(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    rewards = torch.tensor([[0.0] * 3, [100.0] * 3])  # of the next episode: must not leak into the first
    values, next_values, discounts = 2 * one, 10 * one, 0.5 * one
    terminated = gae(rewards, values, next_values, yes, no, discounts, 0.9)[0]
    truncated = gae(rewards, values, next_values, no, yes, discounts, 0.9)[0]
    both = gae(rewards, values, next_values, yes, yes, discounts, 0.9)[0]
    assert torch.equal(terminated, torch.full((3,), -2.0))
    assert torch.equal(truncated, torch.full((3,), 0.5 * 10 - 2))
    assert torch.equal(both, terminated)


def test_wrong_shapes_are_named():
    x, b = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="next_values"):
        gae(x, x, x[0], b, b, x, 0.95)


def test_normalise_has_no_division_by_zero():
    x = normalise(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert x.mean().abs() < 1e-6 and abs(float(x.square().mean()) - 1) < 1e-4
    assert torch.equal(normalise(torch.full((3, 2), 4.0)), torch.zeros(3, 2))


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((4,), 1.5), returns) == 0.0
    assert explained_variance(returns, torch.ones(4)) == 0.0
