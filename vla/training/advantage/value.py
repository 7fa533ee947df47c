"""The value of a logged frame: what return is to be expected from here, by models that have not seen its episode.

After RECAP (Physical Intelligence 2025, arXiv 2511.14759): a control step costs, a failure costs much more, and a
distribution over returns is learnt. The model reads what the frozen backbone gives the policy, and the time.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vla.data.findings import labelled_throughout

FAILURE = 0.5
"""The cost of a failure. An episode's steps cost at most as much again, so that returns lie in [-1, 0]."""
_BINS = 51
_SPREAD = 0.75
"""Deviation of the Gaussian that stands for a return, in bins: Farebrother et al. 2024 (arXiv 2403.03950)."""
_WIDTH = 256
_BATCH = 256
_DROPOUT = 0.2


class Outcomes:
    """When each of E episodes succeeded, and so what each of F frames cost until then."""

    def __init__(self, success_F: NDArray[np.bool_], episode_F: NDArray[np.int64]) -> None:
        """`success_F`: whether a frame's action ended in success; `episode_F`: the frames' episodes, one after the
        other."""
        change = np.flatnonzero(np.diff(episode_F)) + 1
        begins = np.concatenate([[0], change])
        ends = np.append(change, len(episode_F))
        self.won_E = np.array([success_F[a:b].any() for a, b in zip(begins, ends, strict=True)])
        # What follows the first success is no longer judged: it can only be good. Of a label that a converter has
        # spread over its episode, the end is when it came true.
        spread = set(labelled_throughout(success_F, episode_F))
        over_E = np.array(
            [
                a + np.argmax(success_F[a:b]) + 1 if won and episode_F[a] not in spread else b
                for a, b, won in zip(begins, ends, self.won_E, strict=True)
            ]
        )
        self.number_F = np.repeat(np.arange(len(begins)), ends - begins)
        self.elapsed_F = np.arange(len(episode_F)) - begins[self.number_F]
        self.left_F = np.maximum(over_E[self.number_F] - np.arange(len(episode_F)), 0)
        """Control steps from here until the episode was decided."""
        self.longest = int((ends - begins).max())
        self.step_cost = (1 - FAILURE) / self.longest

    @property
    def returns_F(self) -> NDArray[np.float64]:
        """Return of each frame, in [-1, 0]: the cost of the steps left, and of the failure if there was one."""
        return -self.step_cost * self.left_F - FAILURE * ~self.won_E[self.number_F]

    def advantages_F(self, value_F: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
        """Advantage of what was done in the next `steps` control steps: their cost and the value after them, beside the
        value of now. Of an episode that is decided by then: what came of it, beside the value of now."""
        later = np.minimum(np.arange(len(value_F)) + steps, len(value_F) - 1)
        ahead = -self.step_cost * steps + value_F[later]
        return np.where(self.left_F <= steps, self.returns_F, ahead) - value_F


def held_out_values(inputs_FK: Tensor, outcomes: Outcomes, *, folds: int, steps: int, seed: int) -> NDArray[np.float64]:
    """The expected return of each frame (F,), by a model of the episodes of all other folds. ValueError where all
    episodes ended alike, or there are too few of them."""
    episodes = len(outcomes.won_E)
    if episodes < 2 * folds:
        raise ValueError(f"{episodes} logged episodes are too few to judge them: record at least {2 * folds}")
    if outcomes.won_E.all() or not outcomes.won_E.any():
        which = "succeeded" if outcomes.won_E.all() else "failed"
        raise ValueError(f"all {episodes} logged episodes {which}: there is nothing to tell good actions from bad by")
    generator = torch.Generator().manual_seed(seed)
    fold_F = (torch.randperm(episodes, generator=generator) % folds)[torch.from_numpy(outcomes.number_F)]
    elapsed_F1 = torch.from_numpy(outcomes.elapsed_F / outcomes.longest).float()[:, None]
    inputs = torch.cat([inputs_FK.float(), elapsed_F1], 1)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp(min=1e-3)
    target = torch.from_numpy(outcomes.returns_F).float()
    value_F = torch.empty(len(inputs))
    for fold in range(folds):
        mine = fold_F == fold
        model = ValueModel(inputs.shape[1], seed=seed + fold)
        model.learn(inputs[~mine], target[~mine], steps=steps, seed=seed + fold)
        value_F[mine] = model.value(inputs[mine])
    return value_F.double().numpy()


class ValueModel(nn.Module):
    """(F, K) -> a distribution over returns in [-1, 0]."""

    def __init__(self, width: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(width, _WIDTH), nn.GELU(), nn.LayerNorm(_WIDTH), nn.Dropout(_DROPOUT),
                nn.Linear(_WIDTH, _WIDTH), nn.GELU(), nn.Dropout(_DROPOUT), nn.Linear(_WIDTH, _BINS),
            )  # fmt: skip
        self.centres_J = torch.linspace(-1, 0, _BINS)

    def learn(self, inputs_FK: Tensor, return_F: Tensor, *, steps: int, seed: int) -> None:
        """Cross-entropy to a Gaussian around each frame's return."""
        optimiser = torch.optim.AdamW(self.net.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
        spread = _SPREAD / (_BINS - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net.train()
            for _ in range(steps):
                rows = torch.randint(len(inputs_FK), (_BATCH,))
                wanted = torch.softmax(-0.5 * ((self.centres_J - return_F[rows, None]) / spread) ** 2, 1)
                optimiser.zero_grad()
                F.cross_entropy(self.net(inputs_FK[rows]), wanted).backward()
                optimiser.step()
                schedule.step()

    @torch.no_grad()
    def value(self, inputs_FK: Tensor) -> Tensor:
        """(F,) the mean of the distribution."""
        self.net.eval()
        return torch.softmax(self.net(inputs_FK), 1) @ self.centres_J
