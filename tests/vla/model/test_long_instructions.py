"""A policy reads instructions as long as its backbone does, whatever it was trained on; what is longer is cut."""

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import CAMERAS, SPEC, toy_observation, toy_stats
from vla.backbones.hub import load
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy

BASKET = "pick up the salad dressing and place it in the basket"


@pytest.fixture(scope="module")
def policy():
    config = VLAConfig(backbone="tiny", bridge=BridgeConfig(width=32))
    vla = VLA.build(config, stats=toy_stats(), action_spec=SPEC, cameras=CAMERAS, backbone=load("tiny"), seed=0)
    return VLAPolicy(vla.eval())


def act(policy, *instructions):
    """Actions for the first so many worlds, and the length of the text that the backbone read."""
    lengths = []
    hook = policy.vla.backbone.register_forward_pre_hook(lambda _module, given: lengths.append(given[1].shape[1]))
    obs = toy_observation(2).select(range(len(instructions)))
    obs.instruction = list(instructions)
    try:
        return policy.act(obs), lengths[0]
    finally:
        hook.remove()


def test_the_limit_is_what_the_decoder_has_positions_for(policy):
    assert load("tiny").text_limit == 512 - 2 * 49 - 8 == policy.processor.text_limit
    assert load("tiny", num_views=1).text_limit == 512 - 49 - 8
    assert policy.processor.config.max_text_tokens == 24


def test_a_task_longer_than_any_it_was_trained_on_is_read_to_its_end(policy):
    tokens = len(policy.processor.tokens(BASKET))
    assert 24 < tokens < 60
    action, length = act(policy, BASKET)
    other, _ = act(policy, BASKET.replace("basket", "drawer"))
    assert length == tokens and np.abs(action - other).max() > 1e-6, "its last word matters"


def test_short_ones_cost_and_say_what_they_did(policy):
    alone, short = act(policy, "pick up the red cube")
    assert short == len(policy.processor.tokens("pick up the red cube")) < 10, "no padding is read"
    beside, long = act(policy, "pick up the red cube", BASKET)
    assert long == len(policy.processor.tokens(BASKET))
    np.testing.assert_allclose(beside[0], alone[0], atol=1e-5)


def test_what_no_position_is_left_for_is_cut(policy, caplog, monkeypatch):
    monkeypatch.setattr("vla.processing.text._told_before", set())
    text = ("pick up the red cube " * 240)[:5000]
    for _ in range(2):
        action, length = act(policy, text)
        assert length == 406 and np.isfinite(action).all()
    assert [message for message in caplog.messages if "cut after 406 tokens" in message] == caplog.messages[-1:]


def test_an_older_checkpoint_reads_as_much(policy, tmp_path):
    policy.vla.save(tmp_path / "policy")
    again = VLAPolicy.load(tmp_path / "policy")
    assert again.processor.config.max_text_tokens == 24 and again.processor.text_limit == 406
    with torch.no_grad():
        np.testing.assert_allclose(act(again, BASKET)[0], act(policy, BASKET)[0], atol=1e-6)
