"""Environments used in the wrong order, or with numbers that mean nothing: one line, and no made-up observation."""

import gymnasium
import numpy as np
import pytest

import envs.gym_env  # noqa: F401 - registers the environments
from envs import make_vec
from envs.backends.cpu_worlds import TabletopWorlds
from envs.backends.delayed_env import DelayedVecEnv
from envs.perturb.perturbation import MIXES, Perturbation, parse, randomisation
from envs.registry import load_suite
from envs.sim.base_worlds import check_seeds
from envs.sim.render_options import RenderOptions
from vla.core.types import Observation

STAY = np.zeros((2, 1, 4), np.float32)


@pytest.mark.parametrize("seed", [1.5, float("nan"), True, np.True_, np.float64(1), "1", None])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ValueError, match="a seed must be a whole number, got "):
        check_seeds([0], [seed])


def test_whole_numbers_of_every_kind_are_seeds():
    check_seeds([0, 1, 2], [0, np.int64(1), np.uint8(2)])
    check_seeds([0, 1], np.arange(2))
    with pytest.raises(ValueError, match="a seed must be at least 0, got -1"):
        check_seeds([0], [-1])


@pytest.mark.parametrize(
    ("ids", "tasks", "words"),
    [([0, 0], None, "names a world twice"), ([0, 1], ["pick"], "one task per world, or none: 2 worlds, 1 tasks")],
)
def test_every_world_has_one_episode_and_one_task(ids, tasks, words):
    with pytest.raises(ValueError, match=words):
        check_seeds(ids, [1, 2], tasks)


def test_one_text_in_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match=r"Observation.instruction is a list of B texts: write \['pick it up'\]"):
        Observation({}, np.zeros((1, 8), np.float32), "pick it up")


def test_worlds_in_workers():
    env = make_vec("tabletop-pick", 2, num_workers=1, image_size=16)
    with pytest.raises(RuntimeError, match=r"no episode has begun: call reset\(\) before step_chunk\(\)"):
        env.step_chunk(STAY)
    for one in (env, DelayedVecEnv(env, n_action_steps=1, late_steps=0)):
        with pytest.raises(ValueError, match=r"a seed must be a whole number, got 1\.5"):
            one.reset(seeds=[1.5, 2])
    env.reset(seeds=[1], env_ids=[0])
    assert env.step_chunk(STAY).n_steps.tolist() == [1, 0], "the other one stands still, as after its episode"
    env.close()
    env.close()
    for use in (
        lambda: env.reset(seeds=[1, 2]),
        lambda: env.step_chunk(STAY),
        env.observation,
        lambda: env.set_rendering(False),
    ):
        with pytest.raises(RuntimeError, match="these environments are closed: make new ones with make_vec"):
            use()


def test_worlds_in_this_process():
    worlds = TabletopWorlds(load_suite("tabletop-pick"), 2, render=RenderOptions(16))
    worlds.render_images = False
    with pytest.raises(RuntimeError, match="no episode has begun"):
        worlds.step_chunk(STAY)
    with pytest.raises(ValueError, match="a seed must be a whole number, got True"):
        worlds.reset(seeds=[True, 2])
    worlds.reset(seeds=[1, 2])
    assert worlds.step_chunk(STAY).n_steps.tolist() == [1, 1]


@pytest.mark.parametrize("size", [0, -1, 84.0, True, "84", 8193])
def test_pictures_that_nothing_can_render(size):
    with pytest.raises(ValueError, match="image_size must be a whole number of pixels from 1 to 8,192, got "):
        RenderOptions(size)
    assert RenderOptions(1).image_size == 1 and RenderOptions(np.int64(8192)).image_size == 8192


def test_gymnasium_passes_it_on():
    with pytest.raises(ValueError, match="image_size must be"):
        gymnasium.make("bascule/TabletopPick-v0", image_size=0)


def test_an_axis_is_given_once():
    for read in (parse, randomisation):
        with pytest.raises(ValueError, match="perturbation camera is given twice: give one of them"):
            read(["camera=0.5", "light=0.1", "camera=0.1"])
    with pytest.raises(ValueError, match="'light' and 'strong' are both mixes of randomisation: give one of them"):
        randomisation(["light", "strong"])


def test_axes_replace_the_mixs_in_any_order():
    expected = MIXES["light"]["noise"]
    for words in (["light", "camera=0.2:0.4"], ["camera=0.2:0.4", "light"]):
        chosen = randomisation(words)
        assert chosen.camera == (0.2, 0.4) and chosen.noise == expected and chosen.draws == "train"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phrasings": "held-out"}, "did you mean 'heldout'"),
        ({"perturb": ["camera=0.5"]}, "perturb must be a Perturbation"),
        ({"perturb": Perturbation(camera=(0.0, 0.5, 1.0))}, "camera must be a severity or its two ends"),
        ({"perturb": Perturbation(camera=0.5, draws="trian")}, "draws must be test or train"),
        ({"nconmax": 9}, "nconmax 9 is for backend 'warp'"),
        ({"horizon": 5.5}, "horizon must be from 1 to"),
    ],
)
def test_an_option_that_means_nothing_is_not_taken_for_another(options, words):
    with pytest.raises(ValueError, match=words):
        make_vec("tabletop-pick", 1, num_workers=1, **options)
