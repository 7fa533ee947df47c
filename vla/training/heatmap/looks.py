"""Looks of many scenes, encoded once by the frozen backbone and kept in memory for the head to learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vla.backbones.features import TensorBatch
from vla.model.heatmap.head import Seen
from vla.model.heatmap.model import Cloud, HeatmapModel


@dataclass(frozen=True, eq=False)
class Lesson(TensorBatch):
    """B looks with what is to be learnt from each."""

    seen: Seen
    """In half precision."""
    centre_B3: Tensor
    """The cube that the look shows, in the robot's frame, m."""
    half_B: Tensor
    at_B3: Tensor
    """The place to find, in the robot's frame, m."""
    hand_B3: Tensor
    slot_B: Tensor
    """int64: the slot of `vla.model.heatmap.head.SLOTS` that is asked for; -1: the next keyframe."""
    state_BS: Tensor
    flags_BF: Tensor
    """The keyframe's `HeatmapConfig.flags`, 0 or 1; NaN where there are none to learn."""
    turn_B3: Tensor
    """int64: bins of the hand's orientation there (`vla.model.heatmap.rotation`); -1 where there are none."""

    def tensors(self) -> dict[str, Tensor]:
        """See `TensorBatch.tensors`; `seen` is a batch of its own."""
        return {name: tensor for name, tensor in super().tensors().items() if name != "seen"}

    def map(self, function: Callable[[Tensor], Tensor]) -> Lesson:
        """See `TensorBatch.map`."""
        return replace(super().map(function), seen=self.seen.map(function))

    @staticmethod
    def cat(parts: Sequence[Lesson]) -> Lesson:
        """One lesson of several."""
        seen = {name: torch.cat([part.seen.tensors()[name] for part in parts]) for name in parts[0].seen.tensors()}
        own = {name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
        return replace(parts[0], seen=replace(parts[0].seen, **seen), **own)


@dataclass(frozen=True)
class Task:
    """B scenes and what is to be found in each."""

    cloud: Cloud
    ids_BT: Tensor
    mask_BT: Tensor
    at_B3: Tensor
    hand_B3: Tensor
    slot_B: Tensor
    state_BS: Tensor
    flags_BF: Tensor
    turn_B3: Tensor


def encode(model: HeatmapModel, tasks: Iterator[Task], generator: torch.Generator, *, shift_m: float,
           on_scenes: Callable[[int], None] | None = None) -> Lesson:  # fmt: skip
    """Two looks at every scene: at the whole workspace, moved by up to `shift_m` along each axis, and at the
    surroundings of the place to find, moved by up to half of what they show."""
    parts, done = [], 0
    for task in tasks:
        batch = len(task.at_B3)

        def moved(reach: float, batch: int = batch) -> Tensor:
            return reach * (2 * torch.rand(batch, 3, generator=generator) - 1)

        centre, half = model.whole(batch)
        near = half / model.config.workspace.zoom
        for middle, size in ((centre + moved(shift_m), half), (task.at_B3 + moved(0.5 * float(near[0])), near)):
            seen = model.look(model.views(task.cloud, middle, size), task.ids_BT, task.mask_BT).map(Tensor.half)
            parts.append(
                Lesson(
                    seen,
                    middle,
                    size,
                    task.at_B3,
                    task.hand_B3,
                    task.slot_B,
                    task.state_BS,
                    task.flags_BF,
                    task.turn_B3,
                )  # fmt: skip
            )
        done += batch
        if on_scenes is not None:
            on_scenes(done)
    return Lesson.cat(parts)
