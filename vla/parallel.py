"""One process, or several that train together (`accelerate launch` or `torchrun`): the same loop, the same gradient.

Batches are drawn alike by every process, which then computes its share. DDP copies the model; FSDP2 shards it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Team:
    """A team of one: nothing is wrapped, sent or waited for."""

    rank, size = 0, 1
    sharded = False

    def place(self, model: nn.Module) -> None:
        """Move the model to this process's device. Alone: wherever its caller has put it."""

    def prepare(self, objective: nn.Module, optimiser: torch.optim.Optimizer) -> nn.Module:
        """The module to call instead of `objective`."""
        return objective

    def share(self, frames: Tensor) -> Tensor:
        """This process's part of a batch."""
        return frames[self.rank :: self.size]

    @contextmanager
    def part(self, objective: nn.Module, last: bool) -> Iterator[None]:
        """Around one accumulated part: gradients are exchanged at the last only."""
        yield

    def total(self, *values: float) -> list[float]:
        """Sums over the processes."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self.total(float(flag))[0] > 0

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter, gradient or optimiser moment in full (sharded ones are gathered: every process must call)."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state with whole tensors."""
        return {name: self.whole(tensor) for name, tensor in model.state_dict().items()}

    def wait(self) -> None:
        """Until every process is here."""


class _Processes(Team):
    """Several processes, through `accelerate`."""

    def __init__(self, *, shard: bool, wrap: Sequence[type[nn.Module]], unused: bool) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
        except ImportError:
            raise ValueError("training in several processes needs 'accelerate': install bascule[train]") from None
        plugin = None
        if shard:
            names = [kind.__name__ for kind in wrap]
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=names,
                reshard_after_forward=True,
            )
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",  # the model itself says which part computes in which precision
            fsdp_plugin=plugin,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
        self.rank, self.size, self.sharded = self._accelerator.process_index, self._accelerator.num_processes, shard

    def place(self, model: nn.Module) -> None:
        model.to(self._accelerator.device)

    def prepare(self, objective: nn.Module, optimiser: torch.optim.Optimizer) -> nn.Module:
        return self._accelerator.prepare(objective, optimiser)[0]

    @contextmanager
    def part(self, objective: nn.Module, last: bool) -> Iterator[None]:
        if last:
            yield
            return
        with self._accelerator.no_sync(objective):
            yield

    def total(self, *values: float) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def launched() -> tuple[int, int]:
    """This process's rank and the number of processes, as the launcher's environment says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def assemble(*, shard: bool, wrap: Sequence[type[nn.Module]] = (), unused: bool = False) -> Team:
    """The team that the launcher's environment (WORLD_SIZE) describes. `unused`: some parameters may get no gradient.

    `wrap`: kinds of layers that are sharded one by one.
    """
    if launched()[1] > 1:
        return _Processes(shard=shard, wrap=wrap, unused=unused)
    return Team()
