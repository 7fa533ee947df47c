"""Frames left on disk: the same pixels as in memory, in any order, and memory that does not grow with the dataset."""

import logging
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.data.test_data import (  # noqa: F401 (fixtures)
    ACTION,
    CAMERAS,
    SIZE,
    STATE,
    edit_column,
    image_root,
    lerobot,
    video_root,
)
from tests.vla.toy_backbone import toy_backbone
from tests.vla.training.test_train import CONFIG, assert_bit_equal, weights
from vla.data.batches import Ahead, LiveDemos
from vla.data.lerobot_dataset import load_dataset
from vla.model.config import BridgeConfig, VLAConfig
from vla.processing.config import AugmentConfig
from vla.training.train import build_vla, train

CFG = replace(
    CONFIG,
    model=VLAConfig(backbone="toy", bridge=BridgeConfig(width=16), chunk_size=4, freeze_backbone=False),
    steps=4,
    batch_size=6,
)


@pytest.fixture(params=["image", "video"])
def root(request):
    return request.getfixturevalue(f"{request.param}_root")


def policy(cfg, data):
    return build_vla(cfg, data, backbone=toy_backbone(point_dim=6))


@pytest.mark.parametrize("size", [None, 16])
def test_any_rows_in_any_order_are_the_pixels_read_in_bulk(root, size):
    eager, lazy = load_dataset(root, image_size=size), load_dataset(root, image_size=size, lazy=True)
    assert lazy.nbytes == lazy.proprio.nbytes + lazy.action.nbytes
    rng = np.random.default_rng(0)
    for rows in (slice(3, 9), np.array([21, 0, 7, 7, 15, 2]), rng.permutation(len(ACTION))):
        for camera in CAMERAS:
            assert lazy.images[camera].shape == eager.images[camera].shape
            np.testing.assert_array_equal(lazy.images[camera][rows], eager.images[camera][rows])
    a, b = eager.subset([2, 0]), lazy.subset([2, 0])
    np.testing.assert_array_equal(b.images["wrist"][slice(None)], a.images["wrist"])
    np.testing.assert_array_equal(b.observation(slice(4, 8)).proprio, a.observation(slice(4, 8)).proprio)
    np.testing.assert_array_equal(lazy.proprio, STATE)


@pytest.mark.parametrize("mode", ["learning", "augmented", "cached"])
def test_training_from_disk_is_training_from_memory(image_root, tmp_path, mode):  # noqa: F811
    frozen = replace(CFG, model=replace(CFG.model, freeze_backbone=True))
    changes = {"learning": CFG, "augmented": replace(frozen, augment=AugmentConfig()), "cached": frozen}
    cfg, ends = replace(changes[mode], keep_features=mode == "cached"), []
    for lazy in (False, True):
        data = load_dataset(image_root, image_size=16, lazy=lazy)
        vla = policy(cfg, data)
        train(cfg, vla, data, tmp_path / str(lazy))
        ends.append(weights(vla))
    assert_bit_equal(*ends)
    if mode == "learning":  # a batch at a time: of the 22 frames, no more were ever decoded together
        assert {frames.most_decoded for frames in data.images.values()} == {cfg.batch_size}


def test_memory_does_not_grow_with_the_dataset(image_root, caplog):  # noqa: F811
    """Peak of Python's memory over an epoch of batches, for a dataset and for eight copies of its frames."""
    caplog.set_level(logging.WARNING, logger="PIL")  # pytest keeps every record: several for each picture decoded

    def peak(copies):
        small = load_dataset(image_root, lazy=True)
        rows = np.tile(np.arange(small.num_frames), copies)
        images = {camera: frames.subset(rows) for camera, frames in small.images.items()}
        data = replace(
            small, images=images, proprio=small.proprio[rows], action=small.action[rows],
            instruction=[small.instruction[i] for i in rows], episode_index=np.arange(len(rows)) // 22,
        )  # fmt: skip
        source = LiveDemos(policy(CFG, small).processor, data, 4)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        tracemalloc.start()
        for batch in order.split(5):
            source.take(batch)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, len(rows) * 2 * SIZE * SIZE * 3

    (once, _), (thrice, all_pixels) = peak(1), peak(8)
    assert thrice < 1.3 * once and thrice < 0.8 * all_pixels


def test_damage_is_named_when_it_is_met(image_root, video_root, tmp_path):  # noqa: F811
    broken = shutil.copytree(image_root, tmp_path / "images")

    def damage(values):
        values[7]["bytes"] = b"not a PNG"

    edit_column(broken, "observation.images.wrist", damage)
    data = load_dataset(broken, lazy=True)
    data.images["wrist"][np.array([5, 8])]
    with pytest.raises(ValueError, match=r"wrist' holds an unreadable image at episode 1, frame 1"):
        data.images["wrist"][np.array([7])]
    videos = shutil.copytree(video_root, tmp_path / "videos")
    short = videos / "videos" / "observation.images.front" / "chunk-000"
    shutil.copy(short / "file-001.mp4", short / "file-000.mp4")
    with pytest.raises(ValueError, match=r"'observation\.images\.front' has no video frame for episode 1, frame 1: "):
        load_dataset(videos, lazy=True)


def test_the_next_batch_is_fetched_while_this_one_is_used():
    asked = []

    def fetch(step):
        asked.append(step)
        return step * 10

    ahead = Ahead(fetch)
    assert ahead.get(3, last=False) == 30
    assert ahead.get(4, last=True) == 40
    ahead.close()
    assert asked == [3, 4]
    failing = Ahead(lambda step: 1 // step)
    with pytest.raises(ZeroDivisionError):
        failing.get(0, last=True)
