"""Commands that show what there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tyro.conf import Positional

from bascule.commands.base import Command, check_numbers
from vla.core.config import lookup

if TYPE_CHECKING:
    from vla.core.types import VecEnv


@dataclass(frozen=True)
class List(Command):
    """List suites, recipes or tasks."""

    what: Positional[str]
    """suites, recipes or tasks."""

    def run(self) -> None:
        from bascule.catalogue import LISTINGS
        from vla.runtime.console import stdout, table

        title, columns, rows = lookup(self.what, LISTINGS, "list")()
        stdout().print(table(title, columns, rows))


@dataclass(frozen=True)
class View(Command):
    """Draw scenes of a suite with their instructions, and film its expert at every task."""

    suite: Positional[str]
    out: Path | None = None
    """A folder for scenes.png and TASK.mp4. Default: runs/view/SUITE."""
    scenes: int = 12
    """In the picture; every task at least once."""
    seed: int = 0
    phrasings: Literal["train", "heldout", "novel"] = "train"
    perturb: tuple[str, ...] = ()
    """Worlds unlike those of training: AXIS=SEVERITY, as in `vla eval`."""
    films: bool = True
    image_size: int = 168
    workers: int = 2

    def run(self) -> None:
        from envs.registry import load_suite

        tasks = load_suite(self.suite).tasks
        check_numbers(self, scenes=(1, 10_000), seed=(0, 2**53), image_size=(8, 4096), workers=(1, 1024))
        from envs import make_vec
        from envs.perturb.perturbation import parse
        from vla.runtime.console import say
        from vla.runtime.contact_sheet import contact_sheet

        folder = self._out()
        env = make_vec(
            self.suite,
            len(tasks),
            num_workers=self.workers,
            image_size=self.image_size,
            phrasings=self.phrasings,
            perturb=parse(self.perturb) if self.perturb else None,
        )
        try:
            pictures, words = [], []
            for start in range(0, max(self.scenes, len(tasks)), len(tasks)):
                first = self.seed + start
                obs = env.reset(seeds=range(first, first + len(tasks)), tasks=tasks)
                pictures.append(np.concatenate(list(obs.images.values()), axis=2))
                words += obs.instruction
            shown = max(self.scenes, len(tasks))
            contact_sheet([np.concatenate(pictures)[:shown]], words[:shown], folder / "scenes.png")
            say(f"{shown} scenes in {folder / 'scenes.png'}")
            if self.films:
                failed = _film(env, self.suite, tasks, range(self.seed, self.seed + len(tasks)), folder)
                say(f"{len(tasks)} films in {folder}")
                if failed:
                    say(f"the expert failed at: {', '.join(failed)}")
        finally:
            env.close()

    def _out(self) -> Path:
        return self.out or Path("runs") / "view" / self.suite

    def writes(self) -> tuple[Path, ...]:
        return (self._out(),)


def _film(env: VecEnv, suite: str, tasks: tuple[str, ...], seeds: range, folder: Path) -> list[str]:
    """FOLDER/TASK.mp4 of the expert in every world of `env`, a frame per control step; returns the tasks it failed."""
    from envs.experts.registry import make_expert
    from vla.runtime.console import progress
    from vla.runtime.video import FilmWriter

    obs, expert = env.reset(seeds=seeds, tasks=tasks), make_expert(suite, env.num_envs)
    films = [FilmWriter(folder / f"{task}.mp4", env.action_spec.control_hz) for task in tasks]
    over, failed = np.zeros(env.num_envs, bool), []
    with progress("films", len(tasks), unit="tasks") as update:
        while not over.all():
            for k in np.flatnonzero(~over):
                films[k].add(np.concatenate([image[k] for image in obs.images.values()], axis=1))
            result = env.step_chunk(expert.act(obs)[:, :1])
            obs = result.obs
            for k in np.flatnonzero((result.terminated | result.truncated) & ~over):
                films[k].add(np.concatenate([image[k] for image in obs.images.values()], axis=1))
                films[k].close()
                over[k] = True
                failed += [] if result.info["success"][k] else [tasks[k]]
            update(int(over.sum()))
    return failed
