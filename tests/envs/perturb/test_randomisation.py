"""Randomised training and tests of robustness draw from disjoint looks; surfaces, shadows, motion and compression."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from envs.backends.cpu_worlds import TabletopWorlds
from envs.perturb.appearance import camera_draw, light_draw, surface_colour, surfaces_of
from envs.perturb.episode_source import PerturbedEpisodeSource
from envs.perturb.patterns import MATERIALS, PATTERNS, TRAINING, pattern_pixels, surface_pixels
from envs.perturb.perturbation import AXES, MIXES, Perturbation, parse, randomisation
from envs.perturb.sensors import observed
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from envs.tabletop.episode_source import EpisodeSource
from envs.tabletop.scene import COLORS
from vla.language.names import COLORED
from vla.language.names import COLORS as NAMES

EVERYTHING = Perturbation(**dict.fromkeys(("camera", "light", "texture", "materials"), 1.0))
TRAINED = Perturbation(**dict.fromkeys(("camera", "light", "texture"), (0.0, 1.0)), draws="train")
DRAWS = 4000


@contextmanager
def started(perturb: Perturbation, seeds: range) -> Iterator[TabletopWorlds]:
    worlds = TabletopWorlds(
        load_suite("tabletop-pick"), len(seeds), source=partial(PerturbedEpisodeSource, perturb=perturb),
        render=RenderOptions(image_size=48),
    )  # fmt: skip
    try:
        worlds.reset(seeds=seeds)
        yield worlds
    finally:
        worlds.close()


def drawn(draw, *, train: bool) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.array([draw(rng, train=train) for _ in range(DRAWS)])


def test_no_training_orbit_is_a_test_orbit():
    """A test at severity 0.5 or more moves the camera by a quarter of the range or more in each of three ways."""
    test = np.array([camera_draw(np.random.default_rng(k), train=False)[0] for k in range(DRAWS)])
    train = np.array([camera_draw(np.random.default_rng(k), train=True)[0] for k in range(DRAWS)])
    assert (np.abs(0.5 * test) >= 0.25).all()
    least = np.abs(train).min(1)
    assert least.max() < 0.25  # and smaller severities make it smaller still
    assert np.abs(train).max() > 1.1 and np.quantile(np.abs(train), 0.5) > 0.3  # yet they look from far and wide


def test_no_training_light_comes_from_where_a_test_light_does():
    test, train = drawn(light_draw, train=False)[:, 1], drawn(light_draw, train=True)[:, 1]
    assert 0.5 * test.min() >= 0.25 and test.max() <= 1.0
    assert not ((train >= 0.25) & (train <= 1.0)).any() and train.min() < 0.05 and train.max() > 1.1


def test_lights_of_training_keep_out_at_every_severity():
    with started(Perturbation(light=(0.0, 1.0), draws="train"), range(60)) as worlds:
        base = worlds._compiled.light_dir[0]
        turned = [np.arccos(np.clip(fields["light_dir"][0] @ base, -1, 1)) for fields in worlds._fields]
    with started(Perturbation(light=(0.5, 1.0)), range(60)) as worlds:
        tested = [np.arccos(np.clip(fields["light_dir"][0] @ base, -1, 1)) for fields in worlds._fields]
    # A turn about a horizontal axis that a slanted light is not square to moves it by a little less.
    assert max(t for t in turned if t < 0.5) < min(tested) and max(turned) > 0.8


def test_no_training_colour_is_a_test_colour():
    import colorsys

    test, train = (np.array([colorsys.rgb_to_hsv(*c) for c in drawn(surface_colour, train=t)]) for t in (False, True))
    in_test = lambda hsv: (hsv[:, 1] <= 0.45) & (hsv[:, 2] >= 0.3) & (hsv[:, 2] <= 0.95)  # noqa: E731
    assert in_test(test - [0, 1e-9, 0]).mean() > 0.999 and not in_test(train).any()


def test_no_training_pattern_is_a_test_pattern():
    assert not set(TRAINING) & {*PATTERNS, *MATERIALS}
    pictures = {name: pattern_pixels(name) for name in PATTERNS}
    pictures |= {name: surface_pixels(name) for name in (*MATERIALS, *TRAINING)}
    assert all(p.shape == (128, 128, 3) and np.ptp(p) > 10 for p in pictures.values())
    assert len({p.tobytes() for p in pictures.values()}) == len(pictures)
    assert np.array_equal(surface_pixels("wood0"), surface_pixels("wood0"))
    assert surfaces_of(TRAINED) == TRAINING and surfaces_of(EVERYTHING) == (*PATTERNS, *MATERIALS)
    with started(TRAINED, range(40)) as worlds:
        used = {worlds.model.material(m).name for f in worlds._fields for m in f["geom_matid"] if m >= 0}
        have = {worlds.model.material(m).name for m in range(worlds.model.nmat)}
    patterned = {name for name in used if name.startswith("pattern_")}
    assert len(patterned) > 8 and patterned <= {f"pattern_{name}" for name in TRAINING}
    assert not have & {f"pattern_{name}" for name in (*PATTERNS, *MATERIALS)}


def test_training_and_test_look_different_at_the_same_seed():
    pictures = []
    for draws in ("test", "train"):
        with started(Perturbation(texture=1.0, camera=1.0, light=1.0, draws=draws), range(4)) as worlds:
            pictures.append(worlds.images.copy())
    assert (np.abs(pictures[0].astype(float) - pictures[1]).mean((1, 2, 3, 4)) > 5).all()


def test_materials_lie_on_the_table_in_their_own_colours():
    with started(Perturbation(materials=1.0), range(5_000_000, 5_000_030)) as worlds:
        table = worlds.model.geom("table").id
        found = {worlds.model.material(fields["geom_matid"][table]).name for fields in worlds._fields}
        assert found <= {f"pattern_{name}" for name in MATERIALS} and len(found) > 6
        assert all((fields["geom_rgba"][table] == 1.0).all() for fields in worlds._fields)
    with started(Perturbation(materials=1.0, texture=1.0), range(6)) as worlds:  # both: the material, and other hues
        assert {worlds.model.material(f["geom_matid"][table]).name for f in worlds._fields} <= {
            f"pattern_{name}" for name in MATERIALS
        }


def test_shadows_darken_parts_of_the_table_and_move_nothing_else():
    seeds = range(5_000_000, 5_000_006)
    with started(Perturbation(shadows=1.0), seeds) as worlds:
        shaded = worlds.images[:, 0].astype(float)
        directions = [fields["light_dir"] for fields in worlds._fields]
    with started(Perturbation(light=1e-9), seeds) as worlds:  # the same renderer without
        for fields, direction in zip(worlds._fields, directions, strict=True):
            fields["light_dir"] = direction
        worlds._render(list(range(len(seeds))))
        plain = worlds.images[:, 0].astype(float)
    darker = (plain - shaded).max(-1) > 20
    assert (darker.mean((1, 2)) > 0.01).all() and (darker.mean((1, 2)) < 0.5).all()
    assert (shaded - plain).max() < 12


def test_motion_shifts_and_blurs_and_compression_keeps_the_scene():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (2, 12, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    moving = Perturbation(motion=1.0)
    frames = [observed(moving, picture, 5, step) for step in range(40)]
    assert all(frame.shape == picture.shape and frame.dtype == np.uint8 for frame in frames)
    assert np.array_equal(frames[3], observed(moving, picture, 5, 3))
    assert not np.array_equal(frames[3][0] - picture[0], frames[3][1] - picture[1])  # every camera on its own path
    far = [np.abs(frame.astype(float) - picture).mean() for frame in frames]
    assert max(far) > 1.5 * min(far) > 0
    packed = observed(Perturbation(compression=1.0), picture, 5, 0)
    assert 1 < np.abs(packed.astype(float) - picture).mean() < 40
    assert observed(Perturbation(camera=1.0), picture, 5, 0) is picture


def test_mixes_and_axes_by_name():
    assert set(MIXES) == {"light", "medium", "strong", "robust"}
    for mix in MIXES:
        assert randomisation([mix]).problem() is None and randomisation([mix]).draws == "train"
    ours = randomisation(["medium", "camera=0:0.2", "motion=0.5"])
    assert ours.camera == (0.0, 0.2) and ours.motion == 0.5 and ours.light == MIXES["medium"]["light"]
    assert ours.words().startswith("randomise camera=0:0.2") and Perturbation(camera=1.0).words() == "camera=1"
    with pytest.raises(ValueError, match="medium"):
        randomisation(["medum"])
    for axis in ("materials", "shadows"):
        with pytest.raises(ValueError, match=f"{axis} is for tests only"):
            randomisation([f"{axis}=1"])


def test_a_share_of_the_episodes_is_plain_on_every_axis():
    ours = randomisation(["robust", "plain=0.25"])
    every = {seed: {ours.severity(axis, seed) for axis in AXES if ours.on(axis)} for seed in range(400)}
    plain = [seed for seed, severities in every.items() if severities == {0.0}]
    assert 70 < len(plain) < 130
    assert all(min(severities) > 0.0 for seed, severities in every.items() if seed not in plain)
    without = randomisation(["robust", "plain=0"])
    assert ours.severity("light", plain[0]) == 0.0 < without.severity("light", plain[0])
    other = next(seed for seed in every if seed not in plain)
    assert ours.severity("light", other) == without.severity("light", other)  # the share moves no other draw
    assert randomisation(["robust"]).plain == 0.3 and ours.words().endswith("plain=0.25")
    assert without.words() == randomisation(without.words().split()[1:] + ["plain=0"]).words()
    for words, told in (("plain=1", "less than 1, got plain=1"), ("plain=much", "must be plain=SHARE, from 0 to 1")):
        with pytest.raises(ValueError, match=told):
            randomisation(["robust", words])
    with pytest.raises(ValueError, match="given twice"):
        randomisation(["robust", "plain=0.1", "plain=0.2"])
    with pytest.raises(ValueError, match="perturbation"):
        parse(["plain=0.3"])


def test_training_says_it_in_words_of_its_own():
    """An episode's words are a function of its seed; both instructions change alike, the test's words stay unheard."""
    suite = load_suite("tabletop-pick")
    plain = EpisodeSource(suite, phrasings="train")
    ours = PerturbedEpisodeSource(suite, perturb=randomisation(["instruction=1"]), phrasings="train")
    pairs = [(plain.sample(seed), ours.sample(seed)) for seed in range(60)]
    said = [(before.instruction, after.instruction) for before, after in pairs]
    assert said == [(before.instruction, ours.sample(before.seed).instruction) for before, _ in pairs]
    changed = [before for before, after in pairs if before.instruction != after.instruction]
    assert 25 < len(changed) < 55  # three of ten paraphrases leave a sentence as it was
    assert all(before.goals == after.goals and before.poses == after.poses for before, after in pairs)
    seldom = PerturbedEpisodeSource(suite, perturb=randomisation(["instruction=0.3"]), phrasings="train")
    fewer = [seed for seed, (before, _) in enumerate(pairs) if seldom.sample(seed).instruction != before.instruction]
    assert 0 < len(fewer) < len(changed) and set(fewer) <= {before.seed for before in changed}
    tested = re.compile(r"\b(?:fetch|heave|hoist|seize|shove|nudge|ok|today)\b")
    assert not any(tested.search(after) for _, after in said)


def test_a_thing_is_told_by_its_kind_alone_where_nothing_else_is_of_it():
    source = PerturbedEpisodeSource(
        load_suite("tabletop-pick"), perturb=Perturbation(instruction=(0.0, 1.0), draws="train")
    )
    kinds = source.scene.objects
    alone = together = 0
    for seed in range(400):
        episode = source.sample(seed)
        if not any(set(names_of(color)) & set(episode.instruction.split()) for color in COLORS):
            several = [kinds[slot] for slot in episode.slots].count(kinds[episode.target]) > 1
            alone, together = alone + (not several), together + several
    assert alone > 20
    assert together < alone / 5, "only by a slip of the pen in the name of a colour"


def names_of(color: str) -> list[str]:
    """The words of all that a colour is called."""
    return [word for name in (color, *NAMES[color], *COLORED[color]) for word in name.split()]
