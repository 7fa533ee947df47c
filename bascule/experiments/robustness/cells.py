"""Cells of a robustness table: one policy along one axis of `envs.perturb.perturbation` at one severity.

`vla eval --robustness` and `vla experiment robustness` play them. All cells of a table have the same scenes, so they
can be compared scene by scene; a cell is kept when it is done, in a file of its own. May import every package.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bascule.agents import AGENTS, resolve_policy
from bascule.experiments.arms import Row, kept, made_of, played_with
from vla.core.config import lookup, write_atomic

if TYPE_CHECKING:
    from envs.evaluation.evaluate import EvalReport
    from envs.evaluation.failures import Failures
    from envs.perturb.perturbation import Perturbation
    from vla.core.types import Policy, VecEnv

MAX_FAILURES = 3
"""Failed episodes of a cell whose pictures are kept."""
_GAP = 6
"""Pixels between the first and the last picture of a failure."""


@dataclass(frozen=True)
class Cell:
    """An axis at a severity; or plain scenes; or these with swapped instructions."""

    axis: str = "plain"
    severity: float = 0.0

    @property
    def name(self) -> str:
        """The cell's name in a table: "texture 0.5"."""
        return f"{self.axis} {self.severity:g}" if self.severity else self.axis

    @property
    def stem(self) -> str:
        """The name of the cell's files without their endings: "texture-0.5"."""
        return f"{self.axis.replace(' ', '-')}-{self.severity:g}"

    def perturbation(self) -> Perturbation | None:
        """How its scenes differ from plain ones; None where they do not."""
        from envs.perturb.perturbation import parse

        return parse([f"{self.axis}={self.severity!r}"]) if self.severity else None


PLAIN, SWAPPED = Cell(), Cell("swapped instruction")


def chosen_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """The axes, each once; all of them for none. ValueError with the nearest axis for an unknown one."""
    from envs.perturb.perturbation import AXES

    for axis in axes:
        lookup(axis, dict.fromkeys(AXES), "axis")
    return tuple(dict.fromkeys(axes)) or AXES


def plan(axes: Sequence[str], severities: Sequence[float], *, swapped: bool) -> list[Cell]:
    """The cells of a table, the plain one first and once: a severity of 0 adds none. ValueError for one outside 0..1,
    or for none above 0."""
    for severity in severities:
        if not 0.0 <= severity <= 1.0:
            raise ValueError(f"severities lie in 0..1, got {severity:g}")
    if not any(severities):
        raise ValueError("no severity is above 0: plain scenes are always played, name others to compare with")
    graded = [Cell(axis, severity) for axis in axes for severity in sorted({*severities} - {0.0})]
    return [PLAIN, *([SWAPPED] if swapped else []), *graded]


@dataclass(frozen=True)
class Setting:
    """A policy and its scenes: the same for all of its cells."""

    policy: str
    """A checkpoint's folder, or a name in `bascule.agents.AGENTS`."""
    suite: str = "tabletop-pick"
    episodes: int = 300
    seed0: int | None = None
    """The first scene's seed. None: the suite's first evaluation seed."""
    phrasings: Literal["train", "heldout", "novel"] = "train"
    embodiment: str | None = None
    num_envs: int = 48
    workers: int = 2
    backend: Literal["cpu", "warp"] = "cpu"
    device: str | None = None

    @property
    def seeds(self) -> range:
        """The scenes of every cell."""
        from envs.registry import load_suite

        first = load_suite(self.suite).eval_seed0 if self.seed0 is None else self.seed0
        return range(first, first + self.episodes)

    def asked(self) -> dict[str, Any]:
        """All that a row depends on. Where a setting is the default it is not named, as before there was a choice."""
        changed = {"phrasings": "train", "embodiment": None, "backend": "cpu", "seed0": None}
        more = {name: getattr(self, name) for name, default in changed.items() if getattr(self, name) != default}
        held = played_with(self.policy, self.suite)
        return {"suite": self.suite, "episodes": self.episodes, "policy": self.policy} | held | more


