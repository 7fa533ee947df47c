"""A trained policy of ours as a teacher: its latent is what its action head reads."""

from __future__ import annotations

import torch
from torch import Tensor

from vla.data.fitting import check_demos
from vla.data.lerobot_dataset import DemoSet
from vla.model.advantage import refuse_guided
from vla.model.heads.registry import L1Head
from vla.model.model import VLA
from vla.training.distillation.teacher import Decoder


class PolicyTeacher:
    """A VLA that is asked about frames. A `vla.training.distillation.teacher.Teacher`.

    The latent is the bridge's and the decoder its action head. Beside a residual that RL trained, the latent is what
    the last layers of head and residual read, and the decoder is both layers in one.
    """

    def __init__(self, vla: VLA) -> None:
        """ValueError for a policy that cannot teach another one."""
        if vla.members:
            raise ValueError("a policy for several robots cannot be the teacher: give one of a single robot")
        if vla.pool is not None:
            raise ValueError("a policy with modulators cannot be the teacher: give the one that it was made from")
        if vla.config.distilled is not None:
            raise ValueError("this teacher was itself taught by --teacher: give the one that it learnt from")
        if vla.config.memory is not None:
            raise ValueError("a policy that remembers cannot be the teacher, which sees each frame alone: give another")
        refuse_guided(vla)
        if vla.refiner is not None and not isinstance(vla.head, L1Head):
            raise ValueError(
                f"the teacher's residual of RL stands beside head '{vla.config.head}': only beside l1 or linear are "
                "the two one decoder; give the policy from before RL"
            )
        if vla.processor.config.action_space is not None:
            raise ValueError(
                "the teacher predicts actions in a space of its own (--action-space), which no student's decoder "
                "knows: give a policy that was trained on them as recorded"
            )
        self.vla = vla.eval()
        self.chunk_size = vla.chunk_size
        self.action_names: tuple[str, ...] | None = vla.processor.config.action_names
        self.decoder = self._decoder()

    def _decoder(self) -> Decoder:
        vla = self.vla
        centre, half = vla.processor.action_affine
        if vla.refiner is None:
            tensors = {name: tensor.detach().cpu() for name, tensor in vla.head.state_dict().items()}
            return Decoder("head", vla.bridge.width, tensors, centre, half, head=vla.config.head)
        last, beside = vla.head.out, vla.refiner.net[-1]
        tensors = {
            "weight": torch.cat([last.weight, beside.weight], 1).detach().cpu(),
            "bias": (last.bias + beside.bias).detach().cpu(),
        }
        return Decoder("step", tensors["weight"].shape[1], tensors, centre, half)

    @torch.no_grad()
    def latents(self, demos: DemoSet, frames: slice) -> Tensor:
        """The teacher's latents (B, C, width) of these frames."""
        vla = self.vla
        if vla.config.xyz is not None and not demos.geometry:
            raise ValueError("the teacher reads depth, and the student does not: give it depth, too (vla train --xyz)")
        check_demos(vla.processor, demos)
        inp = vla.processor.prepare(demos.observation(frames)).to(vla.device)
        features = vla.encode(inp)
        if vla.refiner is None:
            return vla.latent(features, inp.proprio_BP).cpu()
        read = vla.condition(features, inp.proprio_BP)
        head, residual = vla.head, vla.refiner
        hidden = head.mlp(head.norm(read.latent_BCD)), residual.hidden(read, inp.proprio_BP)
        return torch.cat(hidden, -1).cpu()
