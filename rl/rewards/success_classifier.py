"""A success classifier on the frozen backbone's features: has what the instruction asks for been done in this picture?

RoboFuME's reward (Yang et al. 2023, arXiv 2310.15145): trained on the last frames of demonstrations and of successes,
against earlier frames and failures. Its threshold is chosen on episodes that it has not learnt from, by false
positives: a robot that is rewarded for what it has not done learns just that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.evaluation.evaluate import wilson95
from rl.configs.offline import ClassifierConfig
from rl.rewards.process_reward import auc
from vla.core.checkpoint import load_checkpoint, save_checkpoint

NEVER = 2.0
"""A threshold that no probability reaches."""
KIND = "success-classifier"


@dataclass(frozen=True)
class Watched:
    """The frames of one episode."""

    seen_TS: Tensor
    """Summaries of the backbone's features (`rl.models.policy_inputs.summary`)."""
    done_T: Tensor
    """Bool: the task was done by then."""


@dataclass(frozen=True)
class ClassifierReport:
    """The classifier on episodes that it has not learnt from."""

    threshold: float
    frame_auc: float
    frames: tuple[int, int, int, int]
    """False positives, negatives, false negatives, positives: single frames."""
    episodes: tuple[int, int, int, int]
    """The same for episodes, with as many frames in a row as are asked for. A negative is an episode up to the frame
    before it was done."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with intervals of the false positives."""
        out: dict[str, Any] = {"threshold": self.threshold, "frame_auc": round(self.frame_auc, 4)}
        for name in ("frames", "episodes"):
            false, negatives, missed, positives = getattr(self, name)
            out[name] = {
                "false_positives": false, "negatives": negatives, "false_negatives": missed, "positives": positives,
                "false_positive_wilson95": list(wilson95(false, negatives)) if negatives else None,
            }  # fmt: skip
        return out


