"""A policy tells how surely it sees what its instruction names, where its backbone was calibrated to."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import CAMERAS, SPEC, toy_observation, toy_stats
from vla.backbones.hub import load
from vla.backbones.lora import LoRAConfig
from vla.model.config import VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy


def policy(threshold=0.4, seed=0, **config):
    backbone = load("tiny")
    backbone.grounding_threshold = threshold
    config = VLAConfig(backbone="tiny", **config)
    vla = VLA.build(config, stats=toy_stats(), action_spec=SPEC, cameras=CAMERAS, backbone=backbone, seed=seed)
    return VLAPolicy(vla.eval())


def visible(vla, obs):
    """The visibility (B, V) that the pointer gives to the named object, from `Features.points` alone."""
    with torch.no_grad():
        points = vla.encode(vla.processor.prepare(obs)).points_BQE
    return points.unflatten(-1, (2, 3))[:, 0, :, 2].numpy()


def test_confidence_is_the_best_view_of_the_named_object_and_costs_no_second_look():
    one, obs = policy(), toy_observation(3)
    calls = []
    one.vla.backbone.register_forward_hook(lambda *_: calls.append(1))
    one.act(obs)
    assert len(calls) == 1 and one.spec.grounding_threshold == 0.4
    seen = visible(one.vla, obs)
    assert np.abs(seen[:, 0] - seen[:, 1]).min() > 0.01, "the views differ"
    np.testing.assert_allclose(one.confidence, seen.max(1), atol=1e-5)
    live = np.array([True, False, True])
    one.act(replace(obs, live=live))
    np.testing.assert_allclose(one.confidence[live], seen.max(1)[live], atol=1e-5)
    assert np.isnan(one.confidence[1])
    one.act(replace(obs, live=np.zeros(3, bool)))
    assert np.isnan(one.confidence).all()


def test_confidence_while_a_chunk_is_continued():
    from vla.core.types import Prefix

    obs = toy_observation(2)
    for head in ("l1", "flow"):
        one = policy(head=head)
        chunk = one.act(obs)
        before = one.confidence
        one.confidence = None
        one.act(obs, prefix=Prefix(chunk, np.array([3, 3]), np.array([1, 1])))
        np.testing.assert_allclose(one.confidence, before, atol=1e-5)


def test_what_was_not_calibrated_tells_none():
    obs = toy_observation(2)
    for threshold, config in (
        (None, {}),
        (0.4, {"freeze_backbone": False}),
        (0.4, {"lora": LoRAConfig()}),
        (0.4, {"language": False}),
        (0.4, {"decoder": False}),
    ):
        one = policy(threshold, **config)
        one.act(obs)
        assert one.confidence is None and one.spec.grounding_threshold is None, config


def test_the_threshold_travels_with_backbone_and_checkpoint(tmp_path):
    one = policy()
    one.vla.backbone.save(tmp_path / "backbone")
    assert json.loads((tmp_path / "backbone/bascule.json").read_text())["grounding"] == {"threshold": 0.4}
    assert load(str(tmp_path / "backbone")).grounding_threshold == 0.4
    assert "grounding" not in load("tiny").to_spec()
    one.vla.save(tmp_path / "policy")
    again = VLAPolicy.load(tmp_path / "policy")
    again.act(toy_observation(2))
    assert again.spec.grounding_threshold == 0.4 and again.confidence.shape == (2,)
    adapted = policy(lora=LoRAConfig())
    adapted.vla.merge_adapters()
    adapted.vla.save(tmp_path / "adapted")
    assert VLAPolicy.load(tmp_path / "adapted").spec.grounding_threshold is None, "its backbone has learnt"
    spec = tmp_path / "backbone/bascule.json"
    spec.write_text(spec.read_text().replace('"threshold": 0.4', '"threshold": 7'))
    with pytest.raises(ValueError, match="a number from 0 to 1"):
        load(str(tmp_path / "backbone"))
