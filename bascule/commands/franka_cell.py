"""`vla franka-cell`: a simulated Franka arm that is driven as a real one is, over libfranka's own protocol."""

from __future__ import annotations

import importlib.util
import signal
from dataclasses import dataclass
from pathlib import Path

from bascule.commands.base import Command, check_numbers


@dataclass(frozen=True)
class FrankaCell(Command):
    """A test cell: an FR3 at the table of a tabletop suite, behind libfranka's network protocol. Runs until Ctrl-C."""

    suite: str = "tabletop-pick"
    """The tabletop suite whose scenes are laid out: one of `vla list suites`."""
    seed: int = 5_000_000
    """Seed of the scene."""
    host: str = "127.0.0.1"
    """Address of this machine on which the arm listens (ports 1337 and 1338). Another 127.0.0.x is another arm."""
    port: int = 7331
    """Port of the cameras' feed; 0 takes any free one."""
    fps: float = 20.0
    """Pictures per second of each camera."""
    image_size: int = 96
    """Height and width of the pictures in pixels."""
    speed: float = 1.0
    """Seconds of the cell's clock per second: below 1 for a machine that is too busy for libfranka's 1 kHz."""
    look: str = "hulls"
    """How the arm is drawn: hulls, as in the suites; fr3, by the meshes of the real one, 20 times slower."""

    film: Path | None = None
    """When the cell is closed (Ctrl-C), write a film of its last episode to this .webp file."""

    def run(self) -> int:
        if self.film is not None and self.film.suffix.lower() != ".webp":
            raise ValueError(f"--film {self.film} must end in .webp: an animated WebP is what it becomes")
        check_numbers(
            self, seed=(0, 2**53), port=(0, 65_535), fps=(0.1, 1000), image_size=(8, 4096), speed=(0.001, 1),
        )  # fmt: skip
        if importlib.util.find_spec("franky_sim") is None:
            raise ValueError("the package franky-sim is missing: ./run setup franka-sim")
        from bascule.commands.base import from_flags
        from bascule.franka_cell.cell import Cell, CellConfig

        cell = Cell(from_flags(CellConfig, self))
        print(
            f"an FR3 listens at {self.host}; the task is: {cell.verdict.instruction}\n"
            f"vla control POLICY --robot franka --task '{cell.verdict.instruction}' --robot-args host {self.host} "
            f"realtime false feed {cell.windows.address}",
            flush=True,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: cell.stop())
        cell.run()
        if self.film is not None:
            saved = cell.film.save(self.film, cell.verdict.instruction)
            print(f"film: {self.film}" if saved else "no film: the arm was not moved")
        return 0

    def writes(self) -> tuple[Path, ...]:
        """The film's file."""
        return () if self.film is None else (self.film,)
