"""Learning from corrections: which frames of a policy's corrected episodes count, and how often they are drawn.

A person watched a policy, took over when it went wrong, and handed back. What they did is the lesson: by default only
their frames are learnt, beside the demonstrations (HG-DAgger, Kelly et al. 2019), because the policy's own frames
before a take-over are what led into trouble, and those after it are what it can do already. Each stretch that a person
drove is then an episode of its own: a chunk of actions ends where they handed back.

The person's frames are few. They are drawn so often that they make up half of each batch, or another multiple of their
number is chosen (IWR, Mandlekar et al. 2020, which also learns all of the policy's frames: `policy_frames` "learn").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.data.findings import numbered
from vla.data.lerobot_dataset import INTERVENTION, DemoSet
from vla.model.model import VLA
from vla.training.sampling import drawn_often, mixed_frames
from vla.training.train_config import InterventionConfig, TrainConfig


def check_corrections(demos: Mapping[str, DemoSet]) -> None:
    """ValueError, one line, unless one of the datasets says in which frames a person drove, and in some they did."""
    told = {name: part.intervention for name, part in demos.items() if part.intervention is not None}
    if not told:
        raise ValueError(
            f"none of the datasets ({', '.join(demos)}) says where a person took over (feature {INTERVENTION}): record "
            "them with `vla control --teleop`, `vla demos --policy FOLDER --corrections`, or LeRobot's strategy dagger"
        )
    if not any(flags.any() for flags in told.values()):
        raise ValueError(f"in {', '.join(told)} nobody ever took over, so there is no correction to learn from")


def stretches(intervention_F: NDArray[np.bool_], episode_F: NDArray[np.int64]) -> NDArray[np.int64]:
    """(F,) number of the stretch that each frame belongs to: frames that follow one another in an episode, driven by
    the same."""
    changes = (np.diff(intervention_F) != 0) | (np.diff(episode_F) != 0)
    return np.concatenate([[0], np.cumsum(changes)])


def learnt[Demos: DemoSet | Mapping[str, DemoSet]](config: InterventionConfig | None, demos: Demos) -> Demos:
    """The datasets with the frames that are learnt. Of demonstrations, and without `config`, all."""
    if config is None:
        return demos
    if isinstance(demos, DemoSet):
        return learnt(config, {"corrections": demos})["corrections"]
    check_corrections(demos)
    kept = {}
    for name, part in demos.items():
        if part.intervention is not None and config.policy_frames == "leave":
            if not part.intervention.any():
                continue
            number = stretches(part.intervention, part.episode_index)
            apart = replace(part, episode_index=number)
            part = apart.subset(np.unique(number[part.intervention]).tolist())
        kept[name] = shuffled(part, config.shuffle_seed) if config.shuffle_seed is not None else part
    return kept


def demonstrated(demos: DemoSet) -> DemoSet:
    """The dataset as a teacher imitates it: of corrections, a person's frames. ValueError where nobody took over."""
    return demos if demos.intervention is None else learnt(InterventionConfig(), demos)


def shuffled(demos: DemoSet, seed: int) -> DemoSet:
    """The same frames, each of a person's with the action of another one of theirs: a control that must not help."""
    if demos.intervention is None:
        return demos
    rows, action = np.flatnonzero(demos.intervention), demos.action.copy()
    action[rows] = action[np.random.default_rng(seed).permutation(rows)]
    return replace(demos, action=action)


def frames_of_steps(cfg: TrainConfig, vla: VLA, demos: Mapping[str, DemoSet]) -> Callable[[int, Sequence[int]], Tensor]:
    """(step, frames of each dataset) -> the (batch_size,) frames of that step's batch."""
    if cfg.interventions is not None:
        drawn = Drawn(cfg.interventions, demos)
        return lambda step, sizes: drawn.frames(cfg.seed, step, cfg.batch_size)
    often = drawn_often(vla, demos)

    def frames(step: int, sizes: Sequence[int]) -> Tensor:
        moving = often if step < cfg.steps // 2 else None  # by then it moves, and shall not move too soon
        return mixed_frames(cfg.seed, step, cfg.batch_size, sizes, cfg.weights, moving)

    return frames


class Drawn:
    """Frames of a step's batch from several datasets, a person's drawn `config.weight` times as often as others."""

    def __init__(self, config: InterventionConfig, demos: Mapping[str, DemoSet]) -> None:
        flags = [np.zeros(p.num_frames, bool) if p.intervention is None else p.intervention for p in demos.values()]
        by_hand = np.concatenate(flags)
        groups = [np.flatnonzero(by_hand), np.flatnonzero(~by_hand)]
        self._groups = [torch.from_numpy(group) for group in groups if len(group)]
        human, others = (len(group) for group in groups)
        share = 0.5 if config.weight is None else config.weight * human / (config.weight * human + others)
        self.shares = [share, 1 - share] if len(self._groups) > 1 else [1.0]
        """Parts of a batch: the frames of the person, and the others."""

    def frames(self, seed: int, step: int, batch_size: int) -> Tensor:
        """(batch_size,) frames of a step, by their numbers over all datasets."""
        places = mixed_frames(seed, step, batch_size, [len(group) for group in self._groups], self.shares)
        return torch.cat(self._groups)[places]


def corrected_lines(config: InterventionConfig | None, demos: Mapping[str, DemoSet]) -> list[str]:
    """Lines for the console: whose frames are learnt, and warnings about corrections that are learnt like anything.
    ValueError as `check_corrections`."""
    lines = []
    if config is not None:
        check_corrections(demos)
        if config.policy_frames == "leave" and all(part.intervention is not None for part in demos.values()):
            told = "warning: there are no frames but a person's, so --intervention-weight changes nothing: give the "
            lines.append(f"{told}demonstrations, too (--dataset)")
    for name, part in demos.items():
        if part.intervention is None:
            continue
        human = int(part.intervention.sum())
        begun = len(np.unique(stretches(part.intervention, part.episode_index)[part.intervention]))
        told = f"{name}: {numbered(human, 'frame')} of {part.num_frames} by a person, who took over {begun} times"
        if config is None:
            told = f"warning: {told}: all are imitated alike; --intervention-weight half learns the person's"
        elif config.policy_frames == "leave":
            told += "; the policy's are left out"
        lines.append(told)
    return lines
