"""The part of a grounding set's making that worker processes do: each draws its share of the scenes into the arrays.

LIBERO's scenes are made in LIBERO's own environment, so nothing here may need what that lacks.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs.adapters.libero_suites import LiberoSuite
from envs.adapters.metaworld_suites import MetaworldSuite
from envs.adapters.robosuite_suites import RobosuiteSuite
from envs.grounding.expert_scenes import RobosuiteSampler
from envs.grounding.goal_scenes import GoalSampler
from envs.grounding.libero_scenes import LiberoSampler
from envs.grounding.metaworld_scenes import MetaworldSampler
from envs.grounding.pick_place_scenes import PickPlaceSampler
from envs.grounding.scene_sampler import SceneSampler
from envs.perturb.perturbation import Perturbation
from envs.registry import load_suite
from envs.seeds import Stream

GEOMETRY = {"depth": np.uint16, "intrinsics": np.float32, "extrinsics": np.float32, "centre": np.float32}
"""Arrays of a set with depth."""


@dataclass(frozen=True)
class Request:
    """The parts of a request that are the same for every worker."""

    suites: tuple[str, ...]
    seed: int
    image_size: int
    perturb: Perturbation | None
    depth: bool = False


def make_scenes(arguments: tuple[Request, int, int, str]) -> int:
    """Write `count` scenes from `start` into the arrays in `folder`; returns `count`."""
    request, start, count, folder = arguments
    suites = request.suites or ("",)
    root = Path(folder)
    images = np.load(root / "images.npy", mmap_mode="r+")
    points = np.load(root / "points.npy", mmap_mode="r+")
    grip = np.load(root / "grip.npy", mmap_mode="r+")
    geometry = {name: np.load(root / f"{name}.npy", mmap_mode="r+") for name in GEOMETRY if request.depth}
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
        return PickPlaceSampler(image_size, perturb, depth=depth)
    spec = load_suite(suite)
    if isinstance(spec, RobosuiteSuite):
        return RobosuiteSampler(spec, image_size, perturb)
    if isinstance(spec, LiberoSuite):
        return LiberoSampler(spec, image_size)
    if isinstance(spec, MetaworldSuite):
        return MetaworldSampler(spec, image_size, perturb)
    return GoalSampler(spec, image_size, perturb, depth=depth)
