"""Scenes that were played: a shaking hand shakes, and robosuite's things are where the labels say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from envs.grounding.expert_scenes import NoisyExpert
from envs.grounding.generate import QUESTIONS_PER_SCENE, generate
from envs.tabletop.control import action_spec
from tests.envs.adapters.test_robosuite_env import needs_robosuite


def test_a_shaking_hand_displaces_lets_go_and_stays_within_bounds() -> None:
    asked = np.array([[[0.5, 0.0, -0.5, 1.0]]], np.float32)
    spreads, slips = set(), []
    for seed in range(12):
        hand = NoisyExpert(np.random.default_rng(seed), action_spec(10.0))
        done = np.stack([hand(asked)[0, 0] for _ in range(200)])
        assert np.abs(done).max() <= 1.0
        spreads.add(round(float(np.std(done[:, 1])), 1))
        slips.append(float(np.mean(done[:, 3] < 0)))
    assert 0.0 in spreads and max(spreads) > 0.25  # some hands are steady
    assert 0.03 < np.mean(slips) < 0.4
    np.testing.assert_array_equal(asked, [[[0.5, 0.0, -0.5, 1.0]]])


@needs_robosuite
def test_robosuite_scenes_point_at_red_pixels_and_depend_on_their_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one worker draws several parts, one after the other
    monkeypatch.setattr("envs.grounding.generate._SCENES_PER_TASK", 10)
    folders = [
        generate(40, tmp_path / str(k), suites=("robosuite-lift",), seed=3, num_workers=workers)
        for k, workers in enumerate((1, 2))
    ]
    images, points = (np.load(folders[0] / f"{name}.npy") for name in ("images", "points"))
    for name, mine in (("images", images), ("points", points)):
        np.testing.assert_array_equal(mine, np.load(folders[1] / f"{name}.npy"))
    assert points.shape[1] == QUESTIONS_PER_SCENE and np.isnan(points[:, 0, 1]).all()  # nowhere to take it
    hits = []
    for picture, label in zip(images, points[:, 0, 0], strict=True):
        for view in range(2):
            u, v, seen = label[3 + 3 * view : 6 + 3 * view]
            if seen:
                row, column = int((v + 1) / 2 * 84), int((u + 1) / 2 * 84)
                patch = picture[view, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].reshape(-1, 3)
                hits.append(bool(((patch[:, 0] > 80) & (patch[:, 1] < 90)).any()))
    assert len(hits) > 40 and np.mean(hits) > 0.8  # the hand may be in front of it
    assert np.ptp(points[:, 0, 0, 2]) > 0.015  # it is on its way up in some
