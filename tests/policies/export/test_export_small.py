"""The backbone `small` as ONNX: the same actions, at the size it reads, and in eight bits."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxscript", reason="pip install 'bascule[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'bascule[export]'")

from envs.sim.render_options import pictures_for
from policies.export.exported_policy import ExportedPolicy
from policies.export.exporter import export
from tests.vla.small_policy import small_policy


@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-4), ("int8", 0.3)])
def test_small_acts_alike_as_onnx(tmp_path, precision, within):
    config = export(small_policy(tmp_path / "policy"), tmp_path / "onnx", precision=precision, observations=8)
    assert config.parity.observations == 8 and config.parity.max_error < within
    assert pictures_for(ExportedPolicy.load(tmp_path / "onnx", threads=1)) == 64
