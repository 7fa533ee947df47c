"""The backbone `small` as ONNX, in a policy that reads depth: the same actions, at the size it reads, and in eight
bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="pip install 'bascule[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'bascule[export]'")

from envs.sim.render_options import pictures_for
from policies.export import graphs
from policies.export.exported_policy import ExportedPolicy
from policies.export.exporter import MAX_ERROR, export
from tests.vla.depth_policy import cameras
from tests.vla.small_policy import small_policy
from tests.vla.toy_backbone import CAMERAS, toy_observation
from vla.model.config import XYZConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy


def once(function):
    """The function, which computes at its first call and gives the same again afterwards."""
    results = []

    def remembered(*args, **options):
        if not results:
            results.append(function(*args, **options))
        return results[0]

    return remembered


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the policy, and its exports by their precision."""
    folder = tmp_path_factory.mktemp("small")
    small_policy(folder / "policy", xyz=XYZConfig())
    with pytest.MonkeyPatch.context() as patch:
        # The eight bits are made from the same graph, and making that takes long.
        for module, name in ((torch.onnx, "export"), (graphs, "trace")):
            patch.setattr(module, name, once(getattr(module, name)))
        made = {
            precision: export(folder / "policy", folder / precision, precision=precision, observations=8)
            for precision in ("float32", "int8")
        }
    return folder, made


def test_small_acts_alike_as_onnx_in_both_precisions(exported):
    folder, made = exported
    for precision, within in (("float32", MAX_ERROR), ("int8", 0.3)):
        assert made[precision].parity.observations == 8 and made[precision].parity.max_error < within
        assert pictures_for(ExportedPolicy.load(folder / precision, threads=1)) == 64


def test_onnx_reads_depth_as_the_model_does(exported):
    folder, _ = exported
    policy, model = ExportedPolicy.load(folder / "float32"), VLAPolicy(VLA.load(folder / "policy"))
    assert policy.spec.depth is True
    views = cameras(seed=2, size=84)
    for camera in CAMERAS:  # flat: a pixel further on, by rounding, must not be another place
        views["depth"][camera][:] = np.array([0.4, 0.8, 1.3], np.float32)[:, None, None]
    obs = replace(toy_observation(3, size=84), **views)
    np.testing.assert_allclose(policy.act(obs), model.act(obs), atol=1e-4)
    moved = {camera: matrix.copy() for camera, matrix in obs.extrinsics.items()}
    for matrix in moved.values():
        matrix[:, 1, 3] += 0.3
    assert np.abs(policy.act(replace(obs, extrinsics=moved)) - policy.act(obs)).max() > 1e-3
    with pytest.raises(ValueError, match="lacks the depth of camera"):
        policy.act(replace(obs, depth=None))
