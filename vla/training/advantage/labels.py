"""Labels of logged frames, and the batches that carry them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.backbones.features import Features
from vla.core.checkpoint import load_tensors, save_tensors
from vla.core.config import load_json, save_json
from vla.data.batches import Batch, Source
from vla.data.feature_cache import EncodedDemos
from vla.data.findings import spread_successes
from vla.data.lerobot_dataset import DemoSet
from vla.model.advantage import BAD, GOOD, UNTOLD
from vla.model.memory.tokens import row_of
from vla.model.model import VLA
from vla.runtime.distributed import launched
from vla.training.advantage.value import Outcomes, held_out_values
from vla.training.train_config import JudgeConfig

LABELS = "advantage.safetensors"
"""The file of a run that holds the labels of its frames, and the values and advantages that they came from."""
FIGURES = "advantage.json"
_FEWEST = 20
"""Logged episodes that a task needs for a threshold of its own; those with fewer share one."""
_AT_ONCE = 1024
_LEAST_EXPLAINED = 0.1
"""Share of the returns' variance below which the value model gets a warning."""


def check_logs(demos: Mapping[str, DemoSet]) -> None:
    """ValueError, one line, unless at least one of the datasets says which episodes succeeded."""
    if all(part.success is None for part in demos.values()):
        raise ValueError(
            f"none of the datasets ({', '.join(demos)}) says which episodes succeeded: record a policy's own with "
            "`vla demos SUITE --policy FOLDER`, or with LeRobot's feature next.success"
        )


def imitated_failures(name: str, demos: DemoSet) -> list[str]:
    """A warning about episodes that did not succeed, by the dataset's own word, where nobody tells them apart."""
    if demos.success is None:
        return []
    starts = np.flatnonzero(np.diff(demos.episode_index, prepend=demos.episode_index[:1] - 1))
    failed = int((~np.logical_or.reduceat(demos.success, starts)).sum())
    if not failed:
        return []
    return [
        f"{name}: {failed} of {len(starts)} episodes did not succeed, by feature next.success, and are imitated like "
        "the others: --init with --advantage tells good from bad, `vla check --fix --drop` leaves episodes out"
    ]


def untold_moments(name: str, demos: DemoSet) -> list[str]:
    """A warning about episodes whose success is no moment but a label of every frame."""
    found = [] if demos.success is None else spread_successes(demos.success, demos.episode_index)
    return [f"{name}: {finding.text}" for finding in found]


def good_ones(advantage_F: NDArray[np.float64], task_F: Sequence[str], share: float) -> NDArray[np.bool_]:
    """(F,) whether a frame's advantage is among its task's largest: `share` of the frames, ties included."""
    tasks = np.asarray(task_F)
    good = np.zeros(len(advantage_F), bool)
    for task in np.unique(tasks):
        mine = tasks == task
        good[mine] = advantage_F[mine] >= np.quantile(advantage_F[mine], 1 - share)
    return good


@dataclass(frozen=True)
class Judged:
    """Labels of the frames of one dataset, (F,) each, and the figures that they came from."""

    label_F: Tensor
    """float32: GOOD, BAD."""
    value_F: Tensor
    advantage_F: Tensor
    figures: dict[str, float]


def judge(demos: DemoSet, encoded: EncodedDemos, config: JudgeConfig, *, seed: int) -> Judged:
    """The labels of a dataset: of demonstrations all good, of logged episodes by their advantage. ValueError for logs
    by which nothing can be told apart."""
    if demos.success is None:
        nothing = torch.zeros(demos.num_frames)
        return Judged(torch.full((demos.num_frames,), GOOD), nothing, nothing, {"frames": demos.num_frames})
    outcomes = Outcomes(demos.success, demos.episode_index)
    value_F = held_out_values(_inputs(encoded), outcomes, folds=config.folds, steps=config.value_steps, seed=seed)
    advantage_F = outcomes.advantages_F(value_F, config.steps_ahead)
    good = good_ones(advantage_F, _tasks(demos), config.good)
    if config.shuffled:
        good = good[np.random.default_rng(seed).permutation(len(good))]
    won_F, first = outcomes.won_E[outcomes.number_F], outcomes.elapsed_F == 0
    figures = {
        "episodes": len(outcomes.won_E),
        "successes": int(outcomes.won_E.sum()),
        "frames": demos.num_frames,
        "good": int(good.sum()),
        "good_of_successes": round(float(good[won_F].mean()), 3),
        "good_of_failures": round(float(good[~won_F].mean()), 3),
        "explained_variance": round(1 - float(np.var(outcomes.returns_F - value_F) / np.var(outcomes.returns_F)), 3),
        "auc_at_the_start": round(_auc(value_F[first], won_F[first]), 3),
        "auc": round(_auc(value_F, won_F), 3),
    }
    label_F = torch.from_numpy(np.where(good, GOOD, BAD)).float()
    return Judged(label_F, torch.from_numpy(value_F), torch.from_numpy(advantage_F), figures)


