"""The backbone `small` as ONNX: the same actions, at the size it reads, and in eight bits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("onnxscript", reason="pip install 'bascule[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'bascule[export]'")

from envs.sim.render_options import pictures_for
from policies.export import graphs
from policies.export.exported_policy import ExportedPolicy
from policies.export.exporter import export
from tests.vla.small_policy import small_policy


def once(function):
    """The function, which computes at its first call and gives the same again afterwards."""
    results = []

    def remembered(*args, **options):
        if not results:
            results.append(function(*args, **options))
        return results[0]

    return remembered


def test_small_acts_alike_as_onnx_in_both_precisions(tmp_path, monkeypatch):
    policy = small_policy(tmp_path / "policy")
    # The eight bits are made from the same graph, and making that takes long.
    for module, name in ((torch.onnx, "export"), (graphs, "trace")):
        monkeypatch.setattr(module, name, once(getattr(module, name)))
    for precision, within in (("float32", 1e-4), ("int8", 0.3)):
        config = export(policy, tmp_path / precision, precision=precision, observations=8)
        assert config.parity.observations == 8 and config.parity.max_error < within
        assert pictures_for(ExportedPolicy.load(tmp_path / precision, threads=1)) == 64
