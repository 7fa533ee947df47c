"""A policy that is guided towards good actions, as a graph that takes any number of observations."""

from __future__ import annotations

import torch

from policies.export.exporter import network_of
from policies.export.graphs import trace
from tests.vla.toy_backbone import toy_observation, toy_vla
from vla.model.config import AdvantageConfig, BridgeConfig


def test_a_guided_policy_is_a_graph_for_any_batch():
    bridge = BridgeConfig(width=16, heads=2, kv_heads=1, gate_init=0.5)
    vla = toy_vla(bridge=bridge, advantage=AdvantageConfig(3.0)).eval()
    torch.nn.init.normal_(vla.bridge.advantage.good.weight)
    module = trace(network_of(vla)).module()
    for batch in (1, 3):
        inp = vla.processor.prepare(toy_observation(batch))
        with torch.no_grad():
            told = vla.act(vla.encode_as_is(inp), inp.proprio_BP)
            torch.testing.assert_close(module(*inp.arrays), told, atol=1e-5, rtol=1e-4)
