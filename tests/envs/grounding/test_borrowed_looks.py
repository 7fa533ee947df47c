"""Randomised scenes of other simulators: labels follow the cameras, looks are training's, and can be taken off."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest

from envs.grounding import jobs
from envs.grounding.expert_scenes import PlayedSampler, RobosuiteSampler
from envs.grounding.generate import generate
from envs.perturb.borrowed_models import BorrowedLooks
from envs.perturb.patterns import TRAINING, surface_pixels
from envs.perturb.perturbation import Perturbation, randomisation
from envs.registry import load_suite
from tests.envs.adapters.test_robosuite_env import needs_robosuite
from vla.core.subprocesses import pool

STRONG = randomisation(["strong", "motion=0"])
_LOOKS = ("cam_", "light_", "geom_", "mat_", "tex_")
"""Prefixes of MjModel's fields."""
LOOKS = randomisation(["camera=1", "light=1", "texture=1"])


@contextmanager
def lift(perturb: Perturbation | None) -> Iterator[RobosuiteSampler]:
    sampler = RobosuiteSampler(load_suite("robosuite-lift"), 96, perturb)
    try:
        yield sampler
    finally:
        sampler.worlds.close()


def pixels_of(renderer: mujoco.Renderer, sampler: PlayedSampler, geoms: list[int], view: int) -> np.ndarray:
    """(n, 2) rows and columns of the picture that show these geoms, by MuJoCo's own segmentation."""
    _, _, data = sampler.worlds._scene(0)
    option = sampler.worlds._renderer._option
    renderer.update_scene(data, camera=list(sampler.worlds._their_names)[view], scene_option=option)
    ids, kinds = np.moveaxis(renderer.render(), -1, 0)
    if view in sampler.worlds.turned_views:
        ids, kinds = ids[::-1, ::-1], kinds[::-1, ::-1]
    return np.argwhere(np.isin(ids, geoms) & (kinds == mujoco.mjtObj.mjOBJ_GEOM))


def compare(plain: PlayedSampler, turned: PlayedSampler, geom: str, scenes: int) -> tuple[np.ndarray, np.ndarray]:
    """(V, n) pixels between a geom's label and the middle of the pixels that show it whole, and (V, n) how far labels
    have moved from the plain pictures', as shares of half the picture. Where the geom is cut off or hidden: nan."""
    gaps, moved = np.full((2, scenes), np.nan), np.zeros((2, scenes))
    renderer = None  # one for all pictures, once there is a scene: making it takes long
    for k in range(scenes):
        told = [one.scene(np.random.default_rng([5, k])) for one in (plain, turned)]
        assert [(q.prompt, q.answer) for q in told[0]] == [(q.prompt, q.answer) for q in told[1]]
        np.testing.assert_array_equal(told[0][0].object, told[1][0].object)
        points = [one.project(told[0][0].object) for one in (plain, turned)]
        moved[:, k] = np.abs(points[0] - points[1])[:, :2].max(1)
        _, model, _ = turned.worlds._scene(0)
        if renderer is None:
            renderer = mujoco.Renderer(model, 96, 96)
            renderer.enable_segmentation_rendering()
        assert renderer.model is model
        geoms = [model.geom(geom).id]
        for view, (u, v, seen) in enumerate(points[1]):
            shown = pixels_of(renderer, turned, geoms, view)
            if seen and len(shown) and (shown > 0).all() and (shown < 95).all():
                middle = (shown.min(0) + shown.max(0)) / 2
                gaps[view, k] = np.abs(middle - np.array([(v + 1) * 48, (u + 1) * 48])).max()
    renderer.close()
    return gaps, moved


@needs_robosuite
def test_labels_stay_on_the_cube_under_every_camera_and_no_scene_changes() -> None:
    with lift(None) as plain, lift(LOOKS) as turned:
        gaps, moved = compare(plain, turned, "cube_g0_vis", 12)
    assert np.isfinite(gaps).sum() > 8 and np.nanmedian(gaps) < 3
    assert (np.median(moved, axis=1) > [0.02, 0.01]).all()  # the hand's camera turns by less


@pytest.fixture
def alone_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PlayedSampler]]:
    """A set made by one worker is made in this process, which need not import the simulator anew; gives the samplers
    that were made for it. Two workers are processes."""
    make, made = jobs._scene_sampler.__wrapped__, []

    class Here(Executor):
        def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(function(*args, **named))
            return future

    @contextmanager
    def workers(count: int) -> Iterator[Executor]:
        if count == 1:
            yield Here()
            return
        with pool(count) as processes:
            yield processes

    @functools.cache
    def sampler(*asked: Any) -> PlayedSampler:
        made.append(make(*asked))
        return made[-1]

    monkeypatch.setattr("envs.grounding.generate.pool", workers)
    monkeypatch.setattr(jobs, "_scene_sampler", sampler)
    yield made
    for one in made:
        one.worlds.close()


