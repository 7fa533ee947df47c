"""Perturbations: pure draws, nothing at severity 0, more at more, and worlds that can still be solved."""

from __future__ import annotations

import colorsys
import gc
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from envs import make_vec
from envs.backends.cpu_worlds import TabletopWorlds
from envs.demos.record import record
from envs.experts.registry import make_expert
from envs.make import worlds_class
from envs.perturb.episode_source import PerturbedEpisodeSource
from envs.perturb.perturbation import AXES, Perturbation, parse
from envs.perturb.rewording import reword
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from envs.tabletop.episode_source import EpisodeSource
from vla.core.types import Observation
from vla.processing.text import tokens_of

SEEDS = range(5_000_000, 5_000_006)
SEEN = {
    "camera", "light", "texture", "distractors", "layout", "robot", "noise", "materials", "shadows", "motion",
    "compression",
}  # fmt: skip
"""Axes that change a picture."""


def perturbed(perturb: Perturbation) -> Callable[..., EpisodeSource]:
    return partial(PerturbedEpisodeSource, perturb=perturb)


def begin(suite: str, severity: dict[str, float], *, step: bool = False) -> tuple[TabletopWorlds, Observation]:
    worlds = TabletopWorlds(
        load_suite(suite), len(SEEDS), source=perturbed(Perturbation(**severity)), render=RenderOptions(image_size=48)
    )
    obs = worlds.reset(seeds=SEEDS)
    if step:
        obs = worlds.step_chunk(np.full((len(SEEDS), 4, 4), 0.3, np.float32)).obs
    for camera, image in obs.images.items():
        obs.images[camera] = image.copy()
    worlds.close()
    return worlds, obs


def same(a: Observation, b: Observation) -> bool:
    return (
        all(np.array_equal(a.images[camera], b.images[camera]) for camera in a.images)
        and np.array_equal(a.proprio, b.proprio)
        and np.array_equal(a.privileged, b.privileged)
        and a.instruction == b.instruction
    )


@pytest.fixture(scope="module")
def plain() -> dict[str, Observation]:
    found = {}
    for suite in ("tabletop-pick", "tabletop-place"):
        worlds = TabletopWorlds(load_suite(suite), len(SEEDS), render=RenderOptions(image_size=48))
        worlds.reset(seeds=SEEDS)
        found[suite] = worlds.step_chunk(np.full((len(SEEDS), 4, 4), 0.3, np.float32)).obs
    return found


def test_severity_zero_is_no_perturbation_bit_for_bit(plain: dict[str, Observation]) -> None:
    for suite, expected in plain.items():
        assert same(begin(suite, {}, step=True)[1], expected)
    # With an axis switched on for others (a range from 0), an episode that draws 0 is plain too.
    on = _Nothing(**dict.fromkeys(AXES, (0.0, 1.0)))
    worlds = TabletopWorlds(load_suite("tabletop-pick"), 6, source=perturbed(on), render=RenderOptions(image_size=48))
    worlds.reset(seeds=SEEDS)
    assert same(worlds.step_chunk(np.full((6, 4, 4), 0.3, np.float32)).obs, plain["tabletop-pick"])
    worlds.close()


class _Nothing(Perturbation):
    def severity(self, axis: str, seed: int) -> float:
        return 0.0


@pytest.fixture(scope="module")
def none() -> Observation:
    return begin("tabletop-place", {})[1]


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_is_a_function_of_seed_and_severity(axis: str, none: Observation) -> None:
    suite = "tabletop-place"
    _, some = begin(suite, {axis: 0.4})
    _, again = begin(suite, {axis: 0.4})
    _, most = begin(suite, {axis: 1.0})
    assert same(some, again)
    assert not same(none, most) and not same(some, most)
    if axis in SEEN:
        # More severity, more difference from the plain picture, over all episodes together.
        far, near = (np.abs(o.images["front"].astype(float) - none.images["front"]).mean() for o in (most, some))
        assert far > near > 0
    assert (most.instruction != none.instruction) == (axis == "instruction")
    if axis not in ("noise", "robot"):
        assert np.array_equal(most.proprio, none.proprio)
    if axis not in ("layout", "robot"):  # what the expert and the rules see is the simulator's truth
        assert np.array_equal(most.privileged, none.privileged)


