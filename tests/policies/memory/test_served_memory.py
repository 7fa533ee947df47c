"""A policy that remembers behind the server: every connection, and every robot of one, has its own episode."""

import numpy as np
import pytest

from policies.serving.client import PolicyClient
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from tests.vla.memory.test_policy import moments, played, remembering
from vla.model.policy import VLAPolicy

FIRST, SECOND = moments(4, seed=1), moments(4, seed=2)


@pytest.fixture(scope="module")
def vla():
    return remembering()


@pytest.fixture
def server(vla):
    policy = VLAPolicy(vla)
    with serve_in_thread(PolicyServer({"mind": PolicySlot(policy)}, port=0)) as server:
        server.policy = policy
        yield server


def alone(vla, observations):
    return played(VLAPolicy(vla), observations)


def test_clients_that_take_turns_do_not_see_each_others_past(server, vla):
    with PolicyClient(server.uri) as one, PolicyClient(server.uri) as other:
        assert one.spec.memory_frames == 3
        chunks = [(one.act(first), other.act(second)) for first, second in zip(FIRST, SECOND, strict=True)]
    for which, observations in enumerate((FIRST, SECOND)):
        got = np.stack([pair[which] for pair in chunks])
        np.testing.assert_allclose(got, alone(vla, observations), atol=1e-5)


def test_a_reset_begins_another_episode_and_a_new_connection_does(server, vla):
    with PolicyClient(server.uri) as client:
        played(client, FIRST)
        client.reset()
        np.testing.assert_allclose(played(client, SECOND), alone(vla, SECOND), atol=1e-5)
    with PolicyClient(server.uri) as client:
        np.testing.assert_allclose(played(client, SECOND), alone(vla, SECOND), atol=1e-5)


def test_what_a_client_left_behind_is_forgotten(server):
    with PolicyClient(server.uri) as client:
        played(client, FIRST)
        assert len(server.policy.memory._recalls) == 1
    with PolicyClient(server.uri) as other:  # whose answer comes after the first's end was seen to
        for _ in range(20):
            other.act(SECOND[0])
            if len(server.policy.memory._recalls) == 1:
                break
        assert len(server.policy.memory._recalls) == 1


def test_robots_of_one_client_are_told_apart_by_their_row(server, vla):
    both = moments(3, batch=2, seed=3)
    with PolicyClient(server.uri) as client:
        got = played(client, both)
        np.testing.assert_allclose(got, alone(vla, both), atol=1e-5)
        obs = {"images": {name: image[0] for name, image in FIRST[0].images.items()}, "state": FIRST[0].proprio[0]}
        for wrong, words in (({"row": -1}, "row: expected a whole number"), ({"reset": 1}, "reset: expected true")):
            with pytest.raises(RuntimeError, match=words):
                client.infer({**obs, "prompt": "pick up", **wrong})


def test_another_cadence_than_that_of_training_is_not_served(vla):
    with pytest.raises(ValueError, match="leave out --n-action-steps 1"):
        PolicySlot(VLAPolicy(vla), n_action_steps=1)
