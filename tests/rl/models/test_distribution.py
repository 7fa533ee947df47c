"""Densities of chunks: correlated noise against a dense normal, the flow's chain against its definition."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from rl.models.distribution import ChunkGaussian, FlowChain
from vla.model.heads.flow import FlowHead

B, C, A = 6, 5, 3


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefix() -> torch.Tensor:
    return torch.arange(C) < torch.tensor([[0], [1], [2], [4], [5], [5]])


def dense(mean_CA: torch.Tensor, log_std: torch.Tensor, rho: float, steps: int) -> MultivariateNormal:
    """The covariance of the first `steps` actions of one chunk, flattened: rho^|i - j| between steps."""
    time = torch.arange(steps)
    over_time = rho ** (time[:, None] - time[None, :]).abs().double()
    covariance = torch.kron(over_time, torch.diag((2 * log_std).exp().double()))
    return MultivariateNormal(mean_CA[:steps].flatten().double(), covariance)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_logprob_analytic_correlated_noise_is_the_dense_normal(rho):
    mean, action, log_std = draws(B, C, A), draws(B, C, A, seed=1), draws(A, seed=2) * 0.3
    ours = ChunkGaussian(mean, log_std, rho).log_prob(action, prefix())
    for world, steps in enumerate(prefix().sum(1).tolist()):
        flat = action[world, :steps].flatten().double()
        expected = dense(mean[world], log_std, rho, steps).log_prob(flat) if steps else 0
        assert float(ours[world]) == pytest.approx(float(expected), abs=1e-4)


def test_correlated_samples_have_the_marginals_and_the_correlation():
    log_std = torch.tensor([0.1, 0.3]).log()
    sample = ChunkGaussian(torch.zeros(40_000, C, 2), log_std, 0.7).sample(torch.Generator().manual_seed(0))
    assert torch.allclose(sample.std(0), log_std.exp().expand(C, 2), rtol=0.03)
    z = sample / log_std.exp()
    assert float((z[:, 1:] * z[:, :-1]).mean()) == pytest.approx(0.7, abs=0.01)
    assert float((z[:, 2:] * z[:, :-2]).mean()) == pytest.approx(0.49, abs=0.01)


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_mask_what_was_not_executed_changes_neither_density_nor_gradient(rho):
    action, results = draws(B, C, A), []
    for garbage in (0.0, 9.0, float("nan")):
        mean = draws(B, C, A, seed=1).requires_grad_()
        density = ChunkGaussian(mean, torch.zeros(A), rho).log_prob(
            torch.where(prefix()[..., None], action, action + garbage), prefix()
        )
        density.sum().backward()
        results.append((density.detach(), mean.grad))
    for density, gradient in results[1:]:
        assert torch.equal(density, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.fixture
def head() -> FlowHead:
    torch.manual_seed(0)
    made = FlowHead(width=16, action_dim=A, depth=1, sampling_steps=4)
    torch.nn.init.normal_(made.out.weight, std=0.3)
    return made


def chain_of(head: FlowHead, latent: torch.Tensor, log_std: torch.Tensor) -> FlowChain:
    start = torch.zeros(len(latent), C, A)
    return FlowChain(lambda x, first: head.advance(latent, x, first), head.sampling_steps, start, log_std)


def test_flow_chain_without_noise_is_the_heads_own_sampling(head):
    latent = draws(B, C, 16)
    still = chain_of(head, latent, torch.zeros(A)).sample(torch.Generator(), std_scale=0.0)
    assert still.shape == (B, 5, C, A) and torch.equal(still[:, -1], head(latent))
    assert head(latent).abs().max() > 0.05, "the head must do something"


def test_flow_chain_density_is_the_product_of_its_steps(head):
    latent, log_std = draws(B, C, 16), draws(A, seed=2) * 0.3 - 2
    policy = chain_of(head, latent, log_std)
    sample = policy.sample(torch.Generator().manual_seed(3))
    total = torch.zeros(B)
    for k in range(4):
        mean = sample[:, k] + head.velocity(head.norm(latent), sample[:, k], torch.full((B,), k / 4)) / 4
        step = Normal(mean, (log_std.exp() / math.sqrt(4)).expand(B, C, A)).log_prob(sample[:, k + 1])
        total += (step * (prefix()[..., None] if k == 3 else 1.0)).sum((1, 2))
    assert torch.allclose(policy.log_prob(sample, prefix()), total, atol=1e-3)


def test_flow_chain_what_was_not_executed_and_last_cannot_matter(head):
    latent, results = draws(B, C, 16), []
    sample = chain_of(head, latent, torch.full((A,), -2.0)).sample(torch.Generator().manual_seed(3)).detach()
    for garbage in (0.0, 9.0, float("nan")):
        changed = sample.clone()
        changed[:, -1] = torch.where(prefix()[..., None], changed[:, -1], changed[:, -1] + garbage)
        density = chain_of(head, latent, torch.full((A,), -2.0)).log_prob(changed, prefix())
        results.append([density, *torch.autograd.grad(density.sum(), list(head.blocks.parameters()))])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
