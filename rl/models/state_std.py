"""Exploration that depends on the state: fitted to how much demonstrators vary, then frozen.

Where demonstrations scatter (free motion), noise costs little; where they agree (the grasp), it costs the episode. A
small network is fitted by the Gaussian likelihood of demonstrated chunks around the policy's own mean (RIPT-VLA, Tan
et al. 2025, does so with a Laplace density) and never touched again: a scale that learns would collapse.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_LOG_FACTOR = 1.1
"""The spread varies by at most a factor of three around its mean."""


class StateScale(nn.Module):
    """Summary of the state (B, S) -> log-factor on the spread (B, A), 0 on average over the demonstrations."""

    def __init__(self, state_dim: int, action_dim: int, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(state_dim))
        self.register_buffer("divide", torch.ones(state_dim))
        self.register_buffer("mean", torch.zeros(action_dim))
        self.net = nn.Sequential(nn.Linear(state_dim, width), nn.Tanh(), nn.Linear(width, action_dim))

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> StateScale:
        """What `state_dict` gave, frozen."""
        scale = StateScale(len(tensors["shift"]), len(tensors["mean"]), len(tensors["net.0.bias"]))
        scale.load_state_dict(tensors)
        return scale.requires_grad_(False).eval()

    def raw(self, state_BS: Tensor) -> Tensor:
        """(B, A), not centred."""
        return self.net(((state_BS - self.shift) / self.divide).clamp(-10.0, 10.0))

    def forward(self, state_BS: Tensor) -> Tensor:
        return (self.raw(state_BS) - self.mean).clamp(-MAX_LOG_FACTOR, MAX_LOG_FACTOR)


def fit_scale(
    state_BS: Tensor, error_BCA: Tensor, mask_BC: Tensor, *, steps: int = 400, batch_size: int = 256, seed: int = 0
) -> StateScale:
    """Fit by maximum likelihood to errors (demonstrated minus the policy's mean, normalised), then freeze.

    ValueError when there are too few demonstrations to tell states apart.
    """
    if len(state_BS) < 2:
        raise ValueError(f"fitting a state-dependent scale needs demonstrated decisions, got {len(state_BS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scale = StateScale(state_BS.shape[1], error_BCA.shape[2]).to(state_BS.device)
    scale.shift.copy_(state_BS.mean(0))
    scale.divide.copy_(state_BS.std(0) + 1e-4)
    square_BA = (error_BCA.square() * mask_BC[..., None]).sum(1)
    count_B1 = mask_BC.sum(1, keepdim=True)
    # a floor, or a head that has learnt some demonstration by heart would ask for no noise at all there
    square_BA = square_BA + count_B1 * (0.05 * square_BA.sum(0) / count_B1.sum()).clamp(min=1e-8)
    with torch.no_grad():
        scale.net[-1].bias.copy_(0.5 * (square_BA.sum(0) / count_B1.sum()).log())
    optimiser = torch.optim.Adam(scale.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(state_BS), (min(batch_size, len(state_BS)),), generator=generator)
        log_std_BA = scale.raw(state_BS[rows])
        nll = (0.5 * square_BA[rows] * (-2 * log_std_BA).exp() + count_B1[rows] * log_std_BA).sum(1).mean()
        optimiser.zero_grad(set_to_none=True)
        nll.backward()
        optimiser.step()
    with torch.no_grad():
        scale.mean.copy_(scale.raw(state_BS).mean(0))
    return scale.requires_grad_(False).eval()