@needs_robosuite
def test_pictures_depend_on_the_seed_alone_and_differ_from_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone_here: list[PlayedSampler]
) -> None:
    monkeypatch.setattr("envs.grounding.generate._SCENES_PER_TASK", 4)
    suites = ("robosuite-lift",)
    sets = [
        generate(8, tmp_path / str(k), suites=suites, seed=3, num_workers=workers, image_size=96, perturb=perturb)
        for k, (workers, perturb) in enumerate([(1, STRONG), (2, STRONG), (1, None)])
    ]
    assert len(alone_here) == 2, "the first and the last set are made here"
    images = [np.load(folder / "images.npy").astype(int) for folder in sets]
    np.testing.assert_array_equal(images[0], images[1])
    assert images[0].shape == (8, 2, 96, 96, 3)
    assert np.median(np.abs(images[0] - images[2]).mean((2, 3, 4))) > 15
    assert (sets[0] / "questions.json").read_text() == (sets[2] / "questions.json").read_text()


@needs_robosuite
def test_the_model_gets_its_own_looks_back() -> None:
    with lift(None) as sampler:
        sampler.scene(np.random.default_rng([5, 0]))
        worlds, plain = sampler.worlds, sampler.pictures().copy()
        _, model, _ = worlds._scene(0)
        before = {name: np.array(getattr(model, name)) for name in dir(model) if name.startswith(_LOOKS)}
        looks = BorrowedLooks(model, sampler.surfaces, 0.8)
        for seed in range(4):
            worlds.renew_textures(0, looks.wear(LOOKS, seed))
            worlds._render([0])
            assert np.abs(sampler.pictures().astype(int) - plain).mean() > 5
        worlds.renew_textures(0, looks.restore())
        worlds._render([0])
        np.testing.assert_array_equal(sampler.pictures(), plain)
        for name, value in before.items():
            np.testing.assert_array_equal(getattr(model, name), value, err_msg=name)


@needs_robosuite
def test_looks_are_none_that_a_test_has() -> None:
    """The bounds are those of `tests/envs/perturb/test_randomisation.py`."""
    with lift(None) as sampler:
        sampler.worlds.reset(seeds=[0])
        _, model, _ = sampler.worlds._scene(0)
        plain, light = model.geom_rgba.copy(), model.light_dir[0].copy()
        table, camera = model.geom("table_visual").id, model.camera("agentview").id
        texture = model.mat_texid[model.geom_matid[table], 1]
        place, look = model.cam_pos[camera].copy(), BorrowedLooks(model, sampler.surfaces, 0.8)
        patterns, tilts, colours, ways = set(), [], 0, []
        known = {surface_pixels(name).tobytes(): name for name in TRAINING}
        for seed in range(60):
            look.wear(randomisation(["camera=1", "light=0:1", "texture=0:1"]), seed)
            tilts.append(np.arccos(np.clip(model.light_dir[0] @ light, -1, 1)))
            ways.append(np.linalg.norm(model.cam_pos[camera] - place))
            if model.geom_matid[table] < 0:
                colours += 1
                assert (model.geom_rgba[table] != plain[table]).any()
                _, saturation, value = colorsys.rgb_to_hsv(*model.geom_rgba[table, :3].tolist())
                assert not (saturation < 0.45 and 0.3 < value < 0.95)
            elif model.tex_height[texture] == 128:
                start = model.tex_adr[texture]
                patterns.add(known[model.tex_data[start : start + 128 * 128 * 3].tobytes()])
        assert colours > 10 and len(patterns) > 5
        assert not [t for t in tilts if 0.25 < t < 0.85] and max(tilts) > 0.85  # a test's light: 0.45 to 0.9 rad at 1
        assert max(ways) > 0.4


def test_a_randomisation_that_shows_nothing_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    with pytest.raises(ValueError, match="'robosuite-lift' can be randomised in camera, light, texture, noise"):
        generate(4, tmp_path / "c", suites=["robosuite-lift"], perturb=randomisation(["robot=1"]))
    with pytest.raises(ValueError, match="for training"):
        generate(4, tmp_path / "c", suites=["robosuite-lift"], perturb=Perturbation(light=1.0))
