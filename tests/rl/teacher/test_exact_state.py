"""Noise on the sensors reaches the policy alone: critics and teachers read the simulator's state as it is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.backends.cpu_worlds import TabletopWorlds
from envs.demos.dataset_writer import WorldFacts, build_dataset, save_episode
from envs.demos.episode import DemoEpisode
from envs.perturb.episode_source import PerturbedEpisodeSource
from envs.perturb.perturbation import Perturbation
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from rl.configs.teacher import TeacherConfig
from rl.models.critic import privileged_state
from rl.teacher.state_teacher import fit_teacher
from tests.vla.toy_backbone import SPEC, toy_vla
from vla.data.lerobot_dataset import load_dataset

SEEDS, SIZE = (3, 4), 32
NOISY = partial(TabletopWorlds, source=partial(PerturbedEpisodeSource, perturb=Perturbation(noise=1.0, draws="train")))


def test_only_the_policys_state_is_noisy():
    suite, render = load_suite("tabletop-pick"), RenderOptions(SIZE)
    plain, noisy = TabletopWorlds(suite, 2, render=render), NOISY(suite, 2, render=render)
    try:
        quiet, seen = plain.reset(seeds=SEEDS), noisy.reset(seeds=SEEDS)
        assert quiet.exact_proprio is None and np.array_equal(seen.exact_proprio, quiet.proprio)
        assert 0.001 < np.abs(seen.proprio - quiet.proprio).mean() < 0.03
        torch.testing.assert_close(privileged_state(seen), privileged_state(quiet), atol=0, rtol=0)
        assert np.array_equal(seen.select([1]).exact_proprio, quiet.proprio[1:])
    finally:
        plain.close()
        noisy.close()


def test_worker_processes_report_it_too():
    env = MujocoVecEnv(load_suite("tabletop-pick"), NOISY, 2, num_workers=1, render=RenderOptions(SIZE))
    try:
        seen = env.reset(seeds=SEEDS)
        assert seen.exact_proprio.shape == seen.proprio.shape and not np.array_equal(seen.exact_proprio, seen.proprio)
    finally:
        env.close()


@pytest.fixture
def demos(tmp_path):
    """Two recorded episodes of a noisy world."""
    rng = np.random.default_rng(0)
    facts = WorldFacts(20, SPEC.names, tuple("abcde"), ("front",), 8)
    files = []
    for seed in range(2):
        exact = rng.normal(size=(30, 5)).astype(np.float32)
        episode = DemoEpisode(
            seed, "pick up the red cube", {"front": np.zeros((30, 8, 8, 3), np.uint8)},
            exact + rng.normal(size=exact.shape).astype(np.float32), np.tanh(exact[:, :4]) * np.float32(0.05),
            rng.normal(size=(30, 3)).astype(np.float32), exact,
        )  # fmt: skip
        files.append(tmp_path / f"{seed}.parquet")
        save_episode(files[-1], episode)
    build_dataset(files, tmp_path / "set", facts)
    return load_dataset(tmp_path / "set")


def test_demonstrations_keep_it_and_the_teacher_reads_it(demos):
    assert demos.exact_proprio.shape == demos.proprio.shape and demos.privileged.shape == (60, 3)
    assert np.abs(demos.exact_proprio - demos.proprio).mean() > 0.5
    assert np.array_equal(demos.subset([1]).exact_proprio, demos.exact_proprio[30:])
    config = TeacherConfig(count=1, width=16, steps=3)
    teach = partial(fit_teacher, processor=toy_vla().processor, chunk_size=2, config=config)
    ours, clean = teach(demos), teach(replace(demos, proprio=demos.exact_proprio, exact_proprio=None))
    noisy = teach(replace(demos, exact_proprio=None))
    assert torch.equal(ours.shift, clean.shift) and not torch.equal(ours.shift, noisy.shift)