def test_neighbouring_worlds_do_not_share_a_look() -> None:
    """The worlds of a process share one model: each writes its own fields before it is drawn."""
    severity = dict.fromkeys(("camera", "light", "texture"), 0.7)
    together, obs = begin("tabletop-pick", severity)
    for k in (0, 3):
        alone = TabletopWorlds(
            load_suite("tabletop-pick"),
            1,
            source=perturbed(Perturbation(**severity)),
            render=RenderOptions(image_size=48),
        )
        assert np.array_equal(alone.reset(seeds=[SEEDS[k]]).images["front"][0], obs.images["front"][k])
        alone.close()
    assert together.episodes[0] is not None


@pytest.mark.parametrize("axis", ["distractors", "layout", "robot"])
def test_the_expert_solves_what_moves_at_full_severity(axis: str) -> None:
    """The expert reads the simulator's state: what is seen, heard or measured does not reach it."""
    suite, seeds = "tabletop-place", range(5_000_000, 5_000_020)
    worlds = TabletopWorlds(load_suite(suite), len(seeds), source=perturbed(Perturbation(**{axis: 1.0})))
    worlds.render_images = False
    worlds.reset(seeds=seeds)
    expert, won = make_expert(suite, len(seeds)), np.zeros(len(seeds), bool)
    while not worlds.over.all():
        won |= worlds.step_chunk(expert.act(worlds.observation())).info["success"]
    assert won.mean() >= 0.9


def test_distractors_stand_on_the_table_apart_from_everything() -> None:
    worlds = TabletopWorlds(
        load_suite("tabletop-place"),
        12,
        source=perturbed(Perturbation(distractors=1.0)),
        render=RenderOptions(image_size=48),
    )
    worlds.render_images = False
    worlds.reset(seeds=range(12))
    bodies = [worlds.model.body(f"distractor{k}").id for k in range(5)]
    starts = np.stack([data.xpos[bodies] for data in worlds.data])
    worlds.step_chunk(np.tile(np.array([0, 0, 0, 1], np.float32), (12, 8, 1)))
    rest = np.stack([data.xpos[bodies] for data in worlds.data])
    assert np.abs(rest - starts).max() < 0.005  # they stand, or hang under the table, and stay
    standing = rest[..., 2] > 0
    assert standing.sum(1).min() >= 3 and standing.sum() > 50
    for k in range(12):
        objects = worlds.state.objects[k][worlds.state.active[k]]
        assert np.linalg.norm(rest[k][standing[k], None, :2] - objects[None, :, :2], axis=-1).min() > 0.06


def test_layout_reaches_beyond_the_training_range_and_keeps_the_order() -> None:
    suite = load_suite("tabletop-place")
    outside = 0
    for seed in range(40):
        a, b = (perturbed(Perturbation(layout=s))(suite).sample(seed) for s in (0.0, 1.0))
        before, after = np.array(a.poses), np.array(b.poses)
        assert (np.argsort(before[:, 0]) == np.argsort(after[:, 0])).all()
        assert (np.argsort(before[:, 1]) == np.argsort(after[:, 1])).all()
        outside += int((np.abs(after[:, 1]) > 0.17).any() or (np.abs(after[:, 0] - 0.53) > 0.1).any())
    assert outside > 20


def test_rewording_keeps_the_names_and_nests() -> None:
    text = "pick up the red cube and put it on the green plate"
    seen = set()
    for seed in range(40):
        assert reword(text, [seed], 0.0) == text
        versions = [reword(text, [seed], s) for s in (0.1, 0.34, 0.67, 1.0)]
        assert versions[0] == text and len(set(versions)) == 4  # none, one, two, three rewrites
        assert all("red cube" in version and "green plate" in version for version in versions)
        first = set(versions[1].split()) - set(text.split())
        assert first <= set(versions[3].split())
        seen.add(versions[3])
    assert len(seen) > 20
    assert reword("lift it", [3], 1.0) != "lift it"


def test_object_hues_stay_within_their_names() -> None:
    worlds, _ = begin("tabletop-pick", {"texture": 1.0})
    for i, episode in enumerate(worlds.episodes):
        rgba = worlds._fields[i]["geom_rgba"]
        plain = TabletopWorlds(load_suite("tabletop-pick"), 1)
        plain.place(0, episode)
        for geom, color in zip(plain.index.colored_geom, plain._rgba[0], strict=True):
            if np.ptp(color[:3]) > 0.1:
                there, here = (colorsys.rgb_to_hsv(*c[:3].tolist())[0] for c in (rgba[geom], color))
                assert abs((there - here + 0.5) % 1.0 - 0.5) < 0.04


