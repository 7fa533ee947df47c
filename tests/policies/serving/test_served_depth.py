"""A policy that reads depth behind the server: clients send it, and are told what they lack."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from policies.serving.client import PolicyClient
from policies.serving.layouts import ObservationReader
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from tests.vla.depth_policy import observation, policy
from tests.vla.toy_backbone import CAMERAS
from tests.vla.training.heatmap.toy_demos import SIZE, toy_demos
from vla.core.compatibility import require_same
from vla.core.types import PolicySpec
from vla.model.heatmap.config import HeatmapConfig
from vla.model.policy import VLAPolicy
from vla.training.heatmap.train import HeatmapTrainConfig, build


@pytest.fixture(scope="module")
def server():
    with serve_in_thread(PolicyServer({"deep": PolicySlot(VLAPolicy(policy()))}, port=0)) as server:
        yield server


def test_a_client_sends_depth_and_calibration_and_gets_the_policys_actions(server):
    obs = observation()
    with PolicyClient(server.uri, whole_chunks=True) as client:
        assert client.spec.depth is True and client.metadata["depth"] is True
        assert "extrinsics/front" in client.metadata["observation_keys"]
        np.testing.assert_allclose(client.act(obs), VLAPolicy(policy()).act(obs), atol=1e-5)


def test_a_policy_with_heat_maps_is_served_like_any_other():
    demos = toy_demos()
    config = HeatmapTrainConfig(model=HeatmapConfig(width=16, picture_size=SIZE), pretrained=None)
    keys, obs = build(config, demos), demos.observation([0, 25])
    with (
        serve_in_thread(PolicyServer({"keys": PolicySlot(keys)}, port=0)) as server,
        PolicyClient(server.uri, whole_chunks=True) as client,
    ):
        assert client.spec.depth is True and client.spec.picture_size == SIZE
        np.testing.assert_allclose(client.act(obs), keys.act(obs), atol=1e-5)


@pytest.mark.parametrize("name", ["depth", "intrinsics", "extrinsics"])
def test_what_a_client_lacks_is_named_and_costs_no_connection(server, name):
    obs = observation()
    with PolicyClient(server.uri) as client:
        with pytest.raises(RuntimeError, match=f"missing key '{name}/front'"):
            client.act(replace(obs, **{name: None}))
        assert client.act(obs).shape[0] == 3


def warnings(client, obs):
    """The warnings in the answer to the first of the observations."""
    message = {"state": obs.proprio[0], "prompt": obs.instruction[0]}
    parts = ("images", "depth", "intrinsics", "extrinsics")
    message |= {f"{part}/{name}": value[0] for part in parts for name, value in getattr(obs, part).items()}
    return client.infer(message).get("warnings", [])


def test_depth_that_tells_nothing_and_a_state_in_another_unit_are_told(server):
    obs = observation()
    with PolicyClient(server.uri) as client:
        assert warnings(client, obs) == []
        for scale in (1000, 0, np.nan, -1):
            depth = {camera: scale * depth for camera, depth in obs.depth.items()}
            said = warnings(client, replace(obs, depth=depth))
            assert [line.split(" in any pixel")[0] for line in said] == [
                f"camera '{camera}' measures no depth between 0.01 and 10 m" for camera in CAMERAS
            ]
        (said,) = warnings(client, replace(obs, proprio=obs.proprio + [0, 0, 1e30, 0, 0]))
        assert said.startswith("state component 2 is 1e+30, in training it was") and "another unit" in said
        large = {camera: matrix * np.float32([[8], [8], [1]]) for camera, matrix in obs.intrinsics.items()}
        assert "principal point" in warnings(client, replace(obs, intrinsics=large))[0]


def test_matrices_that_cannot_be_true_get_one_line(server):
    obs = observation()
    with PolicyClient(server.uri) as client:
        for part, words in (
            ("intrinsics", "have no focal length: fx and fy must be positive"),
            ("extrinsics", "no pose"),
        ):
            nothing = {camera: 0 * matrix for camera, matrix in getattr(obs, part).items()}
            with pytest.raises(RuntimeError, match=f"the {part} of camera 'front' .*{words}"):
                client.act(replace(obs, **{part: nothing}))
        assert client.act(obs).shape[0] == 3


def test_whole_numbers_are_millimetres_and_shapes_are_checked():
    reader = ObservationReader(CAMERAS, depth=True)
    obs = observation()
    message = {f"images/{c}": obs.images[c][0] for c in CAMERAS} | {"state": obs.proprio[0], "prompt": "go"}
    message |= {f"{part}/{c}": getattr(obs, part)[c][0] for part in ("intrinsics", "extrinsics") for c in CAMERAS}
    depth = {f"depth/{c}": np.full((8, 8), 1234, np.uint16) for c in CAMERAS}
    read = reader.read(message | depth)
    assert read.depth["wrist"].shape == (1, 8, 8) and read.depth["wrist"][0, 0, 0] == pytest.approx(1.234)
    np.testing.assert_array_equal(read.extrinsics["front"], obs.extrinsics["front"][:1])
    for wrong, words in (
        ({"depth/front": np.zeros((8, 8, 1), np.float32)}, "depth/front: expected an array"),
        ({"depth/front": "far"}, "depth/front: expected an array"),
        ({"extrinsics/wrist": np.eye(3)}, "extrinsics/wrist: expected shape"),
    ):
        with pytest.raises(ValueError, match=words):
            reader.read(message | depth | wrong)
    plain = ObservationReader(CAMERAS).read(message | depth)  # nobody asked for them
    assert plain.depth is None and plain.extrinsics is None


class Robot:
    def __init__(self, **facts):
        vars(self).update(facts)


def test_a_robot_that_gives_no_depth_is_refused_in_one_line():
    reads = PolicySpec(depth=True)
    with pytest.raises(ValueError, match="the policy reads depth .* the robot gives none: drive a robot of your own"):
        require_same(reads, Robot(gives_depth=False), where="robot")
    require_same(reads, Robot(), where="robot")  # a robot of the user's own does not say
    require_same(PolicySpec(), Robot(gives_depth=False), where="robot")
