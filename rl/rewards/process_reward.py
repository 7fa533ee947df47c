"""A process reward model: one logit on the frozen VLM's features says whether a sub-task has just been completed.

Pseudo-labels come from `rl.rewards.milestones`; the threshold from episodes that failed, so that at most one in a
hundred is taken for a success, also of those to come (cross-conformal: Vovk 2015, "Cross-conformal predictors"); the
reward is a potential difference, which leaves the best policy what it is (Ng et al. 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.evaluation.evaluate import wilson95
from rl.configs.rewards import ProgressConfig
from rl.rewards.milestones import frame_labels, milestones


@dataclass(frozen=True)
class Episode:
    """Inputs of the process reward model for the T decisions of one episode."""

    state_TS: NDArray[np.float32]
    """Summaries of the frozen features, with the instruction of the episode."""
    other_TS: NDArray[np.float32]
    """Summaries of the same frames with another instruction, which is never completed."""
    gripper_T: NDArray[np.float32]
    position_TX: NDArray[np.float32]
    success: bool
    """The simulator's verdict; the model learns of it through the labels only."""
    control_steps: int = 0
    """Control steps that the environment executed."""


class ProgressModel(nn.Module):
    """State summary (B, S) -> probability that a sub-task has just been completed."""

    def __init__(self, state_dim: int, width: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(state_dim))
        self.register_buffer("divide", torch.ones(state_dim))
        self.register_buffer("threshold", torch.tensor(2.0))
        """Never reached until calibrated."""
        self.register_buffer("goals", torch.tensor(1))
        """Milestones of a typical success."""
        self.net = nn.Sequential(nn.Linear(state_dim, width), nn.GELU(), nn.Linear(width, 1))

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> ProgressModel:
        """Return the frozen model of a `state_dict`."""
        model = ProgressModel(len(tensors["shift"]), len(tensors["net.0.bias"]))
        model.load_state_dict(tensors)
        return model.requires_grad_(False).eval()

    def logit(self, state_BS: Tensor) -> Tensor:
        """Return the logits (B,)."""
        return self.net(((state_BS - self.shift) / self.divide).clamp(-10.0, 10.0)).squeeze(-1)

    def forward(self, state_BS: Tensor) -> Tensor:
        """Return the probabilities (B,)."""
        return self.logit(state_BS).sigmoid()


@dataclass(frozen=True)
class ProgressReport:
    """The model compared with the simulator's truth, on episodes that neither trained nor calibrated it."""

    frame_auc: float
    """Area under the ROC curve of single frames against their pseudo-labels."""
    threshold: float
    goals: int
    false_positives: int
    """Episodes classified as completed that were not (failed, or given another instruction)."""
    negatives: int
    """All episodes that were not completed."""
    false_negatives: int
    positives: int
    calibration_false_positives: int
    calibration_negatives: int
    """The same on the episodes that chose the threshold, each scored by a model that was not trained on it."""

    def to_dict(self) -> dict[str, Any]:
        """Return all counts and the interval of the false positives, JSON-ready."""
        low, high = wilson95(self.false_positives, self.negatives)
        return {**self.__dict__, "false_positive_wilson95": [low, high]}


def fit_progress(
    episodes: Sequence[Episode], config: ProgressConfig | None = None, *, seed: int = 0
) -> tuple[ProgressModel, ProgressReport]:
    """Train and calibrate on part of the episodes, report on the rest; frozen afterwards.

    ValueError when there are too few successes to learn from, whichever fold is left out, and to be checked on.
    """
    config = config or ProgressConfig()
    rng = np.random.default_rng([seed, 43])
    order = [episodes[i] for i in rng.permutation(len(episodes))]
    cut = max(1, round(len(order) * (1 - config.held_out)))
    train, held = order[:cut], order[cut:]
    folds = [train[k :: config.folds] for k in range(config.folds)]
    others = [[e for j, fold in enumerate(folds) if j != k for e in fold] for k in range(config.folds)]
    if not all(any(e.success for e in part) for part in (held, *others)):
        raise ValueError("a process reward model needs episodes that succeeded, to learn from and to be checked on")
    model = _train(train, config, seed)
    counts = [len(milestones(e.gripper_T, e.position_TX, config.marks)) for e in train if e.success]
    model.goals.fill_(int(np.median(counts)))
    wrong: Scores = []
    for fold, rest in zip(folds, others, strict=True):
        wrong += _scores(_train(rest, config, seed), fold)[1]
    threshold, false = _calibrated(wrong, int(model.goals), config.false_positives)
    model.threshold.fill_(threshold)
    return model, _report(model, held, config, (false, len(wrong)))


