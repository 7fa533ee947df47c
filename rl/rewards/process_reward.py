"""A process reward model: one logit on the frozen VLM's features says whether a sub-task has just been completed.

Pseudo-labels come from `rl.rewards.milestones`; the threshold from episodes that failed, so that at most one in a
hundred is taken for a success, also of those to come (cross-conformal: Vovk 2015, "Cross-conformal predictors"); the
reward is a potential difference, which leaves the best policy what it is (Ng et al. 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.evaluation.evaluate import wilson95
from rl.configs.rewards import ProgressConfig
from rl.models.actor import GaussianChunkActor
from rl.models.policy_inputs import Conditions, Seen, summary
from rl.rewards.milestones import frame_labels, milestones
from vla.core.types import Observation, Policy, VecEnv, executed


@dataclass(frozen=True)
class Episode:
    """What one episode showed at its T decisions."""

    state_TS: NDArray[np.float32]
    """Summaries of the frozen features, with the instruction that counts."""
    other_TS: NDArray[np.float32]
    """The same frames with another instruction: nothing of it is ever completed."""
    gripper_T: NDArray[np.float32]
    position_TX: NDArray[np.float32]
    success: bool
    """The simulator's verdict: never shown to the model but through the labels."""
    control_steps: int = 0
    """What the worlds played for it."""


@torch.no_grad()
def watch(
    actor: GaussianChunkActor,
    policy: Policy,
    env: VecEnv,
    seeds: Sequence[int],
    *,
    position: slice = slice(0, 3),
) -> list[Episode]:
    """One episode per seed, in rounds of all worlds. `position`: the end effector's place in proprio."""
    names = env.action_spec.names
    grippers = [i for i, name in enumerate(names) if "gripper" in name]
    if not grippers:
        raise ValueError(f"milestones are cut at gripper changes, and no action is called so: {', '.join(names)}")
    episodes: list[Episode] = []
    for start in range(0, len(seeds) - env.num_envs + 1, env.num_envs):
        obs = env.reset(seeds=seeds[start : start + env.num_envs])
        policy.reset()
        rows: list[list[tuple[Any, ...]]] = [[] for _ in range(env.num_envs)]
        success, over = np.zeros(env.num_envs, bool), np.zeros(env.num_envs, bool)
        played = np.zeros(env.num_envs, np.int64)
        while not over.all():
            told = replace(obs, instruction=env.alternative_instructions())
            state, other = (_read(actor, one).numpy() for one in (obs, told))
            chunk = executed(policy.spec, policy.act(obs))
            for i in np.flatnonzero(~over):
                rows[i].append((state[i], other[i], chunk[i, 0, grippers[0]], obs.proprio[i, position].copy()))
            result = env.step_chunk(chunk)
            played += np.where(over, 0, result.n_steps)
            ended = ~over & (result.terminated | result.truncated)
            if ended.any():  # the frame in which it was done (or not) is the one that matters most
                told = replace(result.obs, instruction=env.alternative_instructions())
                state, other = (_read(actor, one).numpy() for one in (result.obs, told))
                for i in np.flatnonzero(ended):
                    last = chunk[i, max(0, result.n_steps[i] - 1), grippers[0]]
                    rows[i].append((state[i], other[i], last, result.obs.proprio[i, position].copy()))
            success |= ended & result.info["success"].astype(bool)
            over |= ended
            obs = result.obs
        for i, row in enumerate(rows):
            columns = [np.stack(column).astype(np.float32) for column in zip(*row, strict=True)]
            episodes.append(Episode(*columns, bool(success[i]), int(played[i])))
    return episodes


def _read(actor: GaussianChunkActor, obs: Observation) -> Tensor:
    return summary_of(*actor.encode(obs)).cpu()


def summary_of(conditions: Conditions, proprio_BP: Tensor) -> Tensor:
    """What the reward model reads. ValueError if the backbone learns: its features would move under the model."""
    if isinstance(conditions, Seen):
        raise ValueError("a process reward model reads frozen features: it does not go with a learning backbone")
    return summary(conditions, proprio_BP)


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
        """What `state_dict` gave, frozen."""
        model = ProgressModel(len(tensors["shift"]), len(tensors["net.0.bias"]))
        model.load_state_dict(tensors)
        return model.requires_grad_(False).eval()

    def logit(self, state_BS: Tensor) -> Tensor:
        """(B,)."""
        return self.net(((state_BS - self.shift) / self.divide).clamp(-10.0, 10.0)).squeeze(-1)

    def forward(self, state_BS: Tensor) -> Tensor:
        return self.logit(state_BS).sigmoid()


