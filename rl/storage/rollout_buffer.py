"""The decisions of one update, preallocated; the output of the frozen part of the model is computed once and kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rl.models.policy_inputs import PolicyInput, storage_like


class NonFiniteError(FloatingPointError):
    """A NaN or infinity was met; the message names what held it and where."""


def require_finite(name: str, tensor: Tensor, where: str) -> None:
    """NonFiniteError naming `name` when any entry of a float tensor is NaN or infinite."""
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(f"{name} is not finite ({bad} of {tensor.numel()} entries) {where}")


@dataclass(frozen=True)
class PolicyBatch:
    """A minibatch of M decisions for the policy loss."""

    inputs: PolicyInput
    proprio_BP: Tensor
    action: Tensor
    """The unclipped sample: the normalised chunk (M, C, A), the denoising chain that led to it (M, K + 1, C, A), or the
    tokens (M, C, A) that stand for it."""
    executed_BC: Tensor
    log_prob: Tensor
    """(M,), or (M, C, A) where every token has a ratio of its own."""
    advantage_B: Tensor


class Transitions:
    """Decisions in rows, from which minibatches are drawn."""

    def __init__(self) -> None:
        self._inputs: PolicyInput | None = None
        self._rows: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Rows to learn from."""
        raise NotImplementedError

    @property
    def advantages_B(self) -> Tensor:
        """(size,) one per row."""
        raise NotImplementedError

    def inputs(self, index: Tensor | slice) -> PolicyInput:
        """Return the policy inputs of these rows, in float32."""
        return self.stored_inputs.select(index).float()

    @property
    def stored_inputs(self) -> PolicyInput:
        """The policy inputs of all rows, in the precision they are kept in."""
        assert self._inputs is not None, "no inputs were put"
        return self._inputs

    def flat(self, name: str) -> Tensor:
        """Return (rows, ...) of a field given to `add`."""
        return self._rows[name]

    def parts(self, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the index tensors of one epoch, every row once, in `count` parts, some empty where there are fewer
        rows."""
        # nearly equal parts: a small remainder batch would take as large a step from far noisier gradients
        order = torch.randperm(self.size, generator=generator).to(self.flat("proprio").device)
        yield from order.tensor_split(count)

    def policy_batch(self, index: Tensor) -> PolicyBatch:
        """Return the rows in `index` for the policy loss. Advantages must have been set."""
        take = {name: self._rows[name].index_select(0, index) for name in ("proprio", "action", "executed", "log_prob")}
        return PolicyBatch(
            inputs=self.inputs(index),
            proprio_BP=take["proprio"],
            action=take["action"],
            executed_BC=take["executed"],
            log_prob=take["log_prob"],
            advantage_B=self.advantages_B.index_select(0, index),
        )


class RolloutBuffer(Transitions):
    """T decisions in each of N environments. Decision t of environment i is row t * N + i."""

    def __init__(self, num_decisions: int, num_envs: int) -> None:
        super().__init__()
        if num_decisions < 1 or num_envs < 1:
            raise ValueError(f"need at least one decision and one environment, got {num_decisions} x {num_envs}")
        self.num_decisions, self.num_envs = num_decisions, num_envs
        self.filled = 0
        self.advantages_TN: Tensor | None = None

    @property
    def size(self) -> int:
        """Rows T * N."""
        return self.num_decisions * self.num_envs

    @property
    def advantages_B(self) -> Tensor:
        """(size,) one per row."""
        assert self.advantages_TN is not None, "set the advantages first"
        return self.advantages_TN.reshape(-1)

    def clear(self) -> None:
        """Forget the transitions, keep the memory."""
        self.filled = 0
        self.advantages_TN = None

    @property
    def full(self) -> bool:
        """True once T decisions were added."""
        return self.filled == self.num_decisions

    def put_inputs(self, inputs: PolicyInput) -> PolicyInput:
        """Store the policy inputs (N rows) of the next decision; return them as every later epoch will see them.

        Hidden states are kept in float16 and handed out in float32. The rollout acts on the rounded values too, else
        the ratio would not start at 1.
        """
        self._require_room()
        where = f"from the frozen model in decision {self.filled} of the rollout"
        for name, tensor in inputs.tensors().items():
            require_finite(f"obs (features {name})", tensor, where)
        if self._inputs is None:
            self._inputs = storage_like(inputs, self.size)
        start = self.filled * self.num_envs
        self._inputs.write(start, inputs)
        return self._inputs.select(slice(start, start + self.num_envs)).float()

    def add(
        self,
        *,
        proprio_BP: Tensor,
        action: Tensor,
        executed_BC: Tensor,
        log_prob: Tensor,
        state_BS: Tensor,
        next_state_BS: Tensor,
        reward: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        n_steps: Tensor,
    ) -> None:
        """Store one decision of every environment, after `put_inputs`. RuntimeError when full; NonFiniteError names
        NaNs.

        `action` is the unclipped normalised sample, or tokens; `next_state_BS` the critic's input in the state the
        chunk really ended in (for a finished episode its final state, not the next episode's first).
        """
        self._require_room()
        where = f"in decision {self.filled} of the rollout"
        for name, tensor in (
            ("obs (proprio)", proprio_BP),
            ("obs (privileged/critic state)", state_BS),
            ("obs (privileged/critic state after the chunk)", next_state_BS),
            ("action", action),
            ("reward", reward),
        ):
            require_finite(name, tensor, where)
        row = {
            "proprio": proprio_BP,
            "action": action,
            "executed": executed_BC,
            "log_prob": log_prob,
            "state": state_BS,
            "next_state": next_state_BS,
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
            "n_steps": n_steps,
        }
        start = self.filled * self.num_envs
        for name, value in row.items():
            if len(value) != self.num_envs:
                raise ValueError(f"{name} has {len(value)} rows, the buffer holds {self.num_envs} environments")
            if name not in self._rows:
                self._rows[name] = torch.empty((self.size, *value.shape[1:]), dtype=value.dtype, device=value.device)
            self._rows[name][start : start + self.num_envs].copy_(value)
        self.filled += 1

    def _require_room(self) -> None:
        if self.full:
            raise RuntimeError(f"the rollout buffer overflows: it holds {self.num_decisions} decisions; clear() first")

    def time_major(self, name: str) -> Tensor:
        """Return a (T, N, ...) view of a field given to `add`."""
        rows = self._rows[name]
        return rows.view(self.num_decisions, self.num_envs, *rows.shape[1:])

    def parts(self, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the index tensors of one epoch in `count` parts. RuntimeError unless full."""
        if not self.full:
            raise RuntimeError(f"the rollout holds only {self.filled} of {self.num_decisions} decisions; fill it first")
        yield from super().parts(count, generator)
