"""The first three suites are frozen: shipped figures depend on what their seeds mean and on how their worlds move.

`python tests/golden/test_frozen_tabletop.py` writes the file anew; a change of it must say why. Episodes, rewards and
the expert's success are compared exactly, floats and images within what another processor may differ by.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.backends.cpu_worlds import TabletopWorlds
from envs.experts.pick_place import TabletopExpert
from envs.registry import load_suite

GOLDEN = Path(__file__).with_name("frozen_tabletop.json")
SUITES = ("tabletop-pick", "tabletop-place", "tabletop-mixed")
FIELDS = (
    "seed", "task", "slots", "colors", "poses", "plate_colors", "plate_xy", "target", "plate",
    "instruction", "template", "swapped_instruction",
)  # fmt: skip
"""Attributes of an episode; fields that came later may be added."""


def facts(suite: str) -> dict[str, Any]:
    """Play four episodes of a suite under its expert, each step disturbed; return all that was seen."""
    worlds, rng = TabletopWorlds(load_suite(suite), 4), np.random.default_rng(1)
    worlds.reset(seeds=[0, 1, 5_000_000, 5_000_001])
    episodes = repr([[getattr(episode, field) for field in FIELDS] for episode in worlds.episodes])
    worlds.render_images = False
    first_images = worlds.images.copy()
    expert, rewards, proprio, privileged = TabletopExpert(4), np.zeros(4), [], []
    while not worlds.over.all():
        worlds.render_images = worlds.elapsed.max() >= 23
        action = expert.act(worlds.observation())
        action[..., :3] += rng.normal(0, 0.1, (4, 1, 3)).astype(np.float32)
        rewards += worlds.step_chunk(action).reward
        if worlds.elapsed.max() <= 24:
            proprio.append(worlds.proprio())
            privileged.append(worlds.privileged())
        if worlds.elapsed.max() == 24:
            later_images = worlds.images.copy()
    worlds.close()
    return {
        "episodes": hashlib.sha256(episodes.encode()).hexdigest(),
        "rewards": rewards.tolist(),
        "proprio": np.stack(proprio)[::6].round(6).tolist(),
        "privileged": np.stack(privileged)[::6].round(6).tolist(),
        "images": [_coarse(first_images), _coarse(later_images)],
    }


def _coarse(images_nVHWC: np.ndarray) -> list[Any]:
    """Means of 14 x 14 pixel blocks."""
    n, views, height, width, colors = images_nVHWC.shape
    blocks = images_nVHWC.reshape(n, views, height // 14, 14, width // 14, 14, colors)
    return blocks.mean(axis=(3, 5)).round(1).tolist()


@pytest.mark.parametrize("suite", SUITES)
def test_a_frozen_suite_is_what_it_was(suite: str) -> None:
    then, now = json.loads(GOLDEN.read_text())[suite], facts(suite)
    assert now["episodes"] == then["episodes"]
    assert now["rewards"] == then["rewards"]
    # contacts magnify the last bit: 24 disturbed steps end 5e-5 apart on processors of two makers
    np.testing.assert_allclose(now["proprio"], then["proprio"], atol=2e-4)
    np.testing.assert_allclose(now["privileged"], then["privileged"], atol=2e-4)
    np.testing.assert_allclose(now["images"], then["images"], atol=1.0)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({suite: facts(suite) for suite in SUITES}, separators=(",", ":")) + "\n")