class SuccessClassifier(nn.Module):
    """Summaries (B, S) -> probabilities (B,) that the task is done."""

    def __init__(self, state_dim: int, width: int, *, dropout: float = 0.0, patience: int = 2) -> None:
        super().__init__()
        self.patience = patience
        self.register_buffer("shift", torch.zeros(state_dim))
        self.register_buffer("divide", torch.ones(state_dim))
        self.register_buffer("threshold", torch.tensor(NEVER))
        self.net = nn.Sequential(
            nn.Linear(state_dim, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, seen_BS: Tensor) -> Tensor:
        """Return the probabilities (B,)."""
        return self.logit(seen_BS).sigmoid()

    def logit(self, seen_BS: Tensor) -> Tensor:
        """Return the logits (B,)."""
        return self.net(((seen_BS - self.shift) / self.divide).clamp(-10.0, 10.0)).squeeze(-1)

    def save(self, folder: Path, backbone: str) -> None:
        """Write it, atomically. `backbone`: whose features it reads."""
        config = {
            "kind": KIND, "backbone": backbone, "patience": self.patience, "width": self.net[0].out_features,
            "state_dim": len(self.shift),
        }  # fmt: skip
        save_checkpoint(folder, config=config, tensors=self.state_dict(), stats={})

    @staticmethod
    def load(folder: Path) -> SuccessClassifier:
        """Read what `save` wrote. ValueError for a folder that holds something else."""
        saved = load_checkpoint(folder)
        if saved.config.get("kind") != KIND:
            raise ValueError(f"{folder} holds no success classifier: `vla rl reset-free` writes one to OUT/classifier")
        config = saved.config
        model = SuccessClassifier(config["state_dim"], config["width"], patience=config["patience"])
        model.load_state_dict(saved.tensors)
        return model.requires_grad_(False).eval()


def fit_classifier(
    episodes: Sequence[Watched], config: ClassifierConfig | None = None, *, seed: int = 0
) -> tuple[SuccessClassifier, ClassifierReport]:
    """Train on some of the episodes, choose the threshold on the others. ValueError when nothing was ever done, or all
    was from the first frame, in either part."""
    config = config or ClassifierConfig()
    rng = np.random.default_rng([seed, 47])
    order = [episodes[i] for i in rng.permutation(len(episodes))]
    cut = max(1, round(len(order) * (1 - config.held_out)))
    train, held = order[:cut], order[cut:]
    for part in (train, held):
        done = torch.cat([e.done_T for e in part]) if part else torch.zeros(0, dtype=torch.bool)
        if not done.any() or done.all():
            raise ValueError(
                "a success classifier needs frames of both kinds, to learn from and to be checked on: log more episodes"
            )
    model = _train(train, config, seed)
    threshold = _threshold([model(e.seen_TS) for e in held], held, config)
    model.threshold.fill_(threshold)
    return model, check(model, held)


def _train(episodes: Sequence[Watched], config: ClassifierConfig, seed: int) -> SuccessClassifier:
    seen = torch.cat([e.seen_TS for e in episodes])
    done = torch.cat([e.done_T for e in episodes])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SuccessClassifier(seen.shape[1], config.width, dropout=config.dropout, patience=config.patience)
        model.shift.copy_(seen.mean(0))
        model.divide.copy_(seen.std(0) + 1e-3)
        optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        sides = [(done == value).nonzero().squeeze(1) for value in (False, True)]
        half = config.batch_size // 2
        for _ in range(config.steps):
            rows = torch.cat([side[torch.randint(len(side), (half,), generator=generator)] for side in sides])
            loss = F.binary_cross_entropy_with_logits(model.logit(seen[rows]), done[rows].float())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return model.requires_grad_(False).eval()


def _threshold(scores: Sequence[Tensor], episodes: Sequence[Watched], config: ClassifierConfig) -> float:
    """The lowest threshold such that, by exchangeability, at most the share that is asked for of further episodes is
    taken for done too early, and of frames as well. NEVER if these are too few to promise that."""
    early = [score[~e.done_T] for score, e in zip(scores, episodes, strict=True)]
    worst = torch.stack([_sustained(score, config.patience) for score in early if len(score)])
    allowed = int(config.false_positives * (len(worst) + 1)) - 1
    if allowed < 0:
        return NEVER
    frames = torch.cat(early)
    bounds = (
        worst.sort(descending=True).values[min(allowed, len(worst) - 1)],
        frames.sort(descending=True).values[int(config.false_positives * len(frames))],
    )
    return max(0.5, *map(float, bounds))


def _sustained(score_T: Tensor, patience: int) -> Tensor:
    """The highest score that some `patience` frames in a row all reach; 0 for fewer frames."""
    if len(score_T) < patience:
        return score_T.new_zeros(())
    return score_T.unfold(0, patience, 1).amin(1).max()


def check(model: SuccessClassifier, episodes: Sequence[Watched]) -> ClassifierReport:
    """The classifier's errors on these episodes."""
    scores = [model(e.seen_TS) for e in episodes]
    threshold = float(model.threshold)
    return ClassifierReport(
        threshold,
        auc(torch.cat(scores).numpy(), torch.cat([e.done_T for e in episodes]).float().numpy()),
        _frame_counts(scores, episodes, threshold),
        _episode_counts(scores, episodes, threshold, model.patience),
    )


def _frame_counts(scores: Sequence[Tensor], episodes: Sequence[Watched], threshold: float) -> tuple[int, int, int, int]:
    said = torch.cat(list(scores)) > threshold
    done = torch.cat([e.done_T for e in episodes])
    return int((said & ~done).sum()), int((~done).sum()), int((~said & done).sum()), int(done.sum())


def _episode_counts(
    scores: Sequence[Tensor], episodes: Sequence[Watched], threshold: float, patience: int
) -> tuple[int, int, int, int]:
    false = negatives = missed = positives = 0
    for score, episode in zip(scores, episodes, strict=True):
        before, after = score[~episode.done_T], score[episode.done_T]
        if len(before):
            negatives += 1
            false += bool(_sustained(before, patience) > threshold)
        if len(after):
            positives += 1
            missed += not bool(_sustained(after, min(patience, len(after))) > threshold)
    return false, negatives, missed, positives


def shuffled(episodes: Sequence[Watched], *, seed: int) -> list[Watched]:
    """The same frames with labels of others: a control whose classifier can know nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([e.done_T for e in episodes])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    parts = labels.split([len(e.done_T) for e in episodes])
    return [Watched(e.seen_TS, part) for e, part in zip(episodes, parts, strict=True)]
