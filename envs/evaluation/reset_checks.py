"""Random resets that must all be sound: no exception, nothing that is not finite, nothing fallen off or through.

`vla doctor --resets N` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from envs.backends.cpu_worlds import TabletopWorlds
from envs.registry import load_suite
from envs.seeds import Stream
from envs.tabletop.language import Phrasings
from envs.tabletop.scene import SCENES

_SETTLE_STEPS = 10
_SUNK_M = 0.006
"""A centre this much below its height at rest: the object is not on the table."""
_SHIFTED_M = 0.01
_WORLDS = 25


@dataclass
class Soundness:
    """Counts over `resets` of one suite; all but the first and the last two must be 0."""

    resets: int = 0
    exceptions: int = 0
    not_finite: int = 0
    below_table: int = 0
    """Resets after which an object that takes part sank or fell within half a second of standing still."""
    shifted: int = 0
    """Resets after which one moved by more than a centimetre: it had been put into something."""
    lowest_m: float = 0.0
    """Lowest height of any object's centre, relative to its height at rest, metres."""
    first_error: str = ""

    @property
    def sound(self) -> bool:
        """True if every reset passed."""
        return not (self.exceptions or self.not_finite or self.below_table or self.shifted)


def check_resets(
    suites: Sequence[str],
    resets: int,
    *,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Soundness]:
    """Reset each suite `resets` times with random seeds, phrasings and tasks; count what is wrong after settling."""
    rng = np.random.default_rng([seed, Stream.RESET_CHECK])
    report: dict[str, Soundness] = {}
    for name in suites:
        suite, found = load_suite(name), Soundness()
        choices: tuple[Phrasings, ...] = ("train", "heldout", "novel") if SCENES[suite.scene].fixtures else (
            "train", "heldout",
        )  # fmt: skip
        worlds = TabletopWorlds(suite, min(_WORLDS, resets))
        worlds.render_images = False
        while found.resets < resets:
            worlds.source.phrasings = choices[rng.integers(len(choices))]
            _check_once(worlds, rng, found)
            if on_progress:
                on_progress(name, found.resets, resets)
        worlds.close()
        report[name] = found
    return report


def _check_once(worlds: TabletopWorlds, rng: np.random.Generator, found: Soundness) -> None:
    n = worlds.num_envs
    found.resets += n
    tasks = [worlds.suite.tasks[k] for k in rng.integers(len(worlds.suite.tasks), size=n)]
    try:
        worlds.reset(seeds=[int(s) for s in rng.integers(2**31, size=n)], tasks=tasks)
        before = worlds.state.objects.copy()
        still = np.zeros((n, _SETTLE_STEPS, 4), np.float32)
        still[:, :, 3] = 1.0
        worlds.step_chunk(still)
    except Exception as error:  # whatever it is, it is what this function counts
        found.exceptions += n
        found.first_error = found.first_error or repr(error)
        return
    state = worlds.state
    finite = np.array([bool(np.isfinite(d.qpos).all() and np.isfinite(d.qvel).all()) for d in worlds.data])
    found.not_finite += int((~finite).sum())
    height = np.where(state.active, state.objects[:, :, 2] - state.rest_height, 0.0)
    found.lowest_m = min(found.lowest_m, float(np.nanmin(height)))
    found.below_table += int((height < -_SUNK_M).any(1).sum())
    moved = np.linalg.norm(state.objects[:, :, :2] - before[:, :, :2], axis=-1)
    found.shifted += int((state.active & (moved > _SHIFTED_M)).any(1).sum())