@dataclass(frozen=True)
class ProgressReport:
    """The model beside the simulator's truth, on episodes that neither trained nor calibrated it."""

    frame_auc: float
    """Of single frames against their pseudo-labels."""
    threshold: float
    goals: int
    false_positives: int
    """Episodes taken for completed that were not (failed, or told something else)..."""
    negatives: int
    """...of so many."""
    false_negatives: int
    positives: int
    calibration_false_positives: int
    calibration_negatives: int
    """The same on the episodes that the threshold was chosen by, each judged by a model that had not learnt from it."""

    def to_dict(self) -> dict[str, Any]:
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
        wrong += _told_apart(_train(rest, config, seed), fold)[1]
    threshold, false = _calibrated(wrong, int(model.goals), config.false_positives)
    model.threshold.fill_(threshold)
    return model, _report(model, held, config, (false, len(wrong)))


def _train(episodes: Sequence[Episode], config: ProgressConfig, seed: int) -> ProgressModel:
    state, label = [], []
    for e in episodes:
        marks = milestones(e.gripper_T, e.position_TX, config.marks)
        # hard negatives: the same frames told otherwise, and whatever failures ended with
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


def _told_apart(model: ProgressModel, episodes: Sequence[Episode]) -> tuple[Scores, Scores]:
    """Probabilities of the episodes that were completed, and of those that were not: failed, or told otherwise."""
    right: Scores = []
    wrong: Scores = []
    for e in episodes:
        p, told_otherwise = (model(torch.from_numpy(x)).numpy() for x in (e.state_TS, e.other_TS))
        (right if e.success else wrong).append(p)
        wrong.append(told_otherwise)
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
    right, wrong = _told_apart(model, episodes)
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
    """(T,) milestones seen so far: rising edges of p > threshold."""
    above = p_T > threshold
    rising = above & ~np.concatenate([[False], above[:-1]])
    return np.cumsum(rising)


def completed(p_T: NDArray[np.floating], threshold: float, goals: int) -> bool:
    """Whether as many milestones were seen as a success has."""
    return bool(events(p_T, threshold)[-1] >= goals)


def auc(score: NDArray[np.floating], label: NDArray[np.floating]) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half; 0.5 without both kinds."""
    positive, negative = score[label > 0.5], score[label <= 0.5]
    if not len(positive) or not len(negative):
        return 0.5
    below = np.searchsorted(np.sort(negative), positive, side="left")
    upto = np.searchsorted(np.sort(negative), positive, side="right")
    return float((below + upto).mean() / 2 / len(negative))


class Shaping:
    """Potential-based reward from a calibrated model: coef * (gamma * Phi(s') - Phi(s)), Phi = milestones seen / goals.

    Over an episode that adds up to no more than `coef` in size, and to nothing that a policy could prefer: a finished
    episode's potential is 0.
    """

    def __init__(self, model: ProgressModel, num_envs: int, *, coef: float = 0.3, gamma: float = 1.0) -> None:
        """`gamma`: of a decision. `coef`: of a success's reward."""
        if not 0 <= coef <= 1:
            raise ValueError(f"shaping is a fraction of success, its coef in [0, 1], got {coef}")
        self.model, self.coef, self.gamma = model, coef, gamma
        self._seen = np.zeros(num_envs, np.int64)
        self._above = np.zeros(num_envs, bool)

    def begin(self, ids: Sequence[int]) -> None:
        """New episodes start in these worlds."""
        self._seen[list(ids)], self._above[list(ids)] = 0, False

    @torch.no_grad()
    def potential(self, conditions: Conditions, proprio_BP: Tensor) -> NDArray[np.float32]:
        """(N,) of the state that every world is in now; call it once per decision."""
        above = self.model(summary_of(conditions, proprio_BP)).cpu().numpy() > float(self.model.threshold)
        self._seen += above & ~self._above
        self._above = above
        return np.minimum(1.0, self._seen / max(1, int(self.model.goals))).astype(np.float32)

    def reward(
        self, before: NDArray[np.float32], after: NDArray[np.float32], ended: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """(N,) of the decision between two potentials."""
        return self.coef * (self.gamma * np.where(ended, 0.0, after) - before).astype(np.float32)
