"""A policy with heat-maps behind the server acts as it does here."""

import numpy as np

from policies.serving.client import PolicyClient
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from tests.vla.training.heatmap.toy_demos import SIZE, toy_demos
from vla.model.heatmap.config import HeatmapConfig
from vla.training.heatmap.train import HeatmapTrainConfig, build


def test_a_client_gets_the_way_to_the_next_keyframe():
    demos = toy_demos()
    config = HeatmapTrainConfig(model=HeatmapConfig(width=16, picture_size=SIZE), pretrained=None)
    policy, obs = build(config, demos), demos.observation([0, 25])
    with (
        serve_in_thread(PolicyServer({"keys": PolicySlot(policy)}, port=0)) as server,
        PolicyClient(server.uri, whole_chunks=True) as client,
    ):
        assert client.spec.depth is True and client.spec.picture_size == SIZE
        np.testing.assert_allclose(client.act(obs), policy.act(obs), atol=1e-5)
