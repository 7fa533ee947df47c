"""An exported policy that remembers: it looks at what the checkpoint would look at, in every episode by itself."""

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
from vla.model.config import BridgeConfig, MemoryConfig, VLAConfig, XYZConfig
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


def moments(count):
    """Observations (2 environments) of two episodes that run side by side."""
    for seed in range(count):
        views = cameras(batch=2, seed=seed, size=84)
        for camera in CAMERAS:  # flat: a pixel further on, by rounding, must not be another place
            views["depth"][camera][:] = 0.7
        yield replace(observation(2, seed=seed), env_ids=np.array([4, 9]), **views)


def test_it_remembers_as_the_checkpoint_does(tmp_path):
    folder = depth_checkpoint(tmp_path / "policy", memory=MemoryConfig(3))
    exported = export(folder, tmp_path / "out", observations=6)
    assert exported.parity.max_error < MAX_ERROR and exported.memory == MemoryConfig(3)
    policy, model = ExportedPolicy.load(tmp_path / "out"), VLAPolicy(VLA.load(folder))
    assert policy.spec.memory_frames == 3 and policy.spec.n_action_steps == 3 and policy.spec.depth is True
    *before, last = moments(9)
    for number, obs in enumerate(before):
        if number == 4:
            for one in (policy, model):
                one.reset([9])
        live = np.array([True, number != 6])  # where it does not live, nothing is remembered
        mine, theirs = (one.act(replace(obs, live=live)) for one in (policy, model))
        np.testing.assert_allclose(mine[live], theirs[live], atol=1e-4)
    remembering = policy.act(last)
    np.testing.assert_allclose(remembering, model.act(last), atol=1e-4)
    policy.reset()
    assert np.abs(policy.act(last) - remembering).max() > 1e-3
