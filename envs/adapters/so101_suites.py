"""The SO-101 suites: one task, two blocks, one of them named. Imports nothing of the package that has the arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from envs.seeds import FIRST_EVALUATION_SEED
from envs.tabletop.language import Phrasings
from vla.core.types import PlanarSymmetry

CAMERAS = {"front": "near", "wrist": "wrist"}
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12), "green": (0.12, 0.65, 0.2), "blue": (0.15, 0.3, 0.85), "yellow": (0.95, 0.8, 0.1),
    "purple": (0.55, 0.2, 0.7), "white": (0.9, 0.9, 0.9),
}  # fmt: skip
WORDS: Mapping[Phrasings, tuple[str, ...]] = {
    "train": ("pick up {o}", "lift {o}", "take {o}", "grab {o}"),
    "heldout": ("please lift {o} up", "raise {o} from the table"),
}


@dataclass(frozen=True)
class SO101Suite:
    """Lifting the named block of two."""

    name: str = "so101-lift"
    description: str = "SO-101, joint positions in degrees at 30 Hz: lift the named one of two blocks"
    tasks: tuple[str, ...] = ("lift",)
    horizon: int = 240
    eval_seed0: int = FIRST_EVALUATION_SEED
    num_views: int = 2
    plane: PlanarSymmetry | None = None

    def summary(self, per_task: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """See `envs.tabletop.suites.AnySuite.summary`."""
        return {}


SUITES = {suite.name: suite for suite in (SO101Suite(),)}
