"""Vision-language data with ground truth from the simulator: rendered scenes, questions, answers and points.

Written as a folder of arrays that `vla/training/grounding/pretrain.py` reads (it may not import this package):
`images.npy` (S, V, H, W, 3) uint8; `questions.json` S lists of M [prompt, answer] pairs; `points.npy` (S, M, 2, 3 + 3V)
float32: for the object and the place that the prompt names, its position relative to the workspace centre in metres,
then (u, v, visible) per view, u right and v down in [-1, 1]; NaN where the prompt names none; `grip.npy` (S, 3).
With depth, for the pre-training of heat-maps, also `depth.npy` (S, V, H, W) uint16 in millimetres, `intrinsics.npy` (S,
V, 3, 3) and `extrinsics.npy` (S, V, 4, 4), and `centre.npy` (S, 3), what positions are relative to.
Idea: BridgeVLA's heat-map pre-training, on the simulator's own labels.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np

from envs.adapters.libero_suites import LiberoSuite, interpreter
from envs.adapters.metaworld_suites import MetaworldSuite
from envs.adapters.robosuite_suites import RobosuiteSuite
from envs.backends.other_python import pool_in
from envs.backends.worker import worker_environment
from envs.grounding.jobs import GEOMETRY, Request, make_scenes
from envs.make import worlds_class
from envs.perturb.borrowed_models import borrowed_problem
from envs.perturb.perturbation import Perturbation, randomisation
from envs.registry import load_suite
from envs.tabletop.scene import SCENES
from envs.tabletop.suites import Suite
from vla.core.disk import remove, reserve, temporary, writing
from vla.core.subprocesses import pool
from vla.core.types import IMAGE_SIZE
from vla.runtime.locks import locked
from vla.runtime.rendering_backend import check

QUESTIONS_PER_SCENE = 8
_SCENES_PER_TASK = 500


def _check_suite(name: str, perturb: Perturbation | None, depth: bool) -> None:
    """ValueError unless suite `name` can be asked about: its tasks are goals, or another simulator's."""
    suite = load_suite(name)
    if isinstance(suite, LiberoSuite) and perturb is not None:
        raise ValueError(
            f"suite {name!r} cannot be randomised: make its scenes in a set of their own, without --randomise"
        )
    if depth and not isinstance(suite, Suite):
        raise ValueError(f"suite {name!r} gives no depth with its scenes: leave it out, or --depth")
    if isinstance(suite, RobosuiteSuite | MetaworldSuite | LiberoSuite):
        worlds_class(suite)  # says what is missing
        if perturb is not None and (problem := borrowed_problem(perturb, name)):
            raise ValueError(problem)
    elif not isinstance(suite, Suite) or not SCENES[suite.scene].fixtures:
        raise ValueError(f"suite {name!r} has no goals to ask about; leave it out (pick and place are the default set)")


def labelled_randomisation(words: Iterable[str]) -> Perturbation | None:
    """The randomisation that `words` name (`envs.perturb.perturbation.randomisation`), without camera shake, since
    labels are where the picture was, and without other words, since training itself paraphrases the questions. None for
    no words. ValueError where these two are asked for by name."""
    words = tuple(words)
    for word in words:
        axis, _, value = word.partition("=")
        if axis in ("motion", "instruction") and value.strip("0.:"):
            why = "labels are where the picture was" if axis == "motion" else "training says the questions anew itself"
            raise ValueError(f"the axis {axis} is not for this set, {why}: leave {word} out")
    return replace(randomisation(words), motion=0.0, instruction=0.0) if words else None


def generate(
    scenes: int,
    out: Path,
    *,
    suites: Sequence[str] = (),
    seed: int = 0,
    num_workers: int = 2,
    image_size: int = IMAGE_SIZE,
    perturb: Perturbation | None = None,
    depth: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `scenes` labelled scenes to the folder `out` (atomically: it appears when complete).

    `suites`: of these suites in turn, which have goals (`envs.grounding.goal_scenes`) or are another simulator's
    (`envs.grounding.expert_scenes`); a name given twice has twice the share. None: shapes and plates. `perturb`
    randomises looks and sensors, and the layouts of the tabletop's; the pictures are `image_size` pixels square.
    `depth`: with depth and calibration, of the tabletop's only.
    ValueError for any other suite, and for a shaking camera: its pictures are not where the labels are.
    """
    if perturb is not None and (problem := perturb.problem()):
        raise ValueError(problem)
    if perturb is not None and perturb.on("motion"):
        raise ValueError("the axis motion moves pictures away from their labels: set motion=0")
    for name in suites:
        _check_suite(name, perturb, depth)
    if len({isinstance(load_suite(name), LiberoSuite) for name in suites}) > 1:
        raise ValueError("LIBERO's scenes are made in its own environment: make a set of these and another of the rest")
    if out.exists():
        raise ValueError(f"{out} exists: give another --out, or remove it")
    check(probe=True)  # a pool would start workers that cannot draw again and again
    with locked(out):
        for left in out.parent.glob(f".{glob.escape(out.name)}.[0-9]*"):  # by a run that was killed
            shutil.rmtree(left)
        request = Request(tuple(suites), seed, image_size, perturb, depth)
        return _generate(request, scenes, out, num_workers, on_progress)


def _generate(
    request: Request,
    scenes: int,
    out: Path,
    num_workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    work = temporary(out)
    try:
        with writing(out):
            return _fill(request, work, scenes, out, num_workers, on_progress)
    finally:
        remove(work)


def _shape(name: str, views: int, size: int) -> tuple[int, ...]:
    """A scene's part of an array of `GEOMETRY`."""
    each = {"depth": (views, size, size), "intrinsics": (views, 3, 3), "extrinsics": (views, 4, 4), "centre": (3,)}
    return each[name]


def _fill(
    request: Request,
    work: Path,
    scenes: int,
    out: Path,
    num_workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> Path:
    work.mkdir()
    views, size = 2, request.image_size
    for name, kind, shape in (
        ("images", np.uint8, (scenes, views, size, size, 3)),
        ("points", np.float32, (scenes, QUESTIONS_PER_SCENE, 2, 3 + 3 * views)),
        ("grip", np.float32, (scenes, 3)),
        *((name, kind, (scenes, *_shape(name, views, size))) for name, kind in GEOMETRY.items() if request.depth),
    ):
        np.lib.format.open_memmap(work / f"{name}.npy", "w+", kind, shape).flush()
        reserve(work / f"{name}.npy")
    jobs = [
        (request, start, min(_SCENES_PER_TASK, scenes - start), str(work))
        for start in range(0, scenes, _SCENES_PER_TASK)
    ]
    done = 0
    theirs = any(isinstance(load_suite(name), LiberoSuite) for name in request.suites)
    with worker_environment(), pool_in(interpreter(), num_workers) if theirs else pool(num_workers) as workers:
        for job in as_completed([workers.submit(make_scenes, job) for job in jobs]):
            done += job.result()
            if on_progress:
                on_progress(done, scenes)
    texts = [text for path in sorted(work.glob("texts-*.json")) for text in json.loads(path.read_text())]
    (work / "questions.json").write_text(json.dumps(texts))
    for path in work.glob("texts-*.json"):
        path.unlink()
    os.replace(work, out)
    return out
