"""A policy that is told whether its actions shall be good ones: RECAP's conditioning on the advantage.

Physical Intelligence 2025, "pi*0.6: a VLA that learns from experience" (arXiv 2511.14759). Episodes of mixed quality
are imitated, each chunk with a label that says whether it did better than was to be expected
(`vla.training.advantage`). Asked for good actions, the policy does what it has seen work. What makes an action good
depends on where things are: each label has a small network of places and state, whose output is added to the robot's
state as the bridge embeds it. (One vector for each label changed next to nothing; docs/research-log.md.)
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


class AdvantageStem(nn.Module):
    """(GOOD or BAD, where the queries point and the robot's state) -> a vector, 0 until learnt; none when UNTOLD."""

    def __init__(self, seen: int, width: int) -> None:
        """`seen`: numbers that it reads of places and state."""
        super().__init__()
        hidden = 2 * width
        self.read = nn.Sequential(nn.Linear(seen, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.good = nn.Linear(hidden, width)
        self.bad = nn.Linear(hidden, width)
        for last in (self.good, self.bad):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.asked = GOOD
        """Word that the policy is told where nobody says anything, as in evaluation, on a server or in an export."""

    def forward(self, told_B: Tensor | None, seen_BS: Tensor) -> Tensor:
        """(B, width) of what each observation's policy is told; of what it is asked for if None."""
        if told_B is None:
            told_B = torch.full_like(seen_BS[:, 0], self.asked)
        told_B1 = told_B.to(seen_BS)[:, None]
        hidden = self.read(seen_BS)
        return told_B1.clamp(min=0) * self.good(hidden) + (-told_B1).clamp(min=0) * self.bad(hidden)


def add_advantage(vla: Any, config: AdvantageConfig, *, seed: int) -> None:
    """Make a trained policy (a `vla.model.model.VLA`) one that can be told. Its actions stay what they are, whatever it
    is told, until it learns; one that has been told before keeps what it has learnt. ValueError for one that cannot."""
    changed = replace(vla.config, advantage=config)
    if problem := model_problem(changed):
        raise ValueError(problem)
    if vla.refiner is not None:
        raise ValueError("this policy was refined by RL; imitation of its logs would train its head past the refiner")
    if vla.bridge.advantage is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vla.bridge.advantage = vla.bridge.advantage_stem().to(vla.device)
    vla.config = changed


def refuse_guided(vla: Any) -> None:
    """ValueError for a policy whose actions are guided, for whoever takes those of its head for its own."""
    config = getattr(getattr(vla, "config", None), "advantage", None)
    if config is not None and config.guidance != 1:
        raise ValueError(
            f"this policy is guided {config.guidance:g} times as far as good actions are (--guidance), which would be "
            "lost here: improve it with `vla train --init POLICY --advantage --guidance 1` first, or begin with the "
            "policy from before that"
        )


def guided(vla: Any, features: Features, proprio_BP: Tensor, asked_BCA: Tensor) -> Tensor:
    """The action `guidance` times as far from what the policy does untold as what it does when `asked`. Classifier-free
    guidance (Ho and Salimans 2022) on the actions themselves."""
    weight = vla.config.advantage.guidance
    if weight == 1.0:
        return asked_BCA
    untold = replace(features, advantage_B=torch.full_like(asked_BCA[:, 0, 0], UNTOLD))
    untold_BCA = vla.act_on(vla.condition(untold, proprio_BP), proprio_BP)
    return untold_BCA + weight * (asked_BCA - untold_BCA)
