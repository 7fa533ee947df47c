"""Beside the reward, a teacher: after every update the policy is shown what the teacher would have done where it was.

The reward tells a policy seldom and vaguely what to do otherwise. With ten tasks in one policy hardly anything of it
is left in a step (docs/research-log.md); a teacher (`rl.teacher.state_teacher`) says it of every decision. Only in
simulation, as is the critic's state that it reads; and no further than the teacher itself, so one of few
demonstrations practises first (`rl.teacher.teacher_ppo`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rl.configs.teacher import GuideConfig
from rl.models.actor import GaussianChunkActor
from rl.models.policy_inputs import Conditions
from rl.storage.rollout_buffer import RolloutBuffer, require_finite
from rl.teacher.state_teacher import Teacher
from vla.runtime.distributed import Team


class Imitates(nn.Module):
    """(conditions, proprio, chunks (B, C, A)) -> mean L1 distance of the policy's mean from these chunks."""

    def __init__(self, actor: GaussianChunkActor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, conditions: Conditions, proprio_BP: Tensor, chunk_BCA: Tensor) -> Tensor:
        # the spread is nothing that the teacher knows of; where processes exchange gradients, each must have one
        return (self.actor.mean(conditions, proprio_BP) - chunk_BCA).abs().mean() + 0.0 * self.actor.log_std.sum()


class Guide:
    """Remembers decisions and what the teacher would have done, and takes supervised steps on them."""

    def __init__(
        self, actor: GaussianChunkActor, config: GuideConfig, *, generator: torch.Generator, team: Team | None = None
    ) -> None:
        if problem := config.problem():
            raise ValueError(problem)
        if actor.backbone_learns:
            raise ValueError("a guide remembers what the policy saw: it does not go with a learning backbone")
        self.actor, self.config, self.generator, self.team = actor, config, generator, team or Team()
        self.teacher: Teacher | None = None
        """Set by whoever has demonstrations, or a checkpoint."""
        self.parameters = [p for name, p in actor.named_policy_parameters() if name != "log_std"]
        self._imitates = self.team.wrap(Imitates(actor))
        self._optimiser = torch.optim.Adam(self.parameters, lr=config.lr)
        self.num_updates = 0
        self._capacity = max(1, config.memory // self.team.size)
        self._filled = self._next = 0
        self._conditions: Conditions | None = None
        self._rows: dict[str, Tensor] = {}
        self._saved: dict[str, Tensor] = {}

    def improve(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Remember a rollout's decisions, then the steps. NonFiniteError names a broken gradient before it acts."""
        config = self.config
        self._remember(buffer)
        left = max(0.0, 1.0 - self.num_updates / config.anneal_updates)
        for group in self._optimiser.param_groups:
            group["lr"] = config.lr * (config.lr_final + (1.0 - config.lr_final) * left)
        size, losses = max(1, config.minibatch_size // self.team.size), []
        for _ in range(config.steps):
            rows = torch.randint(self._filled, (size,), generator=self.generator).to(self.actor.device)
            loss = self._imitates(self._conditions.select(rows).float(), *(t[rows] for t in self._rows.values()))
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
            require_finite("grad (norm of the policy's, towards the teacher)", norm, f"in update {self.num_updates}")
            self._optimiser.step()
            losses.append(float(loss.detach()))
        self.num_updates += 1
        return {"teacher_distance": self.team.total(sum(losses) / len(losses))[0] / self.team.size}

    @torch.no_grad()
    def _remember(self, buffer: RolloutBuffer) -> None:
        assert self.teacher is not None, "a guide needs its teacher"
        state = buffer.flat("state")[:, :-1]  # the clock is nothing to a teacher
        rows = {"proprio": buffer.flat("proprio"), "chunk": self.teacher(state)}
        seen = buffer.kept_conditions
        if self._conditions is None:
            self._make_room(seen, rows)
        for start in range(0, buffer.size, self._capacity):
            part = torch.arange(start, min(start + self._capacity, buffer.size), device=state.device)
            # in two pieces where the ring's end comes between
            for piece in part.tensor_split([self._capacity - self._next]):
                if len(piece):
                    self._conditions.write(self._next, seen.select(piece))
                    for name, values in rows.items():
                        self._rows[name][self._next : self._next + len(piece)] = values[piece]
                    self._next = (self._next + len(piece)) % self._capacity
                    self._filled = min(self._capacity, self._filled + len(piece))

    def _make_room(self, seen: Conditions, rows: dict[str, Tensor]) -> None:
        self._conditions = seen.empty_like(self._capacity, dtype=torch.float16)
        self._rows = {name: values.new_empty((self._capacity, *values.shape[1:])) for name, values in rows.items()}
        for name, tensor in self._tensors().items():
            if name in self._saved:
                tensor[: self._filled] = self._saved[name].to(tensor)
        self._saved = {}

    def _tensors(self) -> dict[str, Tensor]:
        seen = {} if self._conditions is None else self._conditions.tensors()
        return {f"conditions.{name}": t for name, t in seen.items()} | self._rows

    def state(self) -> dict[str, Any]:
        """For an exact resume; the memory is this process's own."""
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
        """Inverse of `state`."""
        self._optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.num_updates, self._filled, self._next = state["num_updates"], state["filled"], state["next"]
        self._conditions, self._saved = None, dict(state["memory"])
