"""Teachers by their folder: a policy of ours, the privileged teacher of an RL run, or a policy of LeRobot's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vla.core.compatibility import require_same
from vla.core.config import load_json
from vla.core.types import PolicySpec
from vla.training.distillation.teacher import Decoder

if TYPE_CHECKING:
    from rl.teacher.state_teacher import Teacher as StateNetwork
    from vla.data.lerobot_dataset import DemoSet
    from vla.processing.processor import Processor
    from vla.training.distillation.teacher import Teacher


def load_teacher(folder: Path) -> Teacher:
    """The teacher in a folder, whichever of the three it holds. ValueError naming what is wrong with it."""
    from policies.load import checkpoint

    if (folder / "last" / "config.json").is_file():
        return _privileged(folder)
    config = folder / "config.json"
    described = load_json(config) if config.is_file() else None
    if isinstance(described, dict) and "checkpoint" not in described and "type" in described:
        if described["type"] == "bascule":
            checkpoint(folder)  # which says how it becomes a policy of ours
        from policies.lerobot.teacher import LeRobotTeacher

        return LeRobotTeacher(folder)
    from vla.model.model import VLA
    from vla.training.distillation.own_policy import PolicyTeacher

    if isinstance(described, dict) and "export" in described:
        raise ValueError(f"{folder} is a folder of `vla export`, a graph without latents: give what it was made from")
    return PolicyTeacher(VLA.load(checkpoint(folder)))


def check_same_suite(folder: Path, dataset: Path) -> None:
    """ValueError where a privileged teacher learnt another suite than these demonstrations were recorded in: what its
    numbers of the simulator's state mean differs from suite to suite, also where there are as many."""
    run = folder / "last" / "config.json"
    learnt, shown = load_json(run).get("suite") if run.is_file() else None, recorded_suite(dataset)
    if learnt and shown and Path(learnt).stem != Path(shown).stem:
        raise ValueError(
            f"the privileged teacher learnt {learnt}, the demonstrations are of {shown}, where the simulator's state "
            f"means something else: give some of {learnt}, or the run's policy ({folder / 'best'}) as the --teacher"
        )


def recorded_suite(dataset: Path) -> str | None:
    """The suite that `vla demos` recorded a dataset in; None for what others have recorded."""
    told = dataset / "meta" / "bascule.json"
    return load_json(told).get("suite") if told.is_file() else None


def refuse_other_suite(dataset: Path, suite: str) -> None:
    """ValueError where a run in `suite` is given demonstrations of another one, whose tasks are not all its own:
    what learns from them, such as a teacher of the simulator's state, takes numbers of other tasks as well."""
    from envs.registry import load_suite, scenes_digest
    from vla.runtime.console import say

    shown = recorded_suite(dataset)
    if shown is None:
        return
    if Path(shown).stem == Path(suite).stem:
        was, now = load_json(dataset / "meta" / "bascule.json").get("scenes"), scenes_digest(suite)
        if was != now and (was is not None or Path(shown).suffix != Path(suite).suffix):
            say(f"warning: --demos {dataset} was recorded in other scenes than {suite} describes now: a teacher learns "
                "the tasks as they were then")  # fmt: skip
        return
    named = load_json(dataset / "meta" / "bascule.json").get("tasks")
    try:
        tasks = set(named.split() if named else load_suite(shown).tasks)
    except ValueError:
        return  # a suite of one's own that is no longer there: nothing tells what its tasks were
    if not tasks <= set(load_suite(suite).tasks):
        raise ValueError(
            f"--demos {dataset} holds demonstrations of {shown}, the run is in {suite}: other tasks would be "
            f"learnt; record some with `vla demos {suite}`"
        )


class PrivilegedTeacher:
    """The privileged network of online RL, which reads the simulator's state that demonstrations recorded in one hold.

    Its latent is what the last layers of its networks read, for a whole chunk; the decoder is the mean of these layers.
    """

    def __init__(self, network: StateNetwork, processor: Processor) -> None:
        """`processor`: that of the policy whose actions it was taught in."""
        self.network = network
        self.chunk_size = network.chunk_size
        self.action_names: tuple[str, ...] | None = processor.config.action_names
        self._reads = PolicySpec(proprio_names=processor.config.proprio_names)
        last = [net[-1] for net in network.nets]
        tensors = {
            "weight": torch.cat([layer.weight for layer in last], 1).detach() / len(last),
            "bias": torch.stack([layer.bias for layer in last]).detach().mean(0),
        }
        self.decoder = Decoder("chunk", tensors["weight"].shape[1], tensors, *processor.action_affine)

    @torch.no_grad()
    def latents(self, demos: DemoSet, frames: slice) -> Tensor:
        """The networks' last hidden states (B, width) in these frames. ValueError without the simulator's state."""
        if demos.privileged is None:
            raise ValueError(
                "the teacher reads the simulator's state, which these demonstrations do not hold: record them with "
                "`vla demos`, or give the run's policy (its folder 'best') as the --teacher"
            )
        told = PolicySpec(proprio_names=demos.proprio_names)
        require_same(self._reads, told, where="demonstrations", remedy="give demonstrations in the teacher's order")
        proprio = demos.proprio if demos.exact_proprio is None else demos.exact_proprio
        state = np.concatenate([demos.privileged[frames], proprio[frames]], 1, dtype=np.float32)
        known = len(self.network.shift)
        if state.shape[1] != known:
            raise ValueError(
                f"the teacher reads {known} numbers of the simulator's state, the demonstrations hold "
                f"{state.shape[1]}: give demonstrations of its suite"
            )
        seen = self.network.standardised(torch.from_numpy(state) @ self.network.view)
        return torch.cat([net[:-1](seen) for net in self.network.nets], -1)


def _privileged(folder: Path) -> PrivilegedTeacher:
    """The teacher that an RL run with a `guide` has kept."""
    from rl.configs.teacher import TeacherConfig
    from rl.run_checkpoint import TEACHER
    from rl.teacher.state_teacher import Teacher as StateNetwork
    from vla.core.checkpoint import load_checkpoint
    from vla.core.config import decode
    from vla.model.model import VLA

    saved = load_checkpoint(folder / "last", trainer=False)
    tensors = {name.removeprefix(TEACHER): t for name, t in saved.tensors.items() if name.startswith(TEACHER)}
    if not tensors:
        raise ValueError(f"the run in {folder} had no privileged teacher: give its policy, {folder / 'best'}")
    if not (folder / "best" / "config.json").is_file():
        raise ValueError(f"the run in {folder} has not kept a policy yet: continue it with --resume first")
    vla = VLA.load(folder / "best")
    config = decode(TeacherConfig, saved.config["guide"]["teacher"])
    return PrivilegedTeacher(StateNetwork.from_tensors(tensors, vla.chunk_size, config), vla.processor)
