"""The grounding sets on which a backbone is pre-trained from nothing: a table, and what of it is still to be made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from envs.grounding.generate import generate, labelled_randomisation
from vla.core.disk import free_bytes, size_words, temporary

_STRONG = ("strong", "texture=0:1")
_TEN = (*("tabletop-ten",) * 4, "tabletop-object")
_ROBOSUITE = (
    *("robosuite-lift",) * 3, "robosuite-stack", "robosuite-can", "robosuite-square", "robosuite-door",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One set of the mixture."""

    name: str
    """Its folder's name, which stands in front of its figures, too."""
    scenes: int
    seed: int
    share: float
    """How often training draws from it; the shares of all parts need not add up to one."""
    suites: tuple[str, ...] = ()
    """See `envs.grounding.generate.generate`; none: shapes and plates."""
    randomise: tuple[str, ...] = ()
    """Words of `vla ground-data --randomise`; none: scenes as they are."""
    extra: str = ""
    """The simulator to install for it, where it needs another than the tabletop's."""


MIXTURE: tuple[Part, ...] = (
    Part("pick-randomised", 30_000, seed=601, share=0.40, randomise=_STRONG),
    Part("pick-plain", 8_000, seed=602, share=0.12),
    Part("ten-randomised", 20_000, seed=603, share=0.23, suites=_TEN, randomise=_STRONG),
    Part("ten-plain", 5_000, seed=604, share=0.07, suites=_TEN),
    Part(
        "robosuite-randomised", 5_000, seed=606, share=0.10, suites=_ROBOSUITE, randomise=_STRONG, extra="robosuite"
    ),
    Part(
        "metaworld-randomised", 4_000, seed=607, share=0.08, suites=("metaworld-mt50",), randomise=_STRONG,
        extra="metaworld",
    ),
)  # fmt: skip
"""The sets that taught the backbone `small` that ships, drawn as in the first of its two stages (research-log.md)."""

_VIEWS, _LABEL_BYTES = 2, 1000
"""Pictures of a scene, and the size of its points and its words (964 bytes on average)."""


@dataclass(frozen=True)
class Plan:
    """The sets to train on, each in a folder of its name in `folder`, and those of them that are still to be made."""

    folder: Path
    image_size: int
    parts: tuple[Part, ...]
    missing: tuple[Part, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of all parts."""
        return tuple(self.folder / part.name for part in self.parts)

    def nbytes(self) -> int:
        """Room that the missing sets take on disk, about."""
        scenes = sum(part.scenes for part in self.missing)
        return scenes * (_VIEWS * self.image_size * self.image_size * 3 + _LABEL_BYTES)

    def make(self, part: Part, num_workers: int, on_progress: Callable[[int, int], None] | None = None) -> Path:
        """Render a part. Its folder, which appears when it is complete."""
        return generate(
            part.scenes,
            self.folder / part.name,
            suites=part.suites,
            seed=part.seed,
            num_workers=num_workers,
            image_size=self.image_size,
            perturb=labelled_randomisation(part.randomise),
            on_progress=on_progress,
        )


def planned(
    folder: Path, image_size: int, scenes: int | None = None, *, without: Iterable[str] = (), at_least: int = 1
) -> Plan:
    """How to make the mixture in `folder`, with pictures of `image_size` pixels, without the parts of some extras.

    `scenes`: number of scenes in all, of which every part keeps its share; it has `at_least` so many. What is left out
    is not made up for: the other sets are the same ones with it and without. ValueError, before anything is made, for a
    set that is there with other scenes or pictures, a simulator that is not installed and a disk that is too small.
    """
    factor = 1.0 if scenes is None else scenes / sum(part.scenes for part in MIXTURE)
    parts = tuple(
        replace(part, scenes=max(at_least, round(factor * part.scenes)))
        for part in MIXTURE
        if not part.extra or part.extra not in without
    )
    missing = tuple(part for part in parts if not _made(part, folder / part.name, image_size))
    for part in missing:
        if part.extra and find_spec(part.extra) is None:
            raise ValueError(
                f"{part.name} needs {part.extra}, which is not installed: `./run setup {part.extra}`, or pre-train "
                f"without its scenes (--without {part.extra})"
            )
        temporary(folder / part.name)  # removes what a killed run left of this set, which will be made anew
    plan = Plan(folder, image_size, parts, missing)
    if (needed := plan.nbytes()) > (free := free_bytes(folder)):
        raise ValueError(
            f"the scenes need {size_words(needed)} and {size_words(free)} are free where {folder} lies: make fewer "
            "(--scenes), or choose a folder elsewhere (--out)"
        )
    return plan


def _made(part: Part, place: Path, image_size: int) -> bool:
    """True for a part whose set is there. ValueError for one with other scenes or pictures."""
    if not place.exists():
        return False
    if (found := _pictures(place)) != (part.scenes, image_size):
        holds = "no pictures" if found is None else f"{found[0]:,} scenes of {found[1]} pixels"
        raise ValueError(
            f"{place} holds {holds}, not {part.scenes:,} of {image_size}: repeat the --scenes and --image-size that "
            "made it, or choose another folder (--out)"
        )
    return True


def _pictures(folder: Path) -> tuple[int, int] | None:
    """(scenes, pixels of a side) of a grounding set; None for a folder that is none."""
    file = folder / "images.npy"
    if not file.is_file() or not (folder / "questions.json").is_file():
        return None
    shape = np.load(file, mmap_mode="r").shape
    return shape[0], shape[2]
