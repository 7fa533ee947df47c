"""Imitation of a policy that reads depth: learnt from cached places, which are none of other cameras'."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.depth_policy import cameras
from tests.vla.toy_backbone import CAMERAS, SPEC, toy_backbone
from tests.vla.training.test_train import CONFIG, SIZE, demos
from vla.data.camera_geometry import CameraGeometry
from vla.data.feature_cache import encode_demos
from vla.model.config import XYZConfig
from vla.processing.config import AugmentConfig
from vla.training import train as trainer
from vla.training.run_identity import fingerprint, same_data
from vla.training.train import build_vla, train

XYZ = replace(CONFIG, model=replace(CONFIG.model, xyz=XYZConfig()))


def measured(turn=0.0):
    """The demonstrations of `test_train`, with depth; `turn`: m by which the cameras stand elsewhere."""
    data = demos()
    views = cameras(seed=1, size=SIZE, batch=data.num_frames)
    found = {}
    for camera in CAMERAS:
        outer = views["extrinsics"][camera].copy()
        outer[:, 0, 3] += turn
        mm = (views["depth"][camera] * 1000).astype(np.uint16)
        found[camera] = CameraGeometry(mm, views["intrinsics"][camera], outer)
    return replace(data, geometry=found)


def fresh(data, cfg=XYZ):
    return build_vla(cfg, data, action_spec=SPEC, backbone=toy_backbone(point_dim=6))


def test_cached_places_are_those_of_the_frame_and_follow_the_cameras(tmp_path):
    data = measured()
    vla = fresh(data)
    kept = encode_demos(vla, data, folder=tmp_path)
    again = encode_demos(vla, data, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # read again, not made again
    rows = torch.tensor([3, 11, 0])
    one = vla.encode(vla.processor.prepare(data.observation(rows.numpy())))
    for features in (kept.take(rows).seen, again.take(rows).seen, encode_demos(vla, data).take(rows).seen):
        torch.testing.assert_close(features.points_xyz_BQE, one.points_xyz_BQE)
        torch.testing.assert_close(features.raw_xyz_BNE, one.raw_xyz_BNE)
    moved = encode_demos(vla, measured(turn=0.1), folder=tmp_path).take(rows).seen
    assert len(list(tmp_path.iterdir())) == 2  # not the other cameras'
    assert (moved.points_xyz_BQE - one.points_xyz_BQE).abs().max() > 0.05


def test_it_learns_resumes_bit_for_bit_and_is_refused_without_depth(tmp_path):
    data = measured()
    whole, parts = fresh(data), fresh(data)
    report = train(XYZ, whole, data, tmp_path / "whole")
    assert report.step == XYZ.steps and np.isfinite(report.loss)
    stop = train(replace(XYZ, keep_features=True), parts, data, tmp_path / "parts", on_step=_stop_after(5))
    assert stop.interrupted and stop.step < XYZ.steps
    resumed = fresh(data)
    train(XYZ, resumed, data, tmp_path / "parts", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    before = fresh(data).state_dict()
    assert any(not torch.equal(t, before[n]) for n, t in whole.state_dict().items() if "embed_xyz" in n)
    with pytest.raises(ValueError, match="lack the depth of camera 'front'"):
        train(XYZ, fresh(demos()), demos(), tmp_path / "none")


@pytest.mark.parametrize("old", [False, True])
def test_a_run_is_resumed_with_the_cameras_that_it_began_with(tmp_path, monkeypatch, old):
    """Runs made before the cameras counted know nothing of them: they go on as before."""
    data, few = measured(), replace(XYZ, steps=4)
    with monkeypatch.context() as patch:
        if old:
            patch.setattr(trainer, "fingerprint", lambda parts, asked: fingerprint(parts).partition("-")[0])
        train(few, fresh(data), data, tmp_path)
    assert train(few, fresh(data), data, tmp_path, resume=True).step == 4
    mm = {name: replace(known, depth_mm=known.depth_mm + 1) for name, known in data.geometry.items()}
    small = replace(data, images={name: image[:, ::2, ::2] for name, image in data.images.items()})
    others = measured(turn=0.1), replace(data, geometry=mm), replace(data, proprio_names=tuple("vwxyz"))
    assert not same_data(fingerprint([data]), fingerprint([small]))
    older = "-".join(fingerprint([data]).split("-")[:2])
    assert same_data(older, fingerprint([small])), "an older run does not know"
    negative = replace(data, images={name: 255 - image for name, image in data.images.items()})
    assert not same_data(fingerprint([data]), fingerprint([negative])), "the same motion before other pictures"
    for other in others:
        vla = fresh(other)
        if old:
            train(few, vla, other, tmp_path, resume=True)
            continue
        with pytest.raises(ValueError, match="trained on other demonstrations"):
            train(few, vla, other, tmp_path, resume=True)
    with pytest.raises(ValueError, match="trained on other demonstrations"):
        train(few, fresh(data), replace(data, action=data.action * 0.9), tmp_path, resume=True)


def test_pictures_beside_depth_are_not_cropped(tmp_path, monkeypatch):
    crops = []

    def seen(images, draws, config):
        crops.append(config.crop)
        return images

    monkeypatch.setattr(trainer, "augment", seen)
    train(replace(XYZ, steps=1, augment=AugmentConfig(crop=0.8)), fresh(measured()), measured(), tmp_path)
    assert crops == [1.0] and AugmentConfig(crop=0.8).beside(None).crop == 0.8


def _stop_after(steps):
    import os
    import signal

    def on_step(state):
        if state.stage == "train" and state.done == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step
