"""Grounding sets with depth, for the pre-training of heat-maps."""

import numpy as np
import pytest

from envs.grounding.generate import generate


def test_depth_and_calibration_are_of_the_pictures_and_the_named_things(tmp_path):
    """Where an object is said to be in the front picture, the camera measured it: nearer than its centre, by less than
    its size; something in front of it (the arm) may be nearer still."""
    folder = generate(6, tmp_path / "set", suites=["tabletop-object"], seed=3, num_workers=1, image_size=64, depth=True)
    depth, inner, outer, centre, points = (
        np.load(folder / f"{name}.npy") for name in ("depth", "intrinsics", "extrinsics", "centre", "points")
    )
    assert depth.shape == (6, 2, 64, 64) and depth.dtype == np.uint16
    behind = []
    for scene in range(6):
        for named in points[scene, :5, 0]:
            if not np.isfinite(named).all() or named[5] < 0.5:
                continue
            at = named[:3] + centre[scene]
            local = np.linalg.inv(outer[scene, 0]) @ [*at, 1.0]
            pixel = (inner[scene, 0] @ local[:3] / local[2])[:2]
            np.testing.assert_allclose(pixel / 32 - 1, named[3:5], atol=1e-3)
            column, row = np.clip(pixel.astype(int), 0, 63)
            behind.append(local[2] - depth[scene, 0, row, column] / 1000)
    assert len(behind) > 10 and min(behind) > -0.06
    assert np.mean(np.array(behind) < 0.05) > 0.6


def test_other_simulators_have_none(tmp_path):
    with pytest.raises(ValueError, match="depth"):
        generate(1, tmp_path / "set", suites=["robosuite-lift"], depth=True)
