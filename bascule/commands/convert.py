"""`vla convert`: import policies published by others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from bascule.commands.base import Command, check_numbers
from vla.core.checkpoint import CONFIG
from vla.runtime.locks import refuse_used


@dataclass(frozen=True)
class Convert(Command):
    """Turn a published VLA-Adapter checkpoint (base or Pro) into a policy folder."""

    source: Positional[Path]
    """The published folder: action_head--*.pt, proprio_projector--*.pt, dataset_statistics.json."""
    backbone: str
    """The vision-language model it was trained with, as a name or folder that `vla train` would take."""
    out: Path = Path("runs/converted")
    """The folder for the policy."""
    cameras: tuple[str, ...] = ("front", "wrist")
    """Names of the camera views, in the order of the release: third person, then wrist."""
    chunk_size: int = 8
    """8 for LIBERO and CALVIN, 5 for Bridge, 25 for ALOHA."""
    control_hz: float = 20.0
    """Control steps a second for which the actions are meant."""
    dataset: str | None = None
    """Name of the dataset whose statistics to use, when the checkpoint holds several."""
    extremes: bool = False
    """Normalise by minimum and maximum (ALOHA) instead of quantiles."""

    def run(self) -> None:
        """Convert the published checkpoint and save it to `out`. ValueError without the source folder."""
        check_numbers(self, chunk_size=(1, 1000), control_hz=(0.01, 100_000))
        if len(set(self.cameras)) < len(self.cameras) or not all(name.strip() for name in self.cameras):
            raise ValueError(f"--cameras names every view once, in the order of the release, got {self.cameras}")
        if not self.source.is_dir():
            raise ValueError(f"there is no folder {self.source}")
        from vla.model.config import check_backbone

        check_backbone(self.backbone)
        refuse_used(self.out / CONFIG, self.out, "a policy", resume=None)
        from vla.model.released.convert import convert
        from vla.runtime.console import say

        vla = convert(
            self.source,
            backbone=self.backbone,
            cameras=self.cameras,
            chunk_size=self.chunk_size,
            control_hz=self.control_hz,
            dataset=self.dataset,
            extremes=self.extremes,
        )
        vla.save(self.out)
        shape = vla.config.bridge
        say(f"policy in {self.out}: released {shape.layout} layout, {shape.num_blocks} blocks of width {shape.width}")
