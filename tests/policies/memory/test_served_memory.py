"""A policy that remembers behind the server: every connection, and every robot of one, has its own episode."""

import numpy as np
import pytest
import torch

from policies.serving.client import PolicyClient
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from tests.vla.memory.test_policy import moments, played, remembering
from tests.vla.modulators.test_pool import modulated
from tests.vla.toy_backbone import toy_observation
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


def test_a_connection_that_is_lost_takes_its_memory_with_it_and_the_client_says_so(server, vla, caplog):
    with PolicyClient(server.uri) as client:
        client.act(FIRST[0])
        client._connection.socket.close()  # a cable that was pulled
        client.act(FIRST[1])
        assert "lost in the middle of an episode, and with it what the policy had kept" in caplog.text
        caplog.clear()
        client.reset()
        client._connection.socket.close()
        client.act(FIRST[0])
        # LeRobot's own logging, once a test of its has begun it, has websockets tell every frame
        ours = [record for record in caplog.records if not record.name.startswith(("websockets", "asyncio"))]
        assert not ours, "between two episodes nothing is lost"


def test_clients_of_a_policy_with_modulators_have_choices_of_their_own():
    policy, asked = VLAPolicy(modulated().eval()), []

    def rule(pool, query):
        asked.append(len(query))
        return torch.full((len(query),), len(asked) % 2)

    policy.routing.rule = rule
    obs, slot = toy_observation(1), PolicySlot(policy)
    assert slot.metadata["episodes"] and "memory_frames" not in slot.metadata
    with serve_in_thread(PolicyServer({"mind": slot}, port=0)) as server, PolicyClient(server.uri) as one:
        assert one.spec.routes and one.spec.episodic and one.spec.memory_frames is None
        first = one.act(obs)
        with PolicyClient(server.uri) as other:
            second = other.act(obs)
            assert asked == [1, 1] and not np.allclose(first, second)
            np.testing.assert_allclose(one.act(obs), first, atol=1e-5)
            np.testing.assert_allclose(other.act(obs), second, atol=1e-5)
            assert asked == [1, 1]
            one.reset()
            one.act(obs)
            assert asked == [1, 1, 1], "another episode, with the same words"
