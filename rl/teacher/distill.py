"""Distillation in addition to the reward: after every update the policy is trained towards the teacher's actions in the
states it visited (DAgger, Ross et al. 2011).

The reward says little about what to do instead. With ten tasks in one policy hardly anything of it is left in a step
(docs/research-log.md); a privileged teacher (`rl.teacher.state_teacher`) labels every decision. This works in
simulation only, and no further than the teacher itself, so one of few demonstrations is trained by PPO first
(`rl.teacher.teacher_ppo`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rl.configs.teacher import DistillConfig
from rl.models.actor import ChunkActor
from rl.models.policy_inputs import PolicyInput, storage_like
from rl.storage.rollout_buffer import RolloutBuffer, require_finite
from rl.teacher.state_teacher import Teacher
from vla.runtime.distributed import Team


class DistillationLoss(nn.Module):
    """Mean L1 distance of the policy's mean chunk from the teacher's, as a module so that processes share gradients."""

    def __init__(self, actor: ChunkActor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, inputs: PolicyInput, proprio_BP: Tensor, chunk_BCA: Tensor) -> Tensor:
        """Return the scalar loss, in normalised action units."""
        # the teacher has no spread; where processes exchange gradients, every parameter must have one
        return (self.actor.mean(inputs, proprio_BP) - chunk_BCA).abs().mean() + 0.0 * self.actor.spread.sum()


class Distillation:
    """Keeps the latest decisions with the teacher's actions, and takes supervised steps on them."""

    def __init__(
        self,
        actor: ChunkActor,
        teacher: Teacher,
        config: DistillConfig,
        *,
        generator: torch.Generator,
        team: Team | None = None,
    ) -> None:
        """`generator` draws the decisions. ValueError for an impossible configuration."""
        if problem := config.problem():
            raise ValueError(problem)
        self.actor, self.teacher, self.config = actor, teacher, config
        self.generator, self.team = generator, team or Team()
        self.parameters = [p for _, p in actor.named_policy_parameters() if p is not actor.spread]
        self._loss = self.team.wrap(DistillationLoss(actor))
        self._optimiser = torch.optim.Adam(self.parameters, lr=config.lr)
        self.num_updates = 0
        self._capacity = max(1, config.memory // self.team.size)
        self._filled = self._next = 0
        self._inputs: PolicyInput | None = None
        self._rows: dict[str, Tensor] = {}
        self._saved: dict[str, Tensor] = {}

    def improve(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Store a rollout's decisions, then take the steps; return metrics. NonFiniteError names a broken gradient
        before it acts."""
        config = self.config
        self._store(buffer)
        left = max(0.0, 1.0 - self.num_updates / config.anneal_updates)
        for group in self._optimiser.param_groups:
            group["lr"] = config.lr * (config.lr_final + (1.0 - config.lr_final) * left)
        size, losses = max(1, config.minibatch_size // self.team.size), []
        for _ in range(config.steps):
            rows = torch.randint(self._filled, (size,), generator=self.generator).to(self.actor.device)
            loss = self._loss(self._inputs.select(rows).float(), *(t[rows] for t in self._rows.values()))
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
            require_finite("grad (norm of the policy's, towards the teacher)", norm, f"in update {self.num_updates}")
            self._optimiser.step()
            losses.append(float(loss.detach()))
        self.num_updates += 1
        return {"teacher_distance": self.team.total(sum(losses) / len(losses))[0] / self.team.size}

    @torch.no_grad()
    def _store(self, buffer: RolloutBuffer) -> None:
        """Write a rollout into the ring of the latest decisions, with the teacher's chunks."""
        state = buffer.flat("state")[:, :-1]  # the teacher does not read the elapsed time
        rows = {"proprio": buffer.flat("proprio"), "chunk": self.teacher(state)}
        inputs = buffer.stored_inputs
        if self._inputs is None:
            self._make_room(inputs, rows)
        for start in range(0, buffer.size, self._capacity):
            part = torch.arange(start, min(start + self._capacity, buffer.size), device=state.device)
            # in two pieces where the ring's end comes between
            for piece in part.tensor_split([self._capacity - self._next]):
                if len(piece):
                    self._inputs.write(self._next, inputs.select(piece))
                    for name, values in rows.items():
                        self._rows[name][self._next : self._next + len(piece)] = values[piece]
                    self._next = (self._next + len(piece)) % self._capacity
                    self._filled = min(self._capacity, self._filled + len(piece))

    def _make_room(self, inputs: PolicyInput, rows: dict[str, Tensor]) -> None:
        self._inputs = storage_like(inputs, self._capacity)
        self._rows = {name: values.new_empty((self._capacity, *values.shape[1:])) for name, values in rows.items()}
        for name, tensor in self._tensors().items():
            if name in self._saved:
                tensor[: self._filled] = self._saved[name].to(tensor)
        self._saved = {}

    def _tensors(self) -> dict[str, Tensor]:
        inputs = {} if self._inputs is None else self._inputs.tensors()
        return {f"conditions.{name}": t for name, t in inputs.items()} | self._rows

    def state(self) -> dict[str, Any]:
        """Return the state for an exact resume; the replay memory is this process's own."""
        memory = {name: tensor[: self._filled].clone() for name, tensor in self._tensors().items()}
        return {
            "optimiser": self._optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "num_updates": self.num_updates,
            "filled": self._filled,
            "next": self._next,
            "memory": memory or self._saved,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.num_updates, self._filled, self._next = state["num_updates"], state["filled"], state["next"]
        self._inputs, self._saved = None, dict(state["memory"])
