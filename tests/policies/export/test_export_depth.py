"""An exported policy that reads depth acts as the model does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="pip install 'bascule[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'bascule[export]'")

from policies.export.exported_policy import ExportedPolicy
from policies.export.exporter import MAX_ERROR, export
from tests.policies.export.test_export import CAMERAS, SPEC, observation, small_backbone
from tests.vla.depth_policy import cameras
from vla.model.config import BridgeConfig, VLAConfig, XYZConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.stats import Stats


def depth_checkpoint(folder, **model):
    """An untrained policy that reads depth, saved in `folder`. `model`: further fields of its configuration."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(64, 8)), rng.uniform(-1, 1, (64, 4)) * SPEC.high)
    bridge = BridgeConfig(width=32, gate_init=1.0)
    config = VLAConfig(bridge=bridge, chunk_size=4, n_action_steps=3, xyz=XYZConfig(), **model)
    VLA.build(config, stats=stats, action_spec=SPEC, cameras=CAMERAS, backbone=small_backbone()).save(folder)
    return folder


def test_onnx_reads_depth_as_the_model_does(tmp_path):
    exported = export(depth_checkpoint(tmp_path / "policy"), tmp_path / "onnx", observations=8)
    assert exported.parity.max_error < MAX_ERROR
    policy, model = ExportedPolicy.load(tmp_path / "onnx"), VLAPolicy(VLA.load(tmp_path / "policy"))
    assert policy.spec.depth is True
    views = cameras(seed=2, size=84)
    for camera in CAMERAS:  # flat: a pixel further on, by rounding, must not be another place
        views["depth"][camera][:] = np.array([0.4, 0.8, 1.3], np.float32)[:, None, None]
    obs = replace(observation(3), **views)
    np.testing.assert_allclose(policy.act(obs), model.act(obs), atol=1e-4)
    moved = {camera: matrix.copy() for camera, matrix in obs.extrinsics.items()}
    for matrix in moved.values():
        matrix[:, 1, 3] += 0.3
    assert np.abs(policy.act(replace(obs, extrinsics=moved)) - policy.act(obs)).max() > 1e-3
    with pytest.raises(ValueError, match="lacks the depth of camera"):
        policy.act(replace(obs, depth=None))
