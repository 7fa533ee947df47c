"""A backbone that learns with the policy: in full, or through LoRA adapters; in parts, in half precision, resumable."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import SPEC, load_toy
from tests.vla.training.test_train import (
    CONFIG,
    Killed,
    assert_bit_equal,
    demos,
    fresh,
    interrupt_at,
    kill,
    metrics,
    weights,
)
from vla.backbones.lora import LoRAConfig
from vla.core.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from vla.data.batches import LiveDemos
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.processing.config import AugmentConfig
from vla.training.optim import checkpoint_layers
from vla.training.train import build_vla, learning_rate, train

TOY_LORA = LoRAConfig(rank=4, train_fully=("queries", "point"), targets="all")
FULL = replace(CONFIG, model=replace(CONFIG.model, freeze_backbone=False))
LORA = replace(CONFIG, model=replace(CONFIG.model, lora=TOY_LORA))
AUGMENTED = replace(CONFIG, augment=AugmentConfig())
MODES = {"full": FULL, "lora": LORA, "augmented": AUGMENTED}


def tiny_demos():
    data, rng = demos(episodes=2, length=4), np.random.default_rng(0)
    return replace(data, images={c: rng.integers(0, 256, (8, 84, 84, 3), np.uint8) for c in data.images})


def tiny_vla(cfg, data):
    from vla.backbones.backbone import Backbone
    from vla.backbones.tiny import build_tiny, train_tokenizer

    tokenizer = train_tokenizer([*data.instruction] * 4, vocab_size=300)
    backbone = Backbone(build_tiny(len(tokenizer)), tokenizer, num_queries=4, num_views=2)
    return build_vla(cfg, data, action_spec=SPEC, backbone=backbone)


TINY = replace(
    CONFIG,
    model=VLAConfig(backbone="tiny", bridge=BridgeConfig(width=32, gate_init=0.5), chunk_size=4),
    image_size=84,
    steps=3,
)
TINY_LORA = replace(TINY, model=replace(TINY.model, lora=LoRAConfig(rank=4)))
TINY_FULL = replace(TINY, model=replace(TINY.model, freeze_backbone=False))


def gradients(vla, data, rows=8):
    """Gradient of the loss from images, one pass, nothing cached."""
    batch = LiveDemos(vla.processor, data, vla.chunk_size).take(torch.arange(min(rows, data.num_frames)))
    vla.zero_grad(set_to_none=True)
    loss, _ = vla.loss(vla.encode(batch.seen), batch.proprio_BP, batch.action_BCA, batch.mask)
    loss.backward()
    return loss, {name: p.grad for name, p in vla.named_parameters()}


def test_frozen_means_no_gradient_and_learning_means_one_everywhere():
    data = tiny_demos()
    _, frozen = gradients(tiny_vla(TINY, data).train(), data)
    assert all(grad is None for name, grad in frozen.items() if name.startswith("backbone."))
    assert frozen["bridge.position"].abs().max() > 0

    _, full = gradients(tiny_vla(TINY_FULL, data).train(), data)
    still = {n for n, g in full.items() if g is None or not g.abs().max() > 0}
    assert still == set(), still
    (patches,) = [grad for name, grad in full.items() if name.endswith("patch_embedding.weight")]
    assert patches.abs().max() > 0  # from the action back to the pixels

    _, lora = gradients(tiny_vla(TINY_LORA, data).train(), data)
    touched = {n for n, g in lora.items() if n.startswith("backbone.") and g is not None}
    assert touched and all("lora_" in n or n.split(".")[1] in ("queries", "told", "pointer") for n in touched)
    assert any("lora_B" in n and lora[n].abs().max() > 0 for n in touched)
    assert not any("vision_tower" in n for n in touched)


@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_is_bit_equal_in_every_mode(tmp_path, mode):
    cfg, data = replace(MODES[mode], ema_decay=0.5, accumulate=2), demos()
    straight = fresh(cfg)
    start = weights(straight)
    train(cfg, straight, data, tmp_path / "a")
    with pytest.raises(Killed):
        train(cfg, fresh(cfg), data, tmp_path / "b", on_step=interrupt_at(6, kill))
    torch.manual_seed(123)
    resumed = VLA.load(tmp_path / "b", load_backbone=load_toy, merge=False)  # as the command line does
    train(cfg, resumed, data, tmp_path / "b", resume=True)
    assert_bit_equal(weights(resumed), weights(straight))
    assert metrics(tmp_path / "b")[-1]["loss"] == metrics(tmp_path / "a")[-1]["loss"]
    changed = {n for n in start if n.startswith("backbone.") and not torch.equal(start[n], weights(straight)[n])}
    if mode == "full":
        assert "backbone.patch.weight" in changed and "backbone.queries" in changed
    elif mode == "lora":
        assert changed and all("lora_" in n or n.split(".")[1] in ("queries", "point") for n in changed)
    else:
        assert not changed


def test_a_merged_policy_is_the_same_function_and_a_plain_checkpoint(tmp_path):
    data = tiny_demos()
    cfg = replace(TINY_LORA, lr=1e-2, warmup_steps=0, backbone_lr=1.0)
    vla = tiny_vla(cfg, data)
    obs = vla.processor.prepare(data.observation(slice(None)))
    untrained = vla.predict(obs)
    train(cfg, vla, data, tmp_path / "run")
    adapted, features = vla.predict(obs), vla.encode(obs).raw_BLND
    assert np.abs(adapted - untrained).max() > 1e-4
    without = {n: p for n, p in vla.named_parameters() if "lora_B" in n}
    assert max(p.abs().max() for p in without.values()) > 1e-3  # the adapters did learn

    merged = VLA.load(tmp_path / "run")  # whoever loads it to act gets it merged
    assert merged.config.lora is None and not any("lora" in name for name in merged.state_dict())
    np.testing.assert_allclose(merged.predict(obs), adapted, atol=1e-5)
    torch.testing.assert_close(merged.encode(obs).raw_BLND, features, atol=1e-4, rtol=1e-4)
    merged.save(tmp_path / "export")
    again = VLA.load(tmp_path / "export")
    assert again.config.lora is None
    np.testing.assert_array_equal(again.predict(obs), merged.predict(obs))
    plain = set(tiny_vla(TINY, data).state_dict())
    assert set(load_checkpoint(tmp_path / "export").tensors) == plain
    # The trainer needs the adapters themselves, and says so.
    with pytest.raises(ValueError, match="lora=None, this run .*merge=False"):
        train(replace(cfg, steps=9), merged, data, tmp_path / "run", resume=True)
    assert VLA.load(tmp_path / "run", merge=False).config.lora == cfg.model.lora


def test_the_optimiser_is_given_the_scheduled_rate_and_the_right_groups(tmp_path, monkeypatch):
    used = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        used.append([(g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    cfg = replace(FULL, backbone_lr=0.25)
    vla = fresh(cfg)
    train(cfg, vla, demos(), tmp_path)
    for number, groups in enumerate(used):
        rate = learning_rate(cfg, number)
        assert [g[0] for g in groups] == [rate, rate, 0.25 * rate, 0.25 * rate]
    assert len(used) == cfg.steps
    decays = [g[1] for g in used[0]]
    assert decays == [cfg.weight_decay, 0.0, cfg.weight_decay, 0.0]
    assert all(len(shape) >= 2 for shape in used[0][2][2])
    free = used[0][3][2]  # biases of the backbone, its queries and its word embedding
    assert tuple(vla.backbone.queries.shape) in free and tuple(vla.backbone.words.weight.shape) in free
    owned = sum(len(g[2]) for g in used[0])
    assert owned == len(vla.trainable())


def still(cfg):
    """Without dropout, which draws differently when a batch is split."""
    return replace(cfg, model=replace(cfg.model, bridge=BridgeConfig(width=32)))


@pytest.mark.parametrize("mode", ["frozen", "full", "augmented"])
def test_two_parts_of_eight_are_one_batch_of_sixteen(tmp_path, mode):
    cfg = still(replace({"frozen": CONFIG, **MODES}[mode], batch_size=16, steps=4, warmup_steps=0))
    data = demos(episodes=5, length=6)  # chunks of 4 in episodes of 6: parts hold different numbers of targets
    whole, parts = fresh(cfg), fresh(cfg)
    for vla in (whole, parts):
        vla.backbone.dropout.p = 0.0
    train(replace(cfg, log_every=1), whole, data, tmp_path / "a")
    train(replace(cfg, log_every=1, accumulate=2), parts, data, tmp_path / "b")
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-3, atol=2e-5, msg=name)
    with pytest.raises(ValueError, match="batch_size 16 does not divide into accumulate 3"):
        train(replace(cfg, accumulate=3), whole, data, tmp_path / "c")


def test_half_precision_backbone_with_full_precision_weights_and_head():
    # With the trained weights: those of a random model amplify rounding in a way that no real one does.
    data = tiny_demos()
    low = replace(TINY_FULL, model=replace(TINY_FULL.model, backbone_dtype="bfloat16"))
    vla, seen = build_vla(low, data, action_spec=SPEC).train(), {}
    vla.backbone.vlm.model.language_model.layers[0].mlp.register_forward_hook(
        lambda module, given, out: seen.update(layer=out.dtype)
    )
    vla.head.out.register_forward_hook(lambda module, given, out: seen.update(head=out.dtype))
    loss, grads = gradients(vla, data)
    assert seen == {"layer": torch.bfloat16, "head": torch.float32}
    assert loss.dtype == torch.float32 and all(p.dtype == torch.float32 for p in vla.parameters())
    exact, exact_grads = gradients(build_vla(TINY_FULL, data, action_spec=SPEC).train(), data)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    a, b = (
        torch.cat([grad.flatten() for name, grad in g.items() if name.startswith("backbone.") and grad is not None])
        for g in (grads, exact_grads)
    )
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def saved_bytes(vla, data):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in vla.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = LiveDemos(vla.processor, data, vla.chunk_size).take(torch.arange(8))
        vla.loss(vla.encode(batch.seen), batch.proprio_BP, batch.action_BCA, batch.mask)
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("cfg", [TINY_FULL, TINY_LORA], ids=["full", "lora"])
def test_recomputed_layers_give_the_same_gradient_for_less_memory(cfg):
    data, vla = tiny_demos(), tiny_vla(cfg, tiny_demos()).train()
    _, plain = gradients(vla, data)
    much = saved_bytes(vla, data)
    with checkpoint_layers(vla.backbone, True):
        loss, again = gradients(vla, data)
        little = saved_bytes(vla, data)
    for name, grad in plain.items():
        if grad is not None:
            torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-7, msg=name)
    assert little < 0.6 * much
    assert saved_bytes(vla, data) == much  # switched off again
    with pytest.raises(ValueError, match="cannot recompute its layers"):
        with checkpoint_layers(fresh(FULL).backbone, True):
            pass


@pytest.mark.slow  # tracing takes longer than all the other tests of this file
def test_compiled_training_is_the_same_training(tmp_path):
    cfg = still(replace(CONFIG, steps=2))
    plain, compiled = fresh(cfg), fresh(cfg)
    train(cfg, plain, demos(), tmp_path / "a")
    train(replace(cfg, compile="eager"), compiled, demos(), tmp_path / "b")
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert compiled.bridge._compiled_call_impl is None
    with pytest.raises(ValueError, match="no torch.compile backend 'inducter'"):
        train(replace(cfg, compile="inducter"), compiled, demos(), tmp_path / "c")


def test_mistakes_are_said_first(tmp_path):
    for change, message in (
        ({"checkpointing": True}, "for a backbone that learns"),
        ({"model": replace(CONFIG.model, lora=LoRAConfig(rank=0))}, "lora rank and alpha must be positive"),
        ({"augment": AugmentConfig(crop=1.2)}, "augment.crop must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            train(replace(CONFIG, **change), fresh(), demos(), tmp_path)
    with pytest.raises(ValueError, match="the policy has freeze_backbone=True, this run is set to False"):
        train(FULL, fresh(), demos(), tmp_path)
    with pytest.raises(ValueError, match="lora trains adapters on a frozen backbone"):
        fresh(replace(FULL, model=replace(FULL.model, lora=TOY_LORA)))


def test_a_run_of_an_older_version_is_resumed(tmp_path):
    data = demos()
    with pytest.raises(Killed):
        train(CONFIG, fresh(), data, tmp_path, on_step=interrupt_at(6, kill))
    held = load_checkpoint(tmp_path)
    state = held.trainer_state
    for name in ("accumulate", "augment", "language", "weights", "backbone_lr", "shard"):
        del state["config"][name]
    del state["config"]["model"]["lora"]
    files = checkpoint_files(tmp_path, "tokenizer/")
    save_checkpoint(
        tmp_path, config=held.config, tensors=held.tensors, stats=held.stats, trainer_state=state, files=files
    )
    assert train(CONFIG, fresh(), data, tmp_path, resume=True).step == 12
    assert json.loads((tmp_path / "train.json").read_text())["accumulate"] == 1
