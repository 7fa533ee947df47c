"""The ways in which a policy of some tasks learns further ones, each from demonstrations of that task alone.

Every policy is kept in its folder, and an interrupted run goes on where it was. May import every package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vla.core.checkpoint import CONFIG
from vla.model.config import ModulatorConfig

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet
    from vla.model.model import VLA
    from vla.training.train_config import TrainConfig

ALONE = ModulatorConfig(count=1, known_keys=0)
"""One set of low-rank matrices, without keys."""


@dataclass(frozen=True)
class Curriculum:
    """The demonstrations of one seed: of the tasks that are known, and of those that come one after another."""

    known: DemoSet
    new: dict[str, DemoSet]
    first: TrainConfig
    """How the known tasks are learnt."""
    later: TrainConfig
    """How each new task is learnt; the model's shape in it is not read."""
    later_lr: float
    """The learning rate of low-rank matrices, which takes the place of that in `later`."""
    folder: Path

    def known_policy(self) -> Path:
        """The policy that has learnt the known tasks together."""
        from vla.backbones.hub import load as load_backbone
        from vla.training.train import build_vla

        def untrained() -> VLA:
            backbone = load_backbone(self.first.model.backbone, num_views=len(self.known.images))
            return build_vla(self.first, self.known, backbone=backbone)

        return _learnt(self.first, untrained, self.known, self.folder / "known")

    def one_after_another(self, arm: str, pool: ModulatorConfig | None) -> list[Path]:
        """The policy after each new task: wholly fine-tuned (None), or with a pool of modulators."""
        from vla.training.modulation import extend

        before, found = self.known_policy(), []
        config = self.later if pool is None else replace(self.later, lr=self.later_lr)
        for number, (task, demos) in enumerate(self.new.items()):

            def begun(before: Path = before, first: bool = number == 0) -> VLA:
                known = {"known": self.known} if first and pool is not None and pool.known_keys else {}
                model = _loaded(before)
                extend(model, pool if first else None, known, seed=self.later.seed)
                return model

            before = _learnt(config, begun, demos, self.folder / f"{arm}-{number}-{task}")
            found.append(before)
        return found


def owners(stages: list[Path], tasks: list[str]) -> dict[int, str]:
    """Which task each modulator has learnt most of, from the policies after each of the tasks."""
    import torch

    counts = torch.stack([_loaded(stage).pool.counts_M for stage in stages])
    gained = torch.diff(counts, dim=0, prepend=torch.zeros_like(counts[:1]))
    return {m: tasks[int(gained[:, m].argmax())] for m in counts[-1].nonzero().flatten().tolist()}


def _loaded(folder: Path) -> VLA:
    from vla.model.model import VLA

    return VLA.load(folder)


def _learnt(config: TrainConfig, begun: Callable[[], VLA], demos: DemoSet, folder: Path) -> Path:
    """The folder of the policy that has learnt these; KeyboardInterrupt when it was stopped on the way."""
    from vla.model.model import VLA
    from vla.training.train import train

    there = (folder / CONFIG).exists()
    model = VLA.load(folder, merge=False) if there else begun()
    if train(replace(config, model=model.config), model, demos, folder, resume=there).interrupted:
        raise KeyboardInterrupt
    return folder