def judgement(out: Path) -> list[str]:
    """Lines for the console about how the logs of the run in `out` were judged; none for a run without."""
    if not (out / FIGURES).is_file():
        return []
    lines = []
    for name, told in load_json(out / FIGURES).items():
        if "episodes" not in told:
            continue
        lines.append(
            f"{name}: {told['successes']} of {told['episodes']} episodes succeeded, {told['good']} of "
            f"{told['frames']} frames are called good ({100 * told['good_of_successes']:.0f}% of those of successes, "
            f"{100 * told['good_of_failures']:.0f}% of failures)"
        )
        if told["explained_variance"] < _LEAST_EXPLAINED:
            lines.append(
                f"warning: {name}: of episodes that it has not seen the value model explains "
                f"{100 * told['explained_variance']:.0f}% of the returns' variance, so labels are little better than "
                "chance: record more episodes"
            )
    return lines


def _inputs(encoded: EncodedDemos) -> Tensor:
    """Inputs of the value model, (F, K): where the queries point, and the robot's state. Query states only where
    nothing is pointed at: a few hundred episodes are learnt by heart from those."""
    if (pointed := encoded.features.pointed_BQE) is not None:
        return torch.cat([pointed.flatten(1), encoded.proprio_FP], 1)
    parts = torch.arange(encoded.num_frames).split(_AT_ONCE)
    return torch.cat([row_of(encoded.features.select(rows).float(), encoded.proprio_FP[rows]) for rows in parts])


def _tasks(demos: DemoSet) -> list[str]:
    """Each frame's task, "" for those of too few episodes."""
    begins = np.flatnonzero(np.diff(demos.episode_index, prepend=demos.episode_index[0] - 1))
    episodes = Counter(demos.instruction[row] for row in begins)
    return [task if episodes[task] >= _FEWEST else "" for task in demos.instruction]


def _auc(score: NDArray[np.float64], won: NDArray[np.bool_]) -> float:
    """How often a success has the higher score of a success and a failure, ties as half."""
    order = np.argsort(np.argsort(score, kind="stable"), kind="stable") + 1.0
    wins, losses = int(won.sum()), int((~won).sum())
    return float((order[won].sum() - wins * (wins + 1) / 2) / (wins * losses))


class Labelled:
    """A source whose batches carry the labels of its frames."""

    def __init__(self, source: Source, label_F: Tensor) -> None:
        self._source, self._label_F = source, label_F

    @property
    def sizes(self) -> tuple[int, ...]:
        """Frames of each dataset, as of the source."""
        return self._source.sizes

    def weigh(self, frames: Tensor) -> float:
        """`Batch.weight` of these frames, as of the source."""
        return self._source.weigh(frames)

    def take(self, frames: Tensor) -> Batch:
        """The source's batch of these frames, with their labels."""
        return replace(self._source.take(frames), told_B=self._label_F[frames])


def labelled(
    vla: VLA,
    config: JudgeConfig | None,
    parts: Mapping[str, tuple[DemoSet, Source]],
    source: Source,
    out: Path,
    *,
    seed: int,
    begun: bool,
) -> Source:
    """The `source` of all these datasets with labels, if `config` asks for them; they are kept in `out`, where a run
    that was `begun` finds them. ValueError for a policy that cannot be told, and for logs that cannot be judged."""
    if config is None:
        return source
    if vla.config.advantage is None:
        raise ValueError("this policy cannot be told which actions were good: `vla train --init` makes one that can")
    if launched()[1] > 1:
        raise ValueError("episodes are judged in one process: leave out the others, or train without --advantage")
    if begun and (out / LABELS).is_file():
        label_F = load_tensors(out / LABELS)["label"]
        if len(label_F) != sum(source.sizes):
            raise ValueError(f"{out / LABELS} holds the labels of other frames: copy the run's own, or begin another")
        return Labelled(source, label_F)
    judged = {name: judge(part, encoded, config, seed=seed) for name, (part, encoded) in parts.items()}
    columns = {
        name: torch.cat([getattr(one, f"{name}_F").float() for one in judged.values()])
        for name in ("label", "value", "advantage")
    }
    save_tensors(out / LABELS, columns, {})
    save_json(out / FIGURES, {name: one.figures for name, one in judged.items()})
    return Labelled(source, columns["label"])


def telling(features: Features, batch: Batch, untold: float) -> Features:
    """The features with what the policy is told in this step: the labels, a share `untold` of them left out, drawn
    from torch's generator. As they are for a batch without labels."""
    if batch.told_B is None:
        return features
    kept = torch.rand_like(batch.told_B) >= untold
    return replace(features, advantage_B=torch.where(kept, batch.told_B, UNTOLD))
