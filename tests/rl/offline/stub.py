"""A frozen policy without pictures: the agent's input is made by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rl.offline.inputs import AgentInput
from vla.core.types import ActionSpec

STEPS, ACTIONS = 2, ("dx", "gripper")


class Residual(nn.Module):
    """Adds one learnt number for each action component, whatever is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(len(ACTIONS)))

    def forward(self, latents, proprio_BP: Tensor) -> Tensor:
        return self.shift.expand(len(proprio_BP), STEPS, len(ACTIONS))


class StubVLA(nn.Module):
    action_spec = ActionSpec(ACTIONS, (-1.0, -1.0), (1.0, 1.0), 20.0)

    def __init__(self) -> None:
        super().__init__()
        self.refiner: Residual | None = None

    @property
    def processor(self) -> StubVLA:
        return self

    def add_refiner(self, width: int, *, seed: int) -> None:
        self.refiner = self.refiner or Residual()

    def normalise_action(self, action: Tensor) -> Tensor:
        return action


def seen(numbers: list[int], states: int = 4) -> AgentInput:
    """States by their numbers, one-hot in the proprio; the imitation policy stands still."""
    hot = torch.eye(states)[numbers]
    count = len(numbers)
    return AgentInput(
        torch.zeros(count, STEPS, 2), torch.zeros(count, 2), torch.zeros(count, 0), hot,
        torch.zeros(count, STEPS, len(ACTIONS)),
    )  # fmt: skip