class Table:
    """Plays the cells of one policy and keeps their rows and pictures.

    The policy is loaded once, and only if a cell is missing. Environments are made anew only for another perturbation.
    A context: what it made is closed at its end.
    """

    def __init__(self, setting: Setting, folder: Path, prefix: str = "") -> None:
        """`folder`, `prefix`: rows lie in FOLDER/PREFIX-AXIS-SEVERITY.json, pictures beside them."""
        self.setting, self._folder = setting, folder
        self._prefix = f"{prefix}-" if prefix else ""
        self._asked, self._made = setting.asked(), made_of(setting.policy, setting.suite)
        self._loaded: Policy | None = None
        self._env: VecEnv | None = None
        self._drawn: Perturbation | None = None
        """The perturbation of `_env`."""

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def file(self, cell: Cell, ending: str = ".json") -> Path:
        """The file of a cell's row, or of something else that is kept beside it."""
        return self._folder / f"{self._prefix}{cell.stem}{ending}"

    def row(self, cell: Cell, on_episode: Callable[[int, int], None] | None = None) -> Row:
        """The cell's counts and what `vla eval` reports of it; `outcomes` by scene; and `failures`, with pictures.

        A cell that cannot be played has no episodes, and says in `refused` why. `on_episode(finished, successes)`
        follows it. ValueError where the folder holds rows of other settings.
        """
        if problem := self._problem(cell):
            return self._refused(cell, problem)
        return kept(self.file(cell), self._asked, partial(self._play, cell, on_episode))

    def _problem(self, cell: Cell) -> str | None:
        from envs.make import unperturbable
        from envs.registry import load_suite

        return unperturbable(load_suite(self.setting.suite), cell.perturbation(), self.setting.backend)

    def _refused(self, cell: Cell, reason: str) -> Row:
        from envs.evaluation.evaluate import Count

        place = {"axis": cell.axis, "severity": cell.severity, "wrong_object": 0}
        return Count().to_dict() | place | {"refused": reason}

    def _play(self, cell: Cell, on_episode: Callable[[int, int], None] | None) -> Row:
        from envs.evaluation.failures import Failures

        began = time.monotonic()
        solved = None if cell == PLAIN else _solved(self.row(PLAIN))
        failures = Failures(0 if cell == SWAPPED else MAX_FAILURES, solved)  # to fail is right where words are swapped
        report = self._evaluated(cell, failures, on_episode)
        film = report.films[0]
        write_atomic(self.file(cell, ".png"), picture(film.frames[0], film.caption))
        found = []
        for number, failure in enumerate(failures.kept, start=1):
            gap = np.full((len(failure.first), _GAP, 3), 255, np.uint8)
            strip = np.concatenate([failure.first, gap, failure.last], axis=1)
            file = self.file(cell, f"-failure-{number}.png")
            write_atomic(file, picture(strip, failure.instruction))
            found.append(
                {
                    "seed": self.setting.seeds[failure.episode], "instruction": failure.instruction,
                    "outcome": failure.outcome, "picture": file.name,
                    "solved_plain": None if solved is None else bool(solved[failure.episode]),
                }
            )  # fmt: skip
        place = {"axis": cell.axis, "severity": cell.severity, "seconds": round(time.monotonic() - began, 1)}
        outcomes = "".join(outcome[0] for outcome in report.outcomes)
        more = {"phrasings": self.setting.phrasings, "outcomes": outcomes, "failures": found}
        return report.to_dict() | self._made | place | more

    def _evaluated(self, cell: Cell, failures: Failures, on_episode: Callable[[int, int], None] | None) -> EvalReport:
        from envs.evaluation.evaluate import evaluate

        setting, env = self.setting, self._scenes(cell)
        policy = resolve_policy(setting.policy, env, setting.suite) if self._loaded is None else self._loaded
        return evaluate(
            policy, env, setting.seeds, name=setting.policy, suite=setting.suite, backend=setting.backend,
            swap_instruction=cell == SWAPPED, num_films=1, failures=failures,
            on_progress=None if on_episode is None else lambda done, _, won: on_episode(done, won),
        )  # fmt: skip

    def _scenes(self, cell: Cell) -> VecEnv:
        from envs import make_vec
        from envs.sim.render_options import drawn_for
        from vla.core.compatibility import fitted
        from vla.runtime.console import say

        setting, perturb = self.setting, cell.perturbation()
        new = None
        if self._loaded is None and setting.policy not in AGENTS:
            new = self._loaded = resolve_policy(setting.policy, None, setting.suite, setting.embodiment)
        if self._env is None or self._drawn != perturb:
            self._close()
            self._env = make_vec(
                setting.suite, min(setting.num_envs, setting.episodes), num_workers=setting.workers,
                phrasings=setting.phrasings, backend=setting.backend, device=setting.device, perturb=perturb,
                **drawn_for(self._loaded),
            )  # fmt: skip
            self._drawn = perturb
        if new is not None:
            self._loaded = fitted(new, self._env, say=say)
        return self._env

    def _close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def _solved(row: Row) -> np.ndarray | None:
    """(episodes,) the scenes in which the row's episodes succeeded; None for a row of an earlier version."""
    return np.array([letter == "s" for letter in row["outcomes"]]) if "outcomes" in row else None


def against(row: Row, plain: Row) -> tuple[int, int] | None:
    """Scenes that the policy solves only in the plain row, and those that it solves only in this one; None where a row
    does not say."""
    here, there = _solved(row), _solved(plain)
    return None if here is None or there is None else (int((there & ~here).sum()), int((here & ~there).sum()))


def picture(pixels_HWC: np.ndarray, instruction: str) -> bytes:
    """A PNG that holds the instruction, too."""
    words, file = PngInfo(), io.BytesIO()
    words.add_text("instruction", instruction)
    Image.fromarray(pixels_HWC).save(file, "PNG", pnginfo=words)
    return file.getvalue()
