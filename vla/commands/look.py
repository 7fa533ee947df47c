"""Commands that show what there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vla.commands.base import Command
from vla.config import lookup


@dataclass(frozen=True)
class List(Command):
    """List suites, recipes or tasks."""

    what: Positional[str]
    """suites, recipes or tasks."""

    def run(self) -> None:
        from vla.catalogue import LISTINGS
        from vla.console import stdout, table

        title, columns, rows = lookup(self.what, LISTINGS, "list")()
        stdout().print(table(title, columns, rows))


@dataclass(frozen=True)
class View(Command):
    """Draw first scenes of a suite, with their instructions, as one picture."""

    suite: Positional[str]
    out: Path | None = None
    """A PNG file. Default: runs/SUITE.png."""
    scenes: int = 12
    seed: int = 0
    phrasings: Literal["train", "heldout"] = "train"

    def run(self) -> None:
        from envs.suites import load_suite

        load_suite(self.suite)
        from envs import make_vec
        from vla.console import say
        from vla.report import contact_sheet

        env = make_vec(self.suite, self.scenes, num_workers=1, image_size=168, phrasings=self.phrasings)
        try:
            obs = env.reset(seeds=range(self.seed, self.seed + self.scenes))
        finally:
            env.close()
        out = self.out or Path("runs") / f"{self.suite}.png"
        contact_sheet(list(obs.images.values()), obs.instruction, out)
        say(f"{self.scenes} scenes in {out}")
