"""Each ablation on the embedded backbone's real classes: what it leaves out does not matter, and it can be saved."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bascule.experiments.ablations import ABLATIONS, ablation
from tests.vla.toy_backbone import CAMERAS, SPEC, toy_observation, toy_stats
from vla.backbones.backbone import Backbone
from vla.backbones.tiny import build_tiny, train_tokenizer
from vla.core.config import decode, encode
from vla.model.config import BridgeConfig, FaithfulConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

BASE = VLAConfig(bridge=BridgeConfig(width=16, heads=2, kv_heads=1, gate_init=0.5))


def build(name):
    tokenizer = train_tokenizer(["pick up the red cube", "pick up the green cube"] * 3, vocab_size=300)
    torch.manual_seed(0)
    backbone = Backbone(build_tiny(len(tokenizer)), tokenizer, num_queries=4, num_views=2)
    config = ABLATIONS[name](BASE)
    return VLA.build(config, stats=toy_stats(), action_spec=SPEC, cameras=CAMERAS, backbone=backbone)


@pytest.mark.parametrize("name", ABLATIONS)
def test_runs_learns_and_travels(name, tmp_path):
    vla = build(name)
    inp = vla.processor.prepare(toy_observation(batch=2, size=84))
    loss, _ = vla.loss(vla.encode(inp), inp.proprio_BP, torch.zeros(2, 8, 4), torch.ones(2, 8))
    loss.backward()
    assert all(p.grad is not None for p in vla.bridge.parameters())
    assert any(p.grad is not None for p in vla.backbone.parameters()) == (name == "trained")
    if name in ("no-decoder", "no-language", "last-layer"):
        expected = vla.predict(inp)
        vla.save(tmp_path)
        np.testing.assert_array_equal(VLA.load(tmp_path).predict(inp), expected)
    assert decode(VLAConfig, encode(vla.config)) == vla.config


def test_what_is_left_out_does_not_matter():
    obs = toy_observation(batch=2, size=84)
    said = replace(obs, instruction=["pick up the green cube"] * 2)
    moved = replace(obs, images={name: 255 - image for name, image in obs.images.items()})

    def differs(name, other):
        policy = VLAPolicy(build(name))
        return np.abs(policy.act(obs) - policy.act(other)).max() > 1e-7

    assert differs("bridge", said) and differs("no-decoder", said) and not differs("no-language", said)
    assert differs("no-language", moved) and differs("no-decoder", moved)


def test_shapes():
    blocks = {name: len(build(name).bridge.blocks) for name in ABLATIONS}
    assert blocks.pop("half-the-layers") == 2 and set(blocks.values()) == {4}
    assert build("last-layer").bridge.taps == (3, 3, 3, 3)
    assert build("raw-only").bridge.embed_points is None and build("bridge").bridge.embed_points is not None


def test_the_decoder_is_not_run():
    vla = build("no-decoder")
    ran = []
    vla.backbone.inner.vlm.model.language_model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    vla.predict(vla.processor.prepare(toy_observation(batch=1, size=84)))
    assert not ran


def test_a_released_policy_has_no_bridge_to_vary():
    with pytest.raises(ValueError, match="released VLA-Adapter policy"):
        ABLATIONS["raw-only"](replace(BASE, bridge=FaithfulConfig("pro")))
    config = replace(BASE, bridge=FaithfulConfig("pro", width=16, num_blocks=2))
    assert decode(VLAConfig, encode(config)) == config


def test_a_bridge_on_the_first_layers_stops_the_decoder_there(tmp_path):
    def build(taps, pointing):
        tokenizer = train_tokenizer(["pick up the red cube", "pick up the green cube"] * 3, vocab_size=300)
        torch.manual_seed(0)
        backbone = Backbone(build_tiny(len(tokenizer)), tokenizer, num_queries=4, num_views=2, pointing=pointing)
        config = replace(BASE, bridge=replace(BASE.bridge, taps=taps))
        vla = VLA.build(config, stats=toy_stats(), action_spec=SPEC, cameras=CAMERAS, backbone=backbone).eval()
        ran = []
        for layer in backbone.vlm.model.language_model.layers:
            layer.register_forward_hook(lambda *_: ran.append(1))
        return vla, ran

    whole, ran_whole = build(None, False)
    early, ran_early = build("first:2", False)
    inp = whole.processor.prepare(toy_observation(batch=2, size=84))
    a, b = whole.encode(inp), early.encode(inp)
    assert len(ran_whole) == 4 and len(ran_early) == 2 and b.raw_BLND.shape[1] == 2
    assert torch.equal(a.raw_BLND[:, :2], b.raw_BLND) and torch.equal(a.queries_BLQD[:, :2], b.queries_BLQD)
    early.save(tmp_path)
    np.testing.assert_array_equal(VLA.load(tmp_path).predict(inp), early.predict(inp))
    pointing, ran = build("first:2", True)  # the pointer reads the last layer
    pointing.encode(inp)
    assert len(ran) == 4


def test_joined_names_are_applied_in_turn_and_wrong_ones_are_named():
    both = ablation("no-points+last-layer")(BASE)
    assert both.bridge.taps == "last:all" and both.bridge.points_at == ()
    assert ablation("no-points")(BASE).bridge.taps == BASE.bridge.taps
    with pytest.raises(ValueError, match="last-layer"):
        ablation("no-points+last-layr")
