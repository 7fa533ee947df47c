"""The estimate against what training really keeps."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.training.test_learning_backbone import TINY, TINY_FULL, TINY_LORA, saved_bytes, tiny_demos, tiny_vla
from tests.vla.training.test_train import CONFIG, demos, fresh
from vla.core.disk import nbytes_of
from vla.data.feature_cache import encode_demos
from vla.processing.config import AugmentConfig
from vla.training import memory_budget
from vla.training.memory_budget import _Peak, estimate
from vla.training.train import train


@pytest.mark.parametrize(
    "cfg", [TINY_FULL, TINY_LORA, replace(TINY_FULL, checkpointing=True)], ids=["full", "lora", "re"]
)
def test_activations_are_those_of_the_real_batch(cfg):
    data, vla = tiny_demos(), tiny_vla(cfg, tiny_demos()).train()
    budget = estimate(cfg, vla, data)
    if cfg.checkpointing:
        assert budget.activations < 0.6 * estimate(replace(cfg, checkpointing=False), vla, data).activations
        return
    assert budget.activations == pytest.approx(saved_bytes(vla, data), rel=0.1)  # of batches of 8, as in the recipe
    assert estimate(replace(cfg, accumulate=4), vla, data).activations < 0.4 * budget.activations
    assert all(p.grad is None for p in vla.parameters()) and vla.training


def test_weights_gradients_and_optimiser_are_counted():
    for cfg in (TINY_FULL, TINY_LORA):
        vla = tiny_vla(cfg, tiny_demos())
        budget = estimate(cfg, vla, tiny_demos())
        learns = sum(p.numel() for p in vla.trainable())
        assert budget.trainable == learns and budget.gradients == 4 * learns
        optimiser = torch.optim.AdamW(vla.trainable())
        for p in vla.trainable():
            p.grad = torch.zeros_like(p)
        optimiser.step()
        held = sum(t.nbytes for state in optimiser.state.values() for t in state.values() if t.ndim)
        assert budget.optimiser == pytest.approx(held, abs=64)  # the moments of the scalar gates are the rest
        assert estimate(replace(cfg, ema_decay=0.9), vla, tiny_demos()).optimiser == pytest.approx(1.5 * held, abs=96)
        assert estimate(cfg, vla, tiny_demos(), processes=2).gradients == 2 * budget.gradients


def test_a_checkpoint_that_will_not_fit_is_told_before_training(tmp_path, monkeypatch):
    """The bytes that the warning announces are those a checkpoint takes on disk, but for settings: tied weights count
    once, the tokenizer too."""
    data, vla = demos(), fresh()
    train(replace(CONFIG, steps=1), vla, data, tmp_path)
    held = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    needed = (budget := estimate(CONFIG, vla, data)).checkpoint
    assert needed == pytest.approx(held, rel=0.005, abs=100_000)
    monkeypatch.setattr(memory_budget, "free_bytes", lambda out: needed)
    assert budget.no_room(tmp_path) is None
    monkeypatch.setattr(memory_budget, "free_bytes", lambda out: needed - 1)
    told = rf"a checkpoint needs [0-9.]+ \w+; the device holding {tmp_path} has [0-9.]+ \w+ free: make room before"
    assert re.match(told, budget.no_room(tmp_path))
    monkeypatch.setattr(memory_budget, "free_bytes", lambda out: 2 * needed - 1)
    assert budget.no_room(tmp_path) is None and "with the one before" in budget.no_room(tmp_path, again=True)


def test_a_tied_tensor_needs_room_once():
    table = torch.zeros(100)
    assert nbytes_of([{"a": table, "b": table}, [b"12", "345"], np.zeros(3, np.float32)]) == 400 + 5 + 12


def test_features_and_pictures_are_counted_where_they_are():
    data, vla = demos(), fresh()
    budget = estimate(CONFIG, vla, data)
    assert budget.features == pytest.approx(encode_demos(vla, data).features.nbytes, rel=0.05)
    assert budget.pixels == sum(image.nbytes for image in data.images.values())
    assert budget.memory > budget.pixels + budget.features
    on_disk = estimate(replace(CONFIG, keep_features=True), vla, data)
    assert on_disk.memory == budget.memory - budget.features
    assert estimate(replace(CONFIG, augment=AugmentConfig()), vla, data).features == 0
    assert any("features on disk" in line for line in on_disk.lines())
    assert budget.problem() is None
    assert "smaller --batch-size" in replace(budget, activations=1 << 50).problem()


def test_a_frozen_backbone_is_counted_while_it_encodes_the_longest_instruction():
    short = tiny_demos()
    text = "zq " * 150
    long = replace(short, instruction=[*short.instruction[:-1], text])  # one frame of all makes its batch as long
    found = {}
    for name, data in (("short", short), ("long", long)):
        cfg = replace(TINY, encode_batch=8)
        vla = tiny_vla(cfg, data).eval()
        budget = estimate(cfg, vla, data)
        with torch.no_grad(), _Peak() as peak:
            vla.encode(vla.processor.prepare(data.observation(slice(0, 8))))
        found[name] = budget.encoding
        assert budget.encoding == pytest.approx(peak.most, rel=0.1)
        assert budget.model == budget.weights + budget.gradients + budget.optimiser + max(
            budget.activations, budget.encoding
        )
        assert estimate(replace(cfg, encode_batch=2), vla, data).encoding < 0.5 * budget.encoding
    assert vla.processor.config.max_text_tokens > 100
    assert found["long"] > 3 * found["short"]


def test_the_most_that_is_held_at_once():
    a = torch.zeros(1000)
    with _Peak() as peak:
        b = a + 1
        c = b.view(10, 100)
        del b
        d = c * 2
        del c
        d += 1
        e = d + 1
    assert peak.most == 8000 and len(e) == 10
