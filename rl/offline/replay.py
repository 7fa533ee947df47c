"""Transitions between observations that the frozen VLA has looked at once, and the returns that followed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl.offline.inputs import AgentInput


@dataclass(frozen=True)
class Transition:
    """M chunks that were executed."""

    now: AgentInput
    after: AgentInput
    """The observation `n_step` chunks later, or at the end of the episode."""
    action_BnA: Tensor
    """Normalised, within the action's bounds; zeros where the episode ended earlier."""
    executed_Bn: Tensor
    """Bool: True for the steps that were executed."""
    reward_B: Tensor
    """Discounted rewards until `after`."""
    discount_B: Tensor
    """gamma to the number of control steps until `after`; 0 where nothing follows."""
    returned_B: Tensor
    """Discounted rewards from here to the end of the episode."""


@dataclass
class Step:
    """One executed chunk of one environment, with inputs of one row each."""

    now: AgentInput
    action_nA: Tensor
    executed: int
    reward: float
    discount: float
    after: AgentInput


class Replay:
    """Room for `capacity` transitions, of which the oldest make place. Whole episodes are added: returns are known at
    their end. With `n_step` above 1, values come from so many chunks later: a sparse reward is sooner heard of."""

    def __init__(self, capacity: int, n_step: int = 1) -> None:
        if capacity < 1:
            raise ValueError(f"a replay needs room for at least one transition, got {capacity}")
        self.capacity, self.n_step, self.size, self.added = capacity, n_step, 0, 0
        self._now: AgentInput | None = None
        self._after: AgentInput | None = None
        self._rows: dict[str, Tensor] = {}

    def add_episode(self, steps: Sequence[Step]) -> None:
        """Store the chunks of one episode, in their order."""
        returned = [0.0] * (len(steps) + 1)
        for k in reversed(range(len(steps))):
            # Of a truncated episode nothing is known beyond its end: a lower bound, which is all Cal-QL asks for.
            returned[k] = steps[k].reward + steps[k].discount * returned[k + 1]
        for k, step in enumerate(steps):
            reward, discount, last = 0.0, 1.0, step
            for last in steps[k : k + self.n_step]:
                reward, discount = reward + discount * last.reward, discount * last.discount
            self._add(step, last.after, {"reward": reward, "discount": discount, "returned": returned[k]})

    def _add(self, step: Step, after: AgentInput, numbers: dict[str, float]) -> None:
        if self._now is None or self._after is None:
            self._now, self._after = (part.empty_like(self.capacity) for part in (step.now, after))
            shape = (self.capacity, *step.action_nA.shape)
            self._rows = {"action": torch.zeros(shape), "executed": torch.zeros(shape[:2], dtype=torch.bool)}
            self._rows |= {name: torch.zeros(self.capacity) for name in numbers}
        at = self.added % self.capacity
        self._now.write(at, step.now)
        self._after.write(at, after)
        executed = torch.arange(len(step.action_nA)) < step.executed
        self._rows["action"][at] = torch.where(executed[:, None], step.action_nA, 0.0)
        self._rows["executed"][at] = executed
        for name, value in numbers.items():
            self._rows[name][at] = value
        self.added += 1
        self.size = min(self.capacity, self.added)

    def sample(self, count: int, generator: torch.Generator) -> Transition:
        """Draw `count` transitions, with replacement. ValueError from an empty replay."""
        if not self.size:
            raise ValueError("the replay is empty: log episodes before learning from them")
        return self.rows(torch.randint(self.size, (count,), generator=generator))

    def rows(self, index: Tensor) -> Transition:
        """The transitions at these rows."""
        assert self._now is not None and self._after is not None
        return Transition(
            self._now.select(index), self._after.select(index), self._rows["action"][index],
            self._rows["executed"][index], *(self._rows[name][index] for name in ("reward", "discount", "returned")),
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Everything stored, to be saved."""
        if self._now is None or self._after is None:
            return {}
        rows = {name: tensor[: self.size] for name, tensor in self._rows.items()}
        for prefix, part in (("now.", self._now), ("after.", self._after)):
            rows |= {prefix + name: tensor[: self.size] for name, tensor in part.tensors().items()}
        return {name: tensor.contiguous() for name, tensor in rows.items()} | {"added": torch.tensor(self.added)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        if not tensors:
            return
        self.added = int(tensors["added"])
        self.size = min(self.capacity, self.added)

        def roomy(tensor: Tensor) -> Tensor:
            room = tensor.new_zeros((self.capacity, *tensor.shape[1:]))
            room[: len(tensor)] = tensor
            return room

        parts = [
            AgentInput(**{
                name.removeprefix(prefix): roomy(tensor) for name, tensor in tensors.items() if name.startswith(prefix)
            })
            for prefix in ("now.", "after.")
        ]  # fmt: skip
        self._now, self._after = parts
        self._rows = {name: roomy(t) for name, t in tensors.items() if "." not in name and name != "added"}


def mixed(first: Transition, second: Transition) -> Transition:
    """The transitions of both, one after the other."""

    def inputs(a: AgentInput, b: AgentInput) -> AgentInput:
        return AgentInput(**{name: torch.cat([tensor, b.tensors()[name]]) for name, tensor in a.tensors().items()})

    return Transition(
        inputs(first.now, second.now), inputs(first.after, second.after),
        *(
            torch.cat([getattr(first, name), getattr(second, name)])
            for name in ("action_BnA", "executed_Bn", "reward_B", "discount_B", "returned_B")
        ),
    )  # fmt: skip
