"""One process, or several that train together (`accelerate launch` or `torchrun`): the same loop, the same gradient.

Batches are drawn alike by every process, which then computes its share. Copied models exchange gradients (DDP, through
`accelerate`); sharded ones keep a part of every parameter and of the optimiser each (FSDP2, torch's `fully_shard`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vla.core.waiting import usable_cores


def launched() -> tuple[int, int]:
    """This process's rank and the number of processes, as the launcher's environment says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launch(processes: int) -> NoReturn:
    """Become torchrun, which runs this very command `processes` times on this machine. ValueError below 1."""
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(usable_cores()) // processes)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    sys.stdout.flush()
    os.execv(sys.executable, [*torchrun, "-m", "bascule.main", *sys.argv[1:]])


def assemble(*, shard: bool, unused: bool = False) -> Team:
    """The team that the launcher's environment describes. `unused`: some parameters may get no gradient."""
    if launched()[1] == 1:
        return Team()
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise ValueError("training in several processes needs 'accelerate': install bascule[train]") from None
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # the model itself says which part computes in which precision
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )
    return _Shards(accelerator) if shard else _Copies(accelerator)


class Team:
    """A team of one: nothing is wrapped, sent or waited for."""

    rank, size = 0, 1

    def place(self, model: nn.Module) -> None:
        """Move the model to this process's device. Alone: wherever its caller has put it."""

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The module to call instead of `objective`. Its parameters may be other ones afterwards."""
        return objective

    def share(self, frames: Tensor) -> Tensor:
        """This process's part of a batch."""
        return frames[self.rank :: self.size]

    @contextmanager
    def part(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Around one accumulated part: gradients are exchanged at the last only."""
        yield

    def clip(self, parameters: Sequence[Tensor], max_norm: float) -> float:
        """Scale the gradients down to `max_norm` if theirs is larger; returns theirs."""
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))

    def total(self, *values: float) -> list[float]:
        """Sums over the processes."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """True if the flag is set in any process."""
        return self.total(float(flag))[0] > 0

    def wait(self) -> None:
        """Block until every process has arrived here."""


class _Processes(Team):
    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes

    def place(self, model: nn.Module) -> None:
        """Move the model to this process's device."""
        model.to(self._accelerator.device)

    def total(self, *values: float) -> list[float]:
        """Sums over the processes, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def wait(self) -> None:
        """Block until every process has arrived here."""
        self._accelerator.wait_for_everyone()


class _Copies(_Processes):
    def wrap(self, objective: nn.Module) -> nn.Module:
        """Wrap the objective in DistributedDataParallel."""
        return self._accelerator.prepare(objective)

    @contextmanager
    def part(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients at the last accumulated part only."""
        if last:
            yield
            return
        with self._accelerator.no_sync(wrapped):
            yield


class _Shards(_Processes):
    def wrap(self, objective: nn.Module) -> nn.Module:
        """Shard the objective's parameters over the processes (FSDP2), layer by layer."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._accelerator.device.type, (self.size,))
        scalars = {parameter for parameter in objective.parameters() if parameter.ndim == 0}  # cannot be sharded
        for stack in [module for module in objective.modules() if isinstance(module, nn.ModuleList)]:
            for layer in stack:  # gathered one at a time, and let go after use
                fully_shard(layer, mesh=mesh, ignored_params=scalars)
        return fully_shard(objective, mesh=mesh, ignored_params=scalars)

    @contextmanager
    def part(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients at the last accumulated part only."""
        wrapped.set_requires_gradient_sync(last)
        yield

    def clip(self, parameters: Sequence[Tensor], max_norm: float) -> float:
        """Scale the gradients down to `max_norm` if the norm over all shards is larger; returns that norm."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shards, copies = ([g for g in gradients if hasattr(g, "to_local") == sharded] for sharded in (True, False))
        for gradient in copies:  # FSDP2 has averaged its own only
            dist.all_reduce(gradient)
            gradient /= self.size
        squares = sum(float(g.to_local().double().square().sum()) for g in shards)
        norm = (self.total(squares)[0] + sum(float(g.double().square()) for g in copies)) ** 0.5
        for gradient in held(gradients):
            gradient *= min(1.0, max_norm / (norm + 1e-6))
        return norm


# ---------------------------------------------------------------------- whole tensors and shards of them
def whole(value: Any) -> Any:
    """Tensors of a (nested) state in full; shards are gathered, so every process must call this."""
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def held(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's shards of these tensors, as plain tensors that share their memory."""
    return [t.detach().to_local() if hasattr(t, "to_local") else t.detach() for t in tensors]


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out as `like`."""
    if not hasattr(like, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict(
        {name: part_of(value, own[name]) if name in own else value for name, value in tensors.items()}
    )


def load_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The same for an optimiser's state."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    moments = {
        number: {
            name: part_of(value, parameters[number]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": moments})
