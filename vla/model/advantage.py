"""A policy that is told whether its actions shall be good ones: RECAP's conditioning on the advantage.

Physical Intelligence 2025, "pi*0.6: a VLA that learns from experience" (arXiv 2511.14759). Episodes of mixed quality
are imitated, each chunk with a label that says whether it did better than was to be expected
(`vla.training.advantage`). Asked for good actions, the policy does what it has seen work. The label is one learnt
vector that is added to the robot's state as the bridge embeds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vla.backbones.features import Features
from vla.model.config import AdvantageConfig, model_problem

GOOD, UNTOLD, BAD = 1.0, 0.0, -1.0
"""Words about its actions that a policy can be told."""


class AdvantageToken(nn.Module):
    """GOOD or BAD -> a vector; UNTOLD is no vector. Both are 0 until learnt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.good_D = nn.Parameter(torch.zeros(width))
        self.bad_D = nn.Parameter(torch.zeros(width))
        self.asked = GOOD
        """Word that the policy is told where nobody says anything, as in evaluation, on a server or in an export."""

    def forward(self, told_B: Tensor | None) -> Tensor:
        """(B, width) of what each observation's policy is told; (1, width) of what it is asked for if None."""
        if told_B is None:
            told_B = self.good_D.new_full((1,), self.asked)
        told_B1 = told_B.to(self.good_D)[:, None]
        return told_B1.clamp(min=0) * self.good_D + (-told_B1).clamp(min=0) * self.bad_D


def add_advantage(vla: Any, config: AdvantageConfig) -> None:
    """Make a trained policy (a `vla.model.model.VLA`) one that can be told. Its actions stay what they are, whatever it
    is told, until it learns; one that has been told before stays as it is. ValueError for one that cannot."""
    if vla.config.advantage is not None:
        return
    changed = replace(vla.config, advantage=config)
    if problem := model_problem(changed):
        raise ValueError(problem)
    if vla.refiner is not None:
        raise ValueError("this policy was refined by RL; imitation of its logs would train its head past the refiner")
    vla.bridge.advantage = AdvantageToken(vla.bridge.width).to(vla.device)
    vla.config = changed


def guided(vla: Any, features: Features, proprio_BP: Tensor, asked_BCA: Tensor) -> Tensor:
    """The action `guidance` times as far from what the policy does untold as what it does when `asked`. Classifier-free
    guidance (Ho and Salimans 2022) on the actions themselves."""
    weight = vla.config.advantage.guidance
    if weight == 1.0:
        return asked_BCA
    untold = replace(features, advantage_B=asked_BCA.new_full((len(asked_BCA),), UNTOLD))
    untold_BCA = vla.act_on(vla.condition(untold, proprio_BP), proprio_BP)
    return untold_BCA + weight * (asked_BCA - untold_BCA)
