"""examples/libero against a real policy server, with a stand-in for LIBERO's simulator, whose assets are not ours."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.evaluation.evaluate import wilson95
from policies.serving.client import PolicyClient
from policies.serving.server import PolicyServer, serve_in_thread
from vla.core.types import ActionSpec, Observation, PolicySpec

MAIN = Path(__file__).resolve().parents[2] / "examples" / "libero" / "main.py"
NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")


@pytest.fixture(scope="module")
def libero():
    spec = importlib.util.spec_from_file_location("libero_example", MAIN)
    module = sys.modules["libero_example"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class StubLibero:
    """A hand on a line: done when it has come within 5 cm of the goal, which is what the initial state says."""

    def __init__(self) -> None:
        self.actions: list[list[float]] = []
        self.at, self.goal, self.episodes, self.closed, self.seeded, self.looks = 0.0, 0.0, 0, False, None, 0

    def seed(self, seed: int) -> None:
        self.seeded = seed

    def reset(self) -> None:
        self.at, self.episodes = 0.0, self.episodes + 1

    def set_init_state(self, state: float) -> dict[str, np.ndarray]:
        self.goal = state
        return self.observation()

    def observation(self) -> dict[str, np.ndarray]:
        scene = np.zeros((16, 16, 3), np.uint8)
        scene[:4, :4] = 200  # top left as LIBERO draws it, upside down
        return {
            "agentview_image": scene,
            "robot0_eye_in_hand_image": np.full((16, 16, 3), 90, np.uint8),
            "robot0_eef_pos": np.array([self.at, self.goal, 1.0]),
            "robot0_eef_quat": np.array([np.sin(0.5), 0.0, 0.0, np.cos(0.5)]),
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }

    def step(self, action: list[float]) -> tuple[dict[str, np.ndarray], float, bool, dict]:
        self.actions.append(action)
        self.at += 0.1 * action[0]
        done = abs(self.at - self.goal) < 0.05
        return self.observation(), float(done), done, {}

    def look(self, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.looks += 1
        return raw

    def close(self) -> None:
        self.closed = True


class TowardTheGoal:
    """Chunks of 10 steps toward the goal it reads from the state; remembers what it was shown."""

    def __init__(self, dim: int = 7, cameras: tuple[str, ...] = ("front", "wrist")) -> None:
        self.seen: list[Observation] = []
        self.dim = dim
        spec = ActionSpec(NAMES[:dim], (-1.0,) * dim, (1.0,) * dim, control_hz=20.0)
        self.spec = PolicySpec(spec, cameras=cameras, proprio_dim=8)

    def reset(self, env_ids=None) -> None: ...

    def act(self, obs: Observation) -> np.ndarray:
        self.seen.append(obs)
        chunk = np.zeros((1, 10, self.dim), np.float32)
        chunk[..., 0] = np.sign(obs.proprio[0, 1] - obs.proprio[0, 0]) if obs.proprio[0, 1] > 0 else 0.0
        return chunk


def served(policy: TowardTheGoal) -> PolicyServer:
    return PolicyServer(policy, port=0, metadata={"policy": "stub"})


def test_a_suite_is_played_and_counted_over_a_real_server(libero) -> None:
    policy, made = TowardTheGoal(), []

    def make() -> StubLibero:
        made.append(StubLibero())
        return made[-1]

    tasks = [
        libero.Task("near", "go to the near goal", [1.0, 0.5, 9.9], make),
        libero.Task("nowhere", "stay where you are", [-1.0, -1.0], make),
    ]
    rules = libero.Rules(horizon=30, n_action_steps=4, image_size=8)
    with serve_in_thread(served(policy)) as server, PolicyClient(server.uri) as client:
        so_far = []
        report = libero.evaluate(tasks, client, rules, episodes_per_task=2, on_task=so_far.append)
        with pytest.raises(ValueError, match="nowhere has 2 initial states"):
            libero.evaluate(tasks[1:], client, rules, episodes_per_task=3)
    assert report["per_task"]["near"]["successes"] == 2 and report["per_task"]["nowhere"]["successes"] == 0
    assert (report["successes"], report["episodes"], report["success_rate"]) == (2, 4, 0.5)
    assert report["wilson95"] == pytest.approx(wilson95(2, 4))
    assert report["mean_steps"] == (10 + 5) / 2 and report["policy"] == "stub"
    assert {"backend", "per_task", "seeds", "deterministic", "horizon", "n_action_steps", "controls"} <= set(report)
    assert json.loads(json.dumps(report)) == report
    near, nowhere = made
    assert near.closed and nowhere.closed and near.seeded == 7 and near.episodes == 2
    # Ten idle steps with open fingers, then decisions: 3 of 4 steps until the goal at 1.0, 8 of at most 4 until 30.
    assert near.actions[:10] == [[0.0] * 6 + [-1.0]] * 10 and near.actions[10] == [1.0] + [0.0] * 6
    assert len(near.actions) == (10 + 10) + (10 + 5) and len(nowhere.actions) == 2 * (10 + 30)
    # One decision per sentence beforehand, from black pictures.
    assert report["decisions"] == len(policy.seen) - 2 == 3 + 2 + 2 * 8
    assert (near.looks, nowhere.looks) == (3 + 2, 2 * 8) and not policy.seen[0].images["front"].any()
    assert [(r["tasks_left"], r["successes"], r["episodes"]) for r in so_far] == [(1, 2, 2), (0, 2, 4)]
    assert report["initial_states"] == "published" and report["mujoco"]
    assert report["control_steps"] == 10 + 5 + 2 * 30


def test_what_travels_is_upright_resized_and_in_the_datasets_units(libero) -> None:
    policy, simulation = TowardTheGoal(), StubLibero()
    with serve_in_thread(served(policy)) as server, PolicyClient(server.uri) as client:
        libero.play(simulation, 0.3, "go there", client, libero.Rules(horizon=4, image_size=8))
    obs = policy.seen[0]
    assert obs.instruction == ["go there"]
    front = obs.images["front"][0]
    assert front.shape == (8, 8, 3) and front[-1, -1, 0] == 200 and front[0, 0, 0] == 0
    assert (obs.images["wrist"] == 90).all()
    # 1 rad about x: quaternion (sin 0.5, 0, 0, cos 0.5).
    assert obs.proprio[0] == pytest.approx([0.0, 0.3, 1.0, 1.0, 0.0, 0.0, 0.04, -0.04], abs=1e-6)


def test_images_keep_their_shape_on_a_black_border(libero) -> None:
    wide = libero.resized(np.full((10, 20, 3), 255, np.uint8), 8)
    assert wide.shape == (8, 8, 3) and (wide[2:6] == 255).all() and not wide[:2].any() and not wide[6:].any()


def test_a_policy_of_one_camera_gets_the_scene_and_a_silent_server_openpis_keys(libero) -> None:
    raw = StubLibero().observation()
    policy = TowardTheGoal(cameras=("top",))
    with serve_in_thread(served(policy)) as server, PolicyClient(server.uri) as client:
        message = libero.observe(raw, "go", libero.observation_keys(client.metadata), 8)
        assert set(message) == {"images/top", "state", "prompt"}
        client.infer(message)
    message = libero.observe(raw, "go", libero.observation_keys({}), 8)
    assert set(message) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}


def test_a_policy_that_does_not_fit_is_refused(libero) -> None:
    with serve_in_thread(served(TowardTheGoal(dim=4))) as server, PolicyClient(server.uri) as client:
        with pytest.raises(ValueError, match="LIBERO takes 7 action components, this policy has 4"):
            libero.play(StubLibero(), 0.3, "go", client, libero.Rules(horizon=4))
    with pytest.raises(ValueError, match="wants 3: a, b, c"):
        libero.observation_keys({"cameras": ["a", "b", "c"]})


def test_a_sentence_that_is_too_long_is_refused_before_the_first_episode(libero) -> None:
    class ShortOfBreath(TowardTheGoal):
        def act(self, obs: Observation) -> np.ndarray:
            if len(obs.instruction[0]) > 10:
                raise ValueError(f"the instruction {obs.instruction[0]!r} is too long")
            return super().act(obs)

    made = []
    tasks = [libero.Task(name, text, [1.0], lambda: made.append(1)) for name, text in (("a", "go"), ("b", "go " * 9))]
    with serve_in_thread(served(ShortOfBreath())) as server, PolicyClient(server.uri) as client:
        with pytest.raises((ValueError, RuntimeError), match="too long"):
            libero.evaluate(tasks, client, libero.Rules(horizon=4, image_size=8), episodes_per_task=1)
    assert made == []


def test_the_wrist_is_known_by_its_name(libero) -> None:
    for cameras, scene in (
        (("front", "wrist"), "front"),
        (("wrist_image", "image"), "image"),
        (("image", "image2"), "image"),
    ):
        keys = libero.observation_keys({"cameras": list(cameras)})
        assert keys["scene"] == f"images/{scene}" and keys["wrist"] != keys["scene"]


def test_wilson_is_the_one_of_the_evaluation(libero) -> None:
    for k, n in ((0, 0), (0, 10), (3, 10), (10, 10), (437, 500)):
        assert libero.wilson95(k, n) == pytest.approx(wilson95(k, n))
