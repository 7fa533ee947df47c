"""LIBERO's scripted expert, skill by skill: joints and things move in the simulator, and LIBERO says done."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from envs import make_vec
from envs.adapters.libero_suites import GOAL_DIM, GOALS
from envs.experts.registry import make_expert
from envs.registry import load_suite
from tests.envs.adapters.test_libero_env import needs_libero

JOINTS = (3, 4, 5)
"""Kinds of goals that are of a joint."""


def play(suite_name: str, task: int, state: int) -> tuple[bool, NDArray[np.float64], NDArray[np.float64]]:
    """The expert at a published state: success, and the rows of the goals (GOALS, GOAL_DIM) before and after."""
    suite = load_suite(suite_name)
    env, expert = make_vec(suite_name, 1, num_workers=1, image_size=32), make_expert(suite_name, 1)
    try:
        env.set_rendering(False)
        obs = env.reset(seeds=[suite.eval_seed0 + len(suite.tasks) * state + task])
        rows = [np.asarray(obs.privileged[0, 1:], np.float64).reshape(GOALS, GOAL_DIM)]
        for _ in range(suite.horizon):
            result = env.step_chunk(expert.act(obs))
            obs = result.obs
            if result.terminated[0] or result.truncated[0]:
                break
        rows.append(np.asarray(obs.privileged[0, 1:], np.float64).reshape(GOALS, GOAL_DIM))
    finally:
        env.close()
    return bool(result.info["success"][0]), rows[0], rows[1]


@needs_libero
@pytest.mark.parametrize(
    ("suite", "task", "least"),
    [
        pytest.param("libero-goal", 0, 0.14, id="pulls a drawer open by its handle"),
        pytest.param("libero-goal", 7, 0.5, id="turns a knob"),
        pytest.param("libero-goal", 3, 0.14, id="opens a drawer, for a bowl to go into it"),
        pytest.param("libero-10", 3, 0.14, id="pushes a drawer shut, a bowl in it"),
        pytest.param("libero-10", 9, 1.5, id="pushes a door shut, a mug behind it"),
    ],
)
def test_a_joint_is_moved(suite: str, task: int, least: float) -> None:
    """`least`: how far it has to move, rad or m."""
    success, before, after = play(suite, task, 0)
    (row,) = np.flatnonzero(np.isin(before[:, 0], JOINTS))
    assert success and not before[row, 1] and after[row, 1]
    assert abs(after[row, 15] - before[row, 15]) > least


@needs_libero
def test_a_plate_is_pushed_and_not_lifted() -> None:
    success, before, after = play("libero-goal", 5, 0)
    assert success and np.linalg.norm(after[0, 2:4] - before[0, 2:4]) > 0.15
    assert abs(after[0, 4] - before[0, 4]) < 0.01


@needs_libero
def test_a_bowl_is_taken_out_of_a_drawer() -> None:
    success, before, after = play("libero-spatial", 4, 1)
    assert success and after[0, 4] < before[0, 4] - 0.1


@needs_libero
def test_a_fresh_placement_puts_a_bowl_where_the_stove_is() -> None:
    """Also in an environment that has been reset before, where the stove has been moved."""
    suite = load_suite("libero-spatial")
    env = make_vec(suite.name, 1, num_workers=1, image_size=32)
    try:
        env.set_rendering(False)
        published, *fresh = (env.reset(seeds=[seed]).privileged[0, 3:6] for seed in (suite.eval_seed0 + 7, 7, 17, 27))
    finally:
        env.close()
    for bowl in fresh:
        np.testing.assert_allclose(bowl, published, atol=0.05)
