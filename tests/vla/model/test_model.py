"""The whole model on a small real backbone: freezing, one path for training and serving, learning, checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import CAMERAS, SPEC, load_toy, toy_observation, toy_vla
from vla.core.checkpoint import load_checkpoint
from vla.core.types import Policy, executed
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

SMALL = BridgeConfig(width=16, heads=2, kv_heads=1, gate_init=0.3)


def targets(vla, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, vla.chunk_size)
    mask[0, -2:] = 0
    return torch.rand(batch, vla.chunk_size, vla.action_dim, generator=g) * 2 - 1, mask


def test_shapes_units_and_bounds():
    vla = toy_vla(bridge=SMALL)
    inp = vla.processor.prepare(toy_observation())
    features = vla.encode(inp)
    assert vla.latent(features, inp.proprio_BP).shape == (3, 8, 16)
    normal = vla.act(features, inp.proprio_BP)
    assert normal.shape == (3, 8, 4) and normal.dtype == torch.float32
    action = vla.predict(inp)
    assert action.dtype == np.float32
    assert (action >= np.float32(SPEC.low)).all() and (action <= np.float32(SPEC.high)).all()
    np.testing.assert_allclose(action, vla.processor.unnormalise_action(normal.detach().numpy()))


def test_chunk_steps_differ_at_inference():
    action = toy_vla(bridge=SMALL).predict(toy_vla(bridge=SMALL).processor.prepare(toy_observation()))
    assert action.std(axis=1).max() > 1e-5


def test_one_path_for_training_and_serving():
    vla = toy_vla(bridge=SMALL)  # the toy backbone has dropout, so a backbone left in training mode would show
    inp = vla.processor.prepare(toy_observation())
    served = vla.predict(inp)
    vla.train()
    assert vla.training and not vla.backbone.training
    a, b = vla.encode(inp), vla.encode(inp)
    assert torch.equal(a.raw_BLND, b.raw_BLND)
    np.testing.assert_array_equal(vla.processor.unnormalise_action(vla.act(a, inp.proprio_BP).detach().numpy()), served)
    assert vla.training and np.array_equal(vla.predict(inp), served) and vla.training
    wet = toy_vla(bridge=replace(SMALL, dropout=0.4)).train()
    assert np.array_equal(wet.predict(inp), wet.predict(inp)) and wet.training


def test_frozen_backbone_is_untouched_and_the_rest_learns():
    vla = toy_vla(bridge=replace(SMALL, gate_init=0.0)).train()
    inp = vla.processor.prepare(toy_observation())
    action, mask = targets(vla)
    before = {n: p.detach().clone() for n, p in vla.named_parameters()}
    features = vla.encode(inp)
    assert not features.raw_BLND.requires_grad
    optimiser = torch.optim.AdamW(vla.trainable(), lr=3e-3, weight_decay=0.01)
    losses = []
    for _ in range(120):
        loss, scalars = vla.loss(features, inp.proprio_BP, action, mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(scalars["loss"].item())
    assert losses[-1] < 0.25 * losses[0]
    for name, parameter in vla.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
        else:
            assert not torch.equal(parameter, before[name]), name


def test_unfrozen_backbone_learns_through_raw_tokens_queries_and_points():
    vla = toy_vla(bridge=SMALL, freeze_backbone=False).train()
    assert vla.backbone.training
    inp = vla.processor.prepare(toy_observation())
    loss, _ = vla.loss(vla.encode(inp), inp.proprio_BP, *targets(vla))
    loss.backward()
    dead = [n for n, p in vla.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not dead


def test_bfloat16_backbone_only():
    vla = toy_vla(bridge=SMALL, backbone_dtype="bfloat16")
    kinds = []
    vla.backbone.layers[0].register_forward_hook(lambda m, i, out: kinds.append(out.dtype))
    inp = vla.processor.prepare(toy_observation())
    features = vla.encode(inp)
    assert set(kinds) == {torch.bfloat16} and features.raw_BLND.dtype == torch.float32
    precise = vla.act(features, inp.proprio_BP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vla.act(features, inp.proprio_BP), precise)
    full = toy_vla(bridge=SMALL).encode(inp)
    assert not torch.equal(full.raw_BLND, features.raw_BLND)
    torch.testing.assert_close(full.raw_BLND, features.raw_BLND, atol=0.1, rtol=0)


def test_worlds_are_independent():
    vla, obs = toy_vla(bridge=SMALL), toy_observation()
    policy = VLAPolicy(vla)
    whole = policy.act(obs)
    np.testing.assert_allclose(policy.act(obs.select([2, 0])), whole[[2, 0]], atol=1e-6)


def test_instruction_image_and_proprio_all_matter():
    policy, obs = VLAPolicy(toy_vla(bridge=SMALL)), toy_observation()
    action = policy.act(obs)
    for change in (
        {"instruction": ["pick up the blue cube"] * 3},
        {"images": {name: 255 - image for name, image in obs.images.items()}},
        {"proprio": -obs.proprio},
    ):
        assert np.abs(policy.act(replace(obs, **change)) - action).max() > 1e-6, change.keys()


def test_policy_executes_the_first_steps():
    vla, obs = toy_vla(bridge=SMALL), toy_observation()
    policy = VLAPolicy(vla, n_action_steps=3)
    assert isinstance(policy, Policy) and policy.spec.cameras == CAMERAS and policy.spec.action_spec == vla.action_spec
    spec = policy.spec.action_spec
    assert spec.names == SPEC.names and spec.control_hz == SPEC.control_hz
    policy.reset()
    whole = policy.act(obs)
    assert whole.shape[1] == policy.spec.chunk_size == 8
    np.testing.assert_array_equal(executed(policy.spec, whole), VLAPolicy(vla).act(obs)[:, :3])
    with pytest.raises(ValueError, match=r"n_action_steps must be in 1\.\.8"):
        VLAPolicy(vla, n_action_steps=9)


def test_seed_fixes_the_model_and_leaves_the_world_alone():
    obs = toy_observation()
    torch.manual_seed(5)
    expected = torch.rand(1)
    a, b, c = (toy_vla(bridge=SMALL, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(VLAPolicy(a).act(obs), VLAPolicy(b).act(obs))
    assert not np.array_equal(VLAPolicy(a).act(obs), VLAPolicy(c).act(obs))
    backbone = a.backbone
    torch.manual_seed(5)
    VLA.build(a.config, stats=a.processor.stats, action_spec=SPEC, cameras=CAMERAS, backbone=backbone, seed=9)
    assert torch.equal(torch.rand(1), expected)


def test_save_and_load_are_bit_equal(tmp_path):
    vla = toy_vla(bridge=SMALL, chunk_size=5)
    obs = toy_observation()
    expected = VLAPolicy(vla).act(obs)
    vla.save(tmp_path / "ckpt", trainer_state={"step": 7})
    torch.manual_seed(99)  # whatever load builds first must be overwritten whole
    back = VLA.load(tmp_path / "ckpt", load_backbone=load_toy)
    assert not back.training and back.config == vla.config
    np.testing.assert_array_equal(VLAPolicy(back).act(obs), expected)
    assert back.processor.stats == vla.processor.stats and back.processor.config == vla.processor.config
    assert all(torch.equal(a, b) for a, b in zip(vla.state_dict().values(), back.state_dict().values(), strict=True))
    assert not any(parameter.requires_grad for parameter in back.backbone.parameters())
    assert load_checkpoint(tmp_path / "ckpt").trainer_state == {"step": 7}
    back.save(tmp_path / "again")
    for name in ("model.safetensors", "stats.json"):
        assert (tmp_path / "ckpt" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_embedded_backbone_travels_in_the_checkpoint(tmp_path):
    """The real path: transformers classes, their tokenizer, `vla.backbones.backbone.load_backbone`, no network, no
    asset."""
    from vla.backbones.backbone import Backbone
    from vla.backbones.tiny import build_tiny, train_tokenizer

    tokenizer = train_tokenizer(["pick up the red cube", "pick up the green cube"] * 3, vocab_size=300)
    backbone = Backbone(build_tiny(len(tokenizer)), tokenizer, num_queries=4, num_views=2)
    stats = toy_vla(bridge=SMALL).processor.stats
    vla = VLA.build(VLAConfig(bridge=SMALL), stats=stats, action_spec=SPEC, cameras=CAMERAS, backbone=backbone)
    obs = toy_observation(batch=2, size=84)
    vla.save(tmp_path)
    back = VLA.load(tmp_path)
    np.testing.assert_array_equal(VLAPolicy(back).act(obs), VLAPolicy(vla.eval()).act(obs))
    assert back.processor.config.image_size == backbone.image_size
    assert str(tmp_path.parent) not in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="reads 2 camera views, got 1: front"):
        VLA.build(vla.config, stats=stats, action_spec=SPEC, cameras=("front",), backbone=backbone)


def test_damaged_checkpoints_are_explained(tmp_path):
    toy_vla(bridge=SMALL).save(tmp_path)
    words = tmp_path / "tokenizer" / "words.json"
    words.write_text(words.read_text().replace("red", "rad"))
    with pytest.raises(ValueError, match="words.json is not the file that was saved"):
        VLA.load(tmp_path, load_backbone=load_toy)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        VLA.load(tmp_path / "nowhere", load_backbone=load_toy)


def test_mistakes_are_explained():
    vla = toy_vla(bridge=SMALL)
    inp = vla.processor.prepare(toy_observation())
    features = vla.encode(inp)
    action, mask = targets(vla)
    with pytest.raises(ValueError, match=r"actions of shape \(3, 8, 4\)"):
        vla.loss(features, inp.proprio_BP, action[:, :1], mask)
    with pytest.raises(ValueError, match=r"mask of shape \(3, 8\)"):
        vla.loss(features, inp.proprio_BP, action, mask[:1])
    with pytest.raises(ValueError, match="unknown head 'l2'; did you mean 'l1'"):
        toy_vla(head="l2")
    with torch.no_grad():
        vla.head.out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        vla.predict(inp)


def test_a_policy_says_itself_how_many_steps_to_execute(tmp_path):
    vla = toy_vla(bridge=SMALL, n_action_steps=3)
    vla.save(tmp_path)
    loaded = VLA.load(tmp_path, load_backbone=load_toy)
    obs = toy_observation()
    policy = VLAPolicy(loaded)
    assert policy.act(obs).shape[1] == 8 and executed(policy.spec, policy.act(obs)).shape[1] == 3
    assert VLAPolicy(loaded, n_action_steps=8).spec.n_action_steps == 8
    with pytest.raises(ValueError, match="n_action_steps"):
        VLAPolicy(loaded, n_action_steps=0)
