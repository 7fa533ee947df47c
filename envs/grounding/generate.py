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

import functools
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from envs.adapters.metaworld_suites import MetaworldSuite
from envs.adapters.robosuite_suites import RobosuiteSuite
from envs.backends.worker import worker_environment
from envs.grounding.expert_scenes import RobosuiteSampler
from envs.grounding.goal_scenes import GoalSampler
from envs.grounding.metaworld_scenes import MetaworldSampler
from envs.grounding.scene_sampler import PosingSampler, Question, SceneSampler
from envs.make import worlds_class
from envs.perturb.borrowed_models import borrowed_problem
from envs.perturb.perturbation import Perturbation, randomisation
from envs.registry import load_suite
from envs.seeds import Stream
from envs.tabletop.episodes import WORKSPACE_X, WORKSPACE_Y, Episode
from envs.tabletop.goals import Goal, GoalKind
from envs.tabletop.language import KIND_WORDS, instruction, object_phrase, plate_phrase
from envs.tabletop.scene import COLORS, REST_HEIGHT_M, SCENES
from envs.tabletop.shapes import PLATE_RADIUS_M, PLATE_THICKNESS_M
from envs.tabletop.suites import Suite
from vla.core.disk import remove, reserve, temporary, writing
from vla.core.subprocesses import pool
from vla.core.types import IMAGE_SIZE
from vla.runtime.locks import locked
from vla.runtime.rendering_backend import check

QUESTIONS_PER_SCENE = 8
_SCENES_PER_TASK = 500
_GEOMETRY = {"depth": np.uint16, "intrinsics": np.float32, "extrinsics": np.float32, "centre": np.float32}
"""Arrays of a set with depth."""
_SUITE = Suite("grounding", "", "tabletop", ("pick", "place"), 3, 2, 1, 0)
_HALF_WIDTH_M = {"cube": 0.02, "can": 0.018, "brick": 0.014}


def _layout(rng: np.random.Generator, count: int, gaps: np.ndarray) -> np.ndarray | None:
    """(count, 2) positions whose pairwise distance exceeds the sum of their gaps, or None."""
    placed: list[np.ndarray] = []
    for k in range(count):
        for _ in range(60):
            p = np.array([rng.uniform(WORKSPACE_X[0] - 0.03, WORKSPACE_X[1] + 0.03),
                          rng.uniform(WORKSPACE_Y[0] - 0.03, WORKSPACE_Y[1] + 0.03)])  # fmt: skip
            if all(np.linalg.norm(p - q) > gaps[k] + gaps[j] for j, q in enumerate(placed)):
                placed.append(p)
                break
        else:
            return None
    return np.array(placed).reshape(-1, 2)


def _random_episode(rng: np.random.Generator, kinds: tuple[str, ...]) -> Episode:
    while True:
        count, plates = int(rng.integers(2, 5)), int(rng.choice([0, 1, 2], p=[0.35, 0.15, 0.5]))
        slots = rng.permutation(len(kinds))[:count]
        colors = rng.permutation(list(COLORS))[:count] if rng.random() < 0.7 else rng.choice(list(COLORS), count)
        if len({(c, kinds[s]) for c, s in zip(colors, slots, strict=True)}) < count:
            continue  # two red cubes: no phrase would name one of them
        plate_colors = rng.permutation(list(COLORS))[:plates]
        gaps = np.array([PLATE_RADIUS_M + 0.008] * plates + [0.036] * count)
        xy = _layout(rng, plates + count, gaps)
        if xy is None:
            continue
        yaws = rng.uniform(-0.9, 0.9, count)
        return Episode(
            seed=int(rng.integers(1 << 31)), task="pick", slots=tuple(int(s) for s in slots),
            colors=tuple(str(c) for c in colors),
            poses=tuple((float(x), float(y), float(w)) for (x, y), w in zip(xy[plates:], yaws, strict=True)),
            plate_colors=tuple(str(c) for c in plate_colors),
            plate_xy=tuple((float(x), float(y)) for x, y in xy[:plates]),
            target=int(slots[0]), plate=-1, instruction="", template="", swapped_instruction="",
            goals=(Goal(GoalKind.LIFT, int(slots[0])),),
        )  # fmt: skip


