"""A policy looks through cameras that are called otherwise than in training, or are lacking."""

from dataclasses import replace

import numpy as np
import pytest

from policies.serving.client import PolicyClient
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from tests.vla.depth_policy import observation, policy
from vla.model.policy import VLAPolicy
from vla.processing.cameras.camera_map import CameraMap

ROBOTS = CameraMap.parse(["front=cam_high", "wrist=none"])


def renamed(given):
    return {"cam_high": given["front"], "other": given["wrist"]}


def robots(obs):
    """The observation as a robot gives it that has no wrist camera, and another one instead."""
    views = {name: renamed(getattr(obs, name)) for name in ("depth", "intrinsics", "extrinsics")}
    return replace(obs, images=renamed(obs.images), **views)


def of_training():
    """An observation with the same front camera, and a wrist camera that shows and measures nothing."""
    obs = observation()
    black, nothing = np.zeros_like(obs.images["wrist"]), np.zeros_like(obs.depth["wrist"])
    eye = {name: np.tile(np.eye(n, dtype=np.float32), (3, 1, 1)) for name, n in (("intrinsics", 3), ("extrinsics", 4))}
    return replace(
        obs,
        images=obs.images | {"wrist": black},
        depth=obs.depth | {"wrist": nothing},
        **{name: getattr(obs, name) | {"wrist": matrix} for name, matrix in eye.items()},
    )


def test_a_policy_reads_the_robots_cameras_and_black_where_there_is_none(caplog):
    ours = VLAPolicy(policy())
    ours.look_through(ROBOTS)
    assert ours.spec.cameras == ("cam_high",)
    assert "sees 'wrist' black" in caplog.text
    np.testing.assert_array_equal(ours.act(robots(observation())), VLAPolicy(policy()).act(of_training()))


def test_two_cameras_that_changed_names_are_read_in_the_policys_order():
    obs = observation()
    ours = VLAPolicy(policy())
    ours.look_through(CameraMap.parse(["front=wrist, wrist=front"]))
    crossed = {
        name: {"front": getattr(obs, name)["wrist"], "wrist": getattr(obs, name)["front"]}
        for name in ("images", "depth", "intrinsics", "extrinsics")
    }
    assert ours.spec.cameras == ("wrist", "front")
    np.testing.assert_array_equal(ours.act(replace(obs, **crossed)), VLAPolicy(policy()).act(obs))


def test_a_server_tells_clients_the_new_names():
    ours = VLAPolicy(policy())
    ours.look_through(ROBOTS)
    with serve_in_thread(PolicyServer({"p": PolicySlot(ours)}, port=0)) as server, PolicyClient(server.uri) as client:
        assert client.spec.cameras == ("cam_high",)
        np.testing.assert_allclose(client.act(robots(observation())), ours.act(robots(observation())), atol=1e-5)


def test_a_client_renames_for_a_server_that_cannot():
    with serve_in_thread(PolicyServer({"p": PolicySlot(VLAPolicy(policy()))}, port=0)) as server:
        both = CameraMap.parse(["front=a,wrist=b"])
        obs = observation()
        given = {
            name: {"a": getattr(obs, name)["front"], "b": getattr(obs, name)["wrist"]}
            for name in ("images", "depth", "intrinsics", "extrinsics")
        }
        with PolicyClient(server.uri, cameras=both) as client:
            assert client.spec.cameras == ("a", "b")
            np.testing.assert_allclose(client.act(replace(obs, **given)), VLAPolicy(policy()).act(obs), atol=1e-5)
            with pytest.raises(ValueError, match="lacks camera 'a'; it has front, wrist"):
                client.act(obs)
        with pytest.raises(ValueError, match="reads depth, and the server must know of a camera that is lacking"):
            PolicyClient(server.uri, cameras=ROBOTS)
        with pytest.raises(ValueError, match=r"unknown camera of the policy 'top'"):
            PolicyClient(server.uri, cameras=CameraMap.parse(["top=a"]))


def test_a_client_sends_black_pictures_of_a_camera_that_is_lacking():
    plain = PolicyClient.__new__(PolicyClient)
    plain._cameras, plain.metadata = ROBOTS, {"cameras": ["front", "wrist"]}
    sent = plain._message(robots(observation()), 1)["images"]
    np.testing.assert_array_equal(sent["front"], observation().images["front"][1])
    assert list(sent) == ["front", "wrist"] and not sent["wrist"].any() and sent["wrist"].shape == sent["front"].shape


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (["front"], "does not say which camera"), (["=a"], "does not say which camera"),
        (["front=a", "front=b"], "'front' twice"), (["fron=a"], "did you mean 'front'"),
        (["front=wrist"], "'front' and 'wrist' would both look through 'wrist'"),
        (["front=none,wrist=none"], "without any camera"),
    ],
)  # fmt: skip
def test_a_map_that_cannot_be_is_refused(entries, told):
    with pytest.raises(ValueError, match=told):
        CameraMap.parse(entries).laid(("front", "", "wrist"))


def test_views_that_the_policy_itself_lacks_stay_black():
    assert ROBOTS.laid(("", "front", "wrist")) == ("", "cam_high", "")
