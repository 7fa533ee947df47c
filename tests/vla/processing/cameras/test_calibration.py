"""Depth and calibration that cannot be true are refused, and what is unlikely to be meant is told."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from tests.vla.depth_policy import observation, policy
from tests.vla.training.heatmap.toy_demos import SIZE, toy_demos
from vla.model.heatmap.config import HeatmapConfig
from vla.processing.cameras.calibration import lens_problem, measured, off_centre, pose_problem
from vla.processing.cameras.depth import depth_remarks
from vla.training.heatmap.train import HeatmapTrainConfig, build


def pose(angle=0.7, place=(0.5, -0.3, 1.2)):
    matrix = np.eye(4, dtype=np.float32)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = place
    return matrix


def changed(matrix, place, value):
    matrix = matrix.copy()
    matrix[place] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.zeros((4, 4)), "last row must be 0 0 0 1"),
        (pose().T, "transposed?"),
        (changed(pose(), (slice(3), 0), 0), "must be a rotation"),
        (changed(pose(), (slice(3), slice(3)), 2 * np.eye(3)), "must be a rotation"),
        (pose() @ np.diag([1, 1, -1, 1]), "they mirror the world"),
        (pose(place=(500, -300, 1200)), "put the camera 1334 m from the robot's origin"),
    ],
)
def test_what_is_no_pose_of_a_camera(matrix, words):
    row, told = pose_problem(np.stack([pose(), matrix, pose()]))
    assert row == 1 and words in told


def test_poses_that_cameras_have():
    turned = pose() @ np.diag([1, -1, -1, 1])  # looks down
    assert pose_problem(np.stack([pose(), turned, pose().round(3), pose(place=(5, 5, 5))])) is None


def test_lenses():
    good = np.array([[115.0, 0, 47], [0, 113, 50], [0, 0, 1]])
    assert lens_problem(good[None]) is None and off_centre(good[None], 96, 96) is None
    assert lens_problem(np.stack([good, np.zeros((3, 3))])) == (
        1, "have no focal length: fx and fy must be positive, they are 0 and 0"
    )  # fmt: skip
    assert "fx and fy must be positive" in lens_problem(changed(good, (1, 1), -113)[None])[1]
    assert "last row must be 0 0 1" in lens_problem(good.T[None])[1]
    for size in (48, 192):  # pictures of half and twice the size
        assert f"at (47, 50), far off the middle of the {size}x{size} pixels" in off_centre(good[None], size, size)
    assert off_centre(good[None], 100, 90) is None


def test_a_measurement_is_between_a_centimetre_and_ten_metres():
    maps = np.zeros((7, 3, 3), np.float32)
    maps[:, 1, 2] = 0.5, 500, 0, np.nan, -0.5, np.inf, 0.005
    assert measured(maps).tolist() == [True, *[False] * 6]


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("extrinsics", lambda m: m.swapaxes(1, 2), "the extrinsics of camera 'front' are no pose"),
        ("extrinsics", lambda m: 0 * m, "the extrinsics of camera 'front' are no pose"),
        ("intrinsics", lambda m: 0 * m, "the intrinsics of camera 'front' have no focal length"),
    ],
)
def test_matrices_that_cannot_be_true_are_refused(part, change, words):
    obs = observation()
    wrong = {camera: change(matrix) for camera, matrix in getattr(obs, part).items()}
    with pytest.raises(ValueError, match=words):
        policy().processor.prepare(replace(obs, **{part: wrong}))


def test_blind_cameras_are_told_once(caplog):
    obs, reads = observation(), policy().processor
    assert depth_remarks(obs) == {}
    far = replace(obs, depth={**obs.depth, "wrist": 1000 * obs.depth["wrist"]})
    with caplog.at_level(logging.WARNING):
        reads.prepare(obs)
        reads.prepare(far)
        reads.prepare(far)
    (said,) = caplog.messages
    assert said.startswith("camera 'wrist' measures no depth between 0.01 and 10 m in any pixel") and "in mm?" in said
    once = {**obs.depth, "wrist": np.where(np.arange(8) == 5, obs.depth["wrist"], np.nan)}
    assert depth_remarks(replace(obs, depth=once)) == {}, "a strip that a thin sample misses is seen, too"
    large = {camera: matrix * [[8], [8], [1]] for camera, matrix in obs.intrinsics.items()}
    assert set(depth_remarks(replace(obs, intrinsics=large))) == {"front", "wrist"}


def test_heat_maps_of_nothing_are_no_reason_to_move():
    demos = toy_demos()
    keys = build(HeatmapTrainConfig(model=HeatmapConfig(width=16, picture_size=SIZE), pretrained=None), demos)
    obs = demos.observation([0, 25])
    for scale in (1000, 0, np.nan):
        blind = {camera: depth.copy() for camera, depth in obs.depth.items()}
        for depth in blind.values():
            depth[1] *= scale
        with pytest.raises(ValueError, match="no camera measures a point of the workspace.*the policy does not move"):
            keys.act(replace(obs, depth=blind))
        keys.act(replace(obs, depth=blind, live=np.array([True, False])))  # nobody asks the blind one
    blind = {**obs.depth, "front": 0 * obs.depth["front"]}
    assert keys.act(replace(obs, depth=blind)).shape[0] == 2, "one camera is enough"