def test_ranges_randomise_and_workers_agree() -> None:
    random = Perturbation(camera=(0.0, 1.0), light=(0.2, 0.6), distractors=(0.0, 1.0))
    drawn = np.array([[random.severity(axis, seed) for axis in ("camera", "light")] for seed in range(200)])
    assert drawn.min(0) == pytest.approx([0.0, 0.2], abs=0.05) and drawn.max(0) == pytest.approx([1.0, 0.6], abs=0.05)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.25
    local = TabletopWorlds(
        load_suite("tabletop-pick"), 2, source=perturbed(random), render=RenderOptions(image_size=48)
    )
    env = make_vec("tabletop-pick", 2, num_workers=1, image_size=48, perturb=random)
    try:
        assert same(env.reset(seeds=[3, 4]), local.reset(seeds=[3, 4]))
    finally:
        env.close(), local.close()


def test_nobody_is_told_of_words_that_an_environment_makes_up(monkeypatch, caplog) -> None:
    from vla.backbones.hub import load

    monkeypatch.setattr("vla.processing.text._told_before", set())
    tokenizer = load("tiny-goals").tokenizer
    envs = [
        make_vec("tabletop-pick", 1, num_workers=1, perturb=parse((axis,))) for axis in ("instruction=1", "light=1")
    ]
    tokens_of("tkae up the brzqwk", tokenizer, rule="signs", limit=100)
    assert caplog.records == []
    envs.pop(0).close()
    gc.collect()
    tokens_of("tkae up the brzqwk", tokenizer, rule="signs", limit=100)
    envs.pop().close()
    assert "has no word for 'tkae', 'brzqwk'" in caplog.text


def test_words_on_the_command_line() -> None:
    assert parse(["camera=0.5", "light=0:1"]) == Perturbation(camera=0.5, light=(0.0, 1.0))
    assert parse([]) == Perturbation()
    for words, message in (
        (["camra=1"], "camera"), (["camera"], "camera=SEVERITY"), (["camera=much"], "camera=SEVERITY"),
        (["camera=2"], "0..1"), (["light=1:0"], "light=0:1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse(words)
    with pytest.raises(ValueError, match="tabletop suites"):
        make_vec("robosuite-lift", 1, perturb=Perturbation(camera=1.0))
    with pytest.raises(ValueError, match="0..1"):
        make_vec("tabletop-pick", 1, perturb=Perturbation(camera=3.0))


def first_frame(dataset: Path) -> np.ndarray:
    file = next((dataset / "data").rglob("*.parquet"))
    cell = pq.read_table(file, columns=["observation.images.front"])[0][0].as_py()
    return np.asarray(Image.open(io.BytesIO(cell["bytes"]))).astype(float)


def test_demonstrations_are_randomised_and_remember_it(tmp_path: Path) -> None:
    random = Perturbation(texture=(0.5, 1.0), light=1.0)
    assert parse(random.words().split()) == random
    mixed = tmp_path / "mixed"
    record("tabletop-pick", 1, mixed, num_workers=1, image_size=32, perturb=random)
    first = []
    for perturb in (None, random):
        suite = load_suite("tabletop-pick")
        worlds = worlds_class(suite, perturb)(suite, 1, render=RenderOptions(image_size=32))
        first.append(worlds.reset(seeds=[0]).images["front"][0].astype(float))
        worlds.close()
    assert np.abs(first[0] - first[1]).mean() > 10
    assert np.array_equal(first_frame(mixed), first[1])
    assert json.loads((mixed / "meta" / "bascule.json").read_text())["perturb"] == "light=1 texture=0.5:1"
    with pytest.raises(ValueError, match="perturb"):
        record("tabletop-pick", 1, mixed, num_workers=1, image_size=32)


def test_a_range_given_backwards_is_told_with_the_right_one():
    assert Perturbation(light=(1.0, 0.25)).problem() == (
        "perturbation light must go from its lower to its higher end: light=0.25:1"
    )
