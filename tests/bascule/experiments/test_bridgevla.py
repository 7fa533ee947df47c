"""The controls of `vla experiment bridgevla` do what they say."""

import numpy as np
import pytest

from bascule.experiments.heatmaps.bridgevla import BridgeConfig, _plain, bridgevla, shuffled
from bascule.experiments.spatial.calibration import Miscalibrated
from tests.vla.training.heatmap.toy_demos import toy_demos


def test_every_demonstration_has_the_instruction_of_another():
    demos = toy_demos()
    other = shuffled(demos, 0)
    assert other.instruction == ["pick up the blue ball"] * 40 + ["pick up the red cube"] * 40
    np.testing.assert_array_equal(other.action, demos.action)


def test_cameras_are_turned_by_so_many_degrees_where_they_stand():
    obs = toy_demos().observation([0])

    class Listener:
        def act(self, seen, prefix=None):
            self.seen = seen

    listener = Listener()
    Miscalibrated(listener, 20.0).act(obs)
    for camera, true in obs.extrinsics.items():
        told = listener.seen.extrinsics[camera][0]
        np.testing.assert_allclose(told[:3, 3], true[0, :3, 3])
        turn = true[0, :3, :3].T @ told[:3, :3]
        assert np.rad2deg(np.arccos((np.trace(turn) - 1) / 2)) == pytest.approx(20.0, abs=1e-3)
        np.testing.assert_allclose(turn[:, 1], [0, 1, 0], atol=1e-6)  # about its own vertical


def test_an_unknown_arm_is_named(tmp_path):
    with pytest.raises(ValueError, match="heatmap"):
        bridgevla(BridgeConfig(arms=("heat",)), tmp_path)


def test_decisions_are_timed_beside_a_chunk_policy_of_the_same_cameras():
    """It is shown what it would have drawn: smaller pictures, no depth."""
    obs = toy_demos().observation([0])
    plain, whole, smaller = _plain(BridgeConfig(), obs)
    assert whole is obs and set(plain.spec.cameras) == set(obs.images) and smaller.depth is None
    assert {image.shape[1] for image in smaller.images.values()} == {plain.vla.processor.config.image_size}
    assert plain.act(smaller).shape == (1, 8, 4)