def _train(episodes: Sequence[Episode], config: ProgressConfig, seed: int) -> ProgressModel:
    state, label = [], []
    for e in episodes:
        marks = milestones(e.gripper_T, e.position_TX, config.marks)
        # hard negatives: the same frames given another instruction, and whatever failures ended with
        state += [e.state_TS, e.other_TS]
        label += [frame_labels(len(e.state_TS), marks, e.success, config.marks), np.zeros(len(e.state_TS), np.float32)]
    x, y = torch.from_numpy(np.concatenate(state)), torch.from_numpy(np.concatenate(label))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ProgressModel(x.shape[1], config.width)
    model.shift.copy_(x.mean(0))
    model.divide.copy_(x.std(0) + 1e-3)
    generator = torch.Generator().manual_seed(seed)
    sides = [(y == value).nonzero().squeeze(1) for value in (0, 1)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    for _ in range(config.steps):
        half = config.batch_size // 2
        rows = torch.cat([side[torch.randint(len(side), (half,), generator=generator)] for side in sides])
        target = y[rows] * (1 - 2 * config.smoothing) + config.smoothing
        loss = F.binary_cross_entropy_with_logits(model.logit(x[rows]), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False).eval()


Scores = list[NDArray[np.float32]]
"""One (T,) per episode."""


def _scores(model: ProgressModel, episodes: Sequence[Episode]) -> tuple[Scores, Scores]:
    """Return the probabilities of episodes that were completed, and of those that failed or had another instruction."""
    right: Scores = []
    wrong: Scores = []
    for e in episodes:
        p, other = (model(torch.from_numpy(x)).numpy() for x in (e.state_TS, e.other_TS))
        (right if e.success else wrong).append(p)
        wrong.append(other)
    return right, wrong


def _calibrated(wrong: Sequence[NDArray[np.floating]], goals: int, rate: float) -> tuple[float, int]:
    """(the lowest threshold such that, by exchangeability, at most `rate` of further negatives are taken for completed;
    how many of these are). 2, which is never reached, if these are too few to promise that."""
    best = 2.0, 0
    for threshold in np.linspace(1.0, 0.5, 101):  # downwards: a lucky dip further down is no promise
        false = sum(completed(p, float(threshold), goals) for p in wrong)
        if false + 1 > rate * (len(wrong) + 1):
            break
        best = float(threshold), false
    return best


def _report(
    model: ProgressModel, episodes: Sequence[Episode], config: ProgressConfig, calibration: tuple[int, int]
) -> ProgressReport:
    threshold, goals = float(model.threshold), int(model.goals)
    scores = [model(torch.from_numpy(e.state_TS)).numpy() for e in episodes]
    labels = [
        frame_labels(len(p), milestones(e.gripper_T, e.position_TX, config.marks), e.success, config.marks)
        for p, e in zip(scores, episodes, strict=True)
    ]
    right, wrong = _scores(model, episodes)
    return ProgressReport(
        frame_auc=auc(np.concatenate(scores), np.concatenate(labels)),
        threshold=threshold,
        goals=goals,
        false_positives=sum(completed(p, threshold, goals) for p in wrong),
        negatives=len(wrong),
        false_negatives=sum(not completed(p, threshold, goals) for p in right),
        positives=len(right),
        calibration_false_positives=calibration[0],
        calibration_negatives=calibration[1],
    )


def events(p_T: NDArray[np.floating], threshold: float) -> NDArray[np.int64]:
    """Return (T,) milestones seen so far: rising edges of p > threshold."""
    above = p_T > threshold
    rising = above & ~np.concatenate([[False], above[:-1]])
    return np.cumsum(rising)


def completed(p_T: NDArray[np.floating], threshold: float, goals: int) -> bool:
    """True if at least `goals` milestones, those of a success, were detected."""
    return bool(events(p_T, threshold)[-1] >= goals)


def auc(score: NDArray[np.floating], label: NDArray[np.floating]) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half; 0.5 without both kinds."""
    positive, negative = score[label > 0.5], score[label <= 0.5]
    if not len(positive) or not len(negative):
        return 0.5
    below = np.searchsorted(np.sort(negative), positive, side="left")
    upto = np.searchsorted(np.sort(negative), positive, side="right")
    return float((below + upto).mean() / 2 / len(negative))
