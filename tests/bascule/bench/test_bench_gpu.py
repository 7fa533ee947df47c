"""The GPU benchmark's path at a size for one CPU core: it refuses wrong graphs, and counts what a step really does."""

import pytest
import torch

from bascule.bench import model_gpu as bench_gpu
from bascule.bench.model_gpu import Shape, bench, make_vla, observations
from vla.model.policy import VLAPolicy

SMALL = Shape(
    dino=(32, 2, 2), siglip=(32, 2, 2, 48), decoder=(32, 2, 4, 2, 48), vocabulary=400, image_size=56, bridge_heads=4
)


def test_it_measures_a_policy_of_the_asked_shape():
    rows = {row["name"]: row for row in bench(device="cpu", shape=SMALL, calls=3, batches=(2,), steps=2)}
    assert list(rows) == ["replans, plain", "replans, policy", "training, batch 2"]
    assert rows["replans, policy"]["baseline"] == "plain"
    assert all(row["value"] > 0 for row in rows.values())
    assert "TFLOP/s" in rows["training, batch 2"]["config"]
    assert "MFU" not in rows["training, batch 2"]["config"], "a CPU has no peak in the table"


def test_a_wrong_fast_policy_gives_no_figures(monkeypatch):
    class Wrong(VLAPolicy):
        def act(self, obs):
            return super().act(obs) + 0.5

    monkeypatch.setattr(bench_gpu, "VLAPolicy", Wrong)
    with pytest.raises(RuntimeError, match="no figures"):
        bench(device="cpu", shape=SMALL, calls=2, batches=(), steps=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="needs a CUDA device"):
        bench()


def test_a_backbone_in_bfloat16_decides_nearly_alike_and_does_not_cast_at_every_call():
    vla = make_vla(SMALL, torch.device("cpu"), learns=False)
    seen = observations(SMALL, 2)
    before = [VLAPolicy(vla).act(obs) for obs in seen]
    fast = VLAPolicy(vla, dtype="bfloat16")
    assert next(vla.backbone.parameters()).dtype == torch.bfloat16
    assert next(vla.bridge.parameters()).dtype == torch.float32
    for obs, action in zip(seen, before, strict=True):
        assert abs(fast.act(obs) - action).max() < 0.05
    assert abs(before[0] - before[1]).max() > 1e-3