class _PickPlaceSampler(PosingSampler):
    """Shapes and plates, as in the pick and place suites."""

    def scene(self, rng: np.random.Generator) -> list[Question]:
        """See `SceneSampler.scene`."""
        episode, held, on = self.paint(rng)
        state = self.worlds.state
        # The front camera looks toward the robot: world +y is the image's right.
        asked = _questions(rng, episode, self.kinds, held, on, state.objects[0, :, 1])
        return [
            Question(
                prompt, answer,
                state.objects[0, slot].copy() if slot >= 0 else None,
                np.array([*episode.plate_xy[plate], PLATE_THICKNESS_M]) if plate >= 0 else None,
            )
            for prompt, answer, slot, plate in asked
        ]  # fmt: skip

    def paint(self, rng: np.random.Generator) -> tuple[Episode, int, dict[int, int]]:
        """Draw a scene; returns the episode, the held slot (-1: none) and {slot: plate it lies on}."""
        w, data = self.worlds, self.worlds.data[0]
        episode = _random_episode(rng, self.kinds)
        w.place(0, episode)
        on: dict[int, int] = {}
        addresses = {slot: w.index.object_qpos[slot] for slot in episode.slots}
        if episode.plate_colors and rng.random() < 0.45:  # one object lies on a plate
            slot, plate = int(rng.choice(episode.slots)), int(rng.integers(len(episode.plate_colors)))
            offset = rng.uniform(-0.025, 0.025, 2)
            height = REST_HEIGHT_M[self.kinds[slot]] + PLATE_THICKNESS_M
            data.qpos[addresses[slot] : addresses[slot] + 3] = [*(np.array(episode.plate_xy[plate]) + offset), height]
            on[slot] = plate
        held, mode = -1, rng.random()
        free = np.array([rng.uniform(0.38, 0.68), rng.uniform(-0.21, 0.21), rng.uniform(0.03, 0.30)])
        if mode < 0.30:
            goal, opening = free, 0.04 if rng.random() < 0.75 else rng.uniform(0.0, 0.04)
        elif mode < 0.70:  # around an object, as when about to grasp it
            slot = int(rng.choice(episode.slots))
            at = data.qpos[addresses[slot] : addresses[slot] + 3]
            spread = 0.03 if rng.random() < 0.5 else 0.008
            goal = at + np.array([*rng.normal(0, spread, 2), rng.uniform(0.0, 0.12)])
            opening = 0.04 if rng.random() < 0.85 else rng.uniform(0.015, 0.04)
        else:
            held = int(rng.choice(episode.slots))
            on.pop(held, None)
            goal = free
            if episode.plate_colors and rng.random() < 0.4:
                plate_xy = episode.plate_xy[rng.integers(len(episode.plate_colors))]
                goal = np.array([*(np.array(plate_xy) + rng.normal(0, 0.02, 2)), rng.uniform(0.04, 0.16)])
            opening = _HALF_WIDTH_M[self.kinds[held]]
        self.reach(np.maximum(goal, [0.3, -0.3, 0.012]), opening)
        if held >= 0:
            a = addresses[held]
            data.qpos[a : a + 3] = data.site_xpos[w.index.grip_site] + rng.normal(0, 0.004, 3)
            data.qpos[a + 3 : a + 7] = [1, 0, 0, 0] if self.kinds[held] != "brick" else [0.7071, 0, 0, 0.7071]
        self.look()
        return episode, held, on


def _questions(
    rng: np.random.Generator, episode: Episode, kinds: tuple[str, ...], held: int, on: dict[int, int], y: np.ndarray
) -> list[tuple[str, str, int, int]]:
    """(prompt, answer, object slot or -1, plate or -1) per question. `y` (K,) is each object's sideways position."""
    names = {s: (c, kinds[s]) for s, c in zip(episode.slots, episode.colors, strict=True)}

    def say(slot: int) -> str:
        # as held-out phrasings may call it: a question is no instruction
        return object_phrase(*names[slot], rng, "heldout")

    plates = len(episode.plate_colors)
    out: list[tuple[str, str, int, int]] = []
    for k in range(4):  # instructions: the prompt that the policy will see
        slot = int(rng.choice(episode.slots))
        if plates and k % 2:
            plate = int(rng.integers(plates))
            text, _ = instruction("place", names[slot], episode.plate_colors[plate], rng, "grounding")
            out.append((text, "", slot, plate))
        else:
            out.append((instruction("pick", names[slot], None, rng)[0], "", slot, -1))
    slot = int(rng.choice(episode.slots))
    out.append((f"where is {say(slot)}", "", slot, -1))
    slot = int(rng.choice(list(on))) if on and rng.random() < 0.5 else int(rng.choice(episode.slots))
    if plates and rng.random() < 0.6:
        plate = on[slot] if slot in on and rng.random() < 0.6 else int(rng.integers(plates))
        answer = "yes" if on.get(slot, -1) == plate else "no"
        out.append((f"is {say(slot)} on {plate_phrase(episode.plate_colors[plate], rng)}", answer, slot, plate))
    else:
        slot = held if held >= 0 and rng.random() < 0.5 else slot
        out.append((f"is {say(slot)} in the gripper", "yes" if slot == held else "no", slot, -1))
    if rng.random() < 0.5:
        answer = "nothing" if held < 0 else f"the {names[held][0]} {KIND_WORDS[names[held][1]][0]}"
        out.append(("what is in the gripper", answer, held, -1))
    else:
        side, slot = ("left", min(episode.slots, key=lambda s: y[s])) if rng.random() < 0.5 else (
            "right", max(episode.slots, key=lambda s: y[s]))  # fmt: skip
        answer = f"the {names[slot][0]} {KIND_WORDS[names[slot][1]][0]}"
        out.append((f"what is on the {side}", answer, slot, -1))
    order = sorted(episode.slots, key=lambda s: y[s])
    caption = " and ".join(f"the {names[s][0]} {KIND_WORDS[names[s][1]][0]}" for s in order)
    out.append(("describe the table", caption, -1, -1))
    return out


@dataclass(frozen=True)
class _Request:
    """The parts of a request that are the same for every worker."""

    suites: tuple[str, ...]
    seed: int
    image_size: int
    perturb: Perturbation | None
    depth: bool = False


def _make(arguments: tuple[_Request, int, int, str]) -> int:
    """Write `count` scenes from `start` into the shared arrays (worker)."""
    request, start, count, folder = arguments
    suites = request.suites or ("",)
    root = Path(folder)
    images = np.load(root / "images.npy", mmap_mode="r+")
    points = np.load(root / "points.npy", mmap_mode="r+")
    grip = np.load(root / "grip.npy", mmap_mode="r+")
    geometry = {name: np.load(root / f"{name}.npy", mmap_mode="r+") for name in _GEOMETRY if request.depth}
    texts = []
    samplers = {name: _scene_sampler(name, request.image_size, request.perturb, request.depth) for name in suites}
    for sampler in samplers.values():
        sampler.restart()
    for s in range(start, start + count):
        sampler = samplers[suites[s % len(suites)]]
        questions = sampler.scene(np.random.default_rng([request.seed, s, Stream.GROUNDING]))
        images[s] = sampler.pictures()
        grip[s] = sampler.grip() - sampler.centre_m
        if geometry:
            metres, *matrices = sampler.geometry()
            values = (np.clip(np.round(1000 * metres), 0, 65535), *matrices, sampler.centre_m)
            for array, value in zip(geometry.values(), values, strict=True):
                array[s] = value
        points[s] = np.nan
        for q, question in enumerate(questions):
            for k, at in enumerate((question.object, question.place)):
                if at is not None:
                    points[s, q, k] = [*(at - sampler.centre_m), *sampler.project(at).reshape(-1)]
        texts.append([[question.prompt, question.answer] for question in questions])
    for array in (images, points, grip, *geometry.values()):
        array.flush()
    (root / f"texts-{start:08d}.json").write_text(json.dumps(texts))
    return count


@functools.cache
def _scene_sampler(suite: str, image_size: int, perturb: Perturbation | None, depth: bool) -> SceneSampler:
    """This process's sampler of a suite with goals, of another simulator's, or, "", of shapes and plates."""
    if not suite:
        return _PickPlaceSampler(_SUITE, image_size, perturb, depth=depth)
    spec = load_suite(suite)
    if isinstance(spec, RobosuiteSuite):
        return RobosuiteSampler(spec, image_size, perturb)
    if isinstance(spec, MetaworldSuite):
        return MetaworldSampler(spec, image_size, perturb)
    return GoalSampler(spec, image_size, perturb, depth=depth)


def _check_suite(name: str, perturb: Perturbation | None, depth: bool) -> None:
    """ValueError unless suite `name` can be asked about: its tasks are goals, or another simulator's."""
    suite = load_suite(name)
    if depth and not isinstance(suite, Suite):
        raise ValueError(f"suite {name!r} gives no depth with its scenes: leave it out, or --depth")
    if isinstance(suite, RobosuiteSuite | MetaworldSuite):
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
    if out.exists():
        raise ValueError(f"{out} exists: give another --out, or remove it")
    check(probe=True)  # a pool would start workers that cannot draw again and again
    with locked(out):
        for left in out.parent.glob(f".{glob.escape(out.name)}.[0-9]*"):  # by a run that was killed
            shutil.rmtree(left)
        request = _Request(tuple(suites), seed, image_size, perturb, depth)
        return _generate(request, scenes, out, num_workers, on_progress)


def _generate(
    request: _Request,
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
    """A scene's part of an array of `_GEOMETRY`."""
    each = {"depth": (views, size, size), "intrinsics": (views, 3, 3), "extrinsics": (views, 4, 4), "centre": (3,)}
    return each[name]


def _fill(
    request: _Request,
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
        *((name, kind, (scenes, *_shape(name, views, size))) for name, kind in _GEOMETRY.items() if request.depth),
    ):
        np.lib.format.open_memmap(work / f"{name}.npy", "w+", kind, shape).flush()
        reserve(work / f"{name}.npy")
    jobs = [
        (request, start, min(_SCENES_PER_TASK, scenes - start), str(work))
        for start in range(0, scenes, _SCENES_PER_TASK)
    ]
    done = 0
    with worker_environment(), pool(num_workers) as workers:
        for job in as_completed([workers.submit(_make, job) for job in jobs]):
            done += job.result()
            if on_progress:
                on_progress(done, scenes)
    texts = [text for path in sorted(work.glob("texts-*.json")) for text in json.loads(path.read_text())]
    (work / "questions.json").write_text(json.dumps(texts))
    for path in work.glob("texts-*.json"):
        path.unlink()
    os.replace(work, out)
    return out
