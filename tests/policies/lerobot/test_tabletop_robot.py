"""The simulated robot in LeRobot's own tools: recorded by lerobot-record, driven by lerobot-rollout."""

import sys

import numpy as np
import pytest

from policies.controller import ControlConfig, control
from policies.robots import LeRobotRobot
from vla.data import load_dataset

QUIET = ("--play_sounds=false",)


def run_tool(module, *args):
    """The command-line tool `lerobot.scripts.MODULE`, in this process."""
    from importlib import import_module

    tool = import_module(f"lerobot.scripts.{module}")
    before = sys.argv
    sys.argv = [module, *args]
    try:
        tool.main()
    finally:
        sys.argv = before


def robot_flags(folder):
    calibration = (f"--robot.calibration_dir={folder}", f"--teleop.calibration_dir={folder}")
    return ("--robot.type=bascule_tabletop", "--robot.id=sim", "--robot.image_size=32", *calibration)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    run_tool(
        "lerobot_record",
        *robot_flags(folder),
        *("--teleop.type=bascule_expert", "--teleop.id=expert", "--dataset.repo_id=local/rec"),
        *(f"--dataset.root={folder / 'set'}", "--dataset.single_task=pick up the thing", "--dataset.fps=20"),
        *("--dataset.episode_time_s=1.5", "--dataset.reset_time_s=0.1", "--dataset.num_episodes=2"),
        *("--dataset.video=false", "--dataset.push_to_hub=false", *QUIET),
    )
    return folder / "set"


def test_lerobot_record_makes_a_dataset_that_we_read(recording):
    data = load_dataset(recording)
    assert len(data.episodes) == 2 and set(data.instruction) == {"pick up the thing"}
    assert data.action_names == ("dx.vel", "dy.vel", "dz.vel", "gripper.pos")
    assert data.proprio.shape[1] == 8 and data.images["front"].shape[1:] == (32, 32, 3)
    # The expert moved the hand, and the hand followed: what was commanded shows in what was measured.
    assert np.abs(data.action[:, :3]).max() > 0.3
    assert np.ptp(data.proprio[:, 2]) > 0.01 and data.images["front"].std() > 5


@pytest.fixture(scope="module")
def trained(recording, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    run_tool(
        "lerobot_train",
        *("--policy.type=bascule", "--policy.device=cpu", "--policy.push_to_hub=false", "--policy.bridge_width=32"),
        *("--dataset.repo_id=local/rec", f"--dataset.root={recording}", f"--output_dir={out}"),
        *("--steps=1", "--batch_size=4", "--num_workers=0", "--env_eval_freq=0"),
    )
    return out / "checkpoints" / "000001" / "pretrained_model"


@pytest.mark.parametrize(
    "inference", [(), ("--inference.type=rtc", "--inference.rtc.execution_horizon=6", "--inference.queue_threshold=5")]
)
def test_lerobot_rollout_drives_it_with_a_policy_trained_on_the_recording(trained, tmp_path, monkeypatch, inference):
    from policies.lerobot import tabletop

    sent = []
    send = tabletop.BasculeTabletop.send_action
    monkeypatch.setattr(
        tabletop.BasculeTabletop, "send_action", lambda self, action: sent.append(send(self, action)) or sent[-1]
    )
    run_tool(
        "lerobot_rollout",
        *(f"--policy.path={trained}", *robot_flags(tmp_path)[:-1], "--strategy.type=base", "--device=cpu"),
        *("--task=pick up the thing", "--fps=20", "--duration=2", *inference, *QUIET),
    )
    actions = np.array([list(action.values()) for action in sent])
    assert len(actions) >= 3 and np.isfinite(actions).all() and np.abs(actions).max() <= 1
    assert np.abs(actions[:, :3]).max() > 0 and tabletop._running == []


def test_the_controller_drives_a_lerobot_robot():
    from lerobot.robots.robot import Robot

    class Arm(Robot):
        """Two joints that follow at once, and a camera."""

        observation_features = {"a.pos": float, "b.pos": float, "top": (4, 4, 3)}
        action_features = {"b.pos": float, "a.pos": float}
        is_connected = is_calibrated = False

        def __init__(self):
            self.at, self.sent = {"a.pos": 0.5, "b.pos": -0.5}, []

        def connect(self, calibrate=True):
            self.is_connected = True

        def disconnect(self):
            self.is_connected = False

        def calibrate(self): ...

        def configure(self): ...

        def __del__(self): ...

        def get_observation(self):
            return {**self.at, "top": np.full((4, 4, 3), 7, np.uint8)}

        def send_action(self, action):
            self.sent.append(dict(action))
            self.at.update(action)
            return action

    class Toward:
        def reset(self, env_ids=None): ...

        def act(self, obs):
            assert obs.instruction == ["home"] and obs.images["top"].shape == (1, 4, 4, 3)
            assert obs.proprio.shape == (1, 2)
            return np.array([[[1.0, 9.0]] * 4], np.float32)

    limits = {"a.pos": (-1, 0.75), "b.pos": (-1, 1)}
    arm = Arm()
    robot = LeRobotRobot(arm, instruction="home", control_hz=100, limits=limits)
    assert robot.action_spec.names == ("b.pos", "a.pos") and robot.proprio_names == ("a.pos", "b.pos")
    config = ControlConfig(duration_s=0.05, policy_hz=50, asynchronous=False)
    report = control(robot, Toward(), config, sleep=lambda _: None)
    # From where it stood, through the middle, to the target; and never beyond the limit it was given.
    assert arm.sent[0] == {"b.pos": pytest.approx(0.25), "a.pos": pytest.approx(0.75)}
    assert arm.sent[1] == {"b.pos": 1.0, "a.pos": 0.75} and report.guards["action_limit"] == report.ticks
    assert not arm.is_connected
    with pytest.raises(ValueError, match="'a.pos' has no limits"):
        LeRobotRobot(arm, instruction="home", control_hz=100, limits={"b.pos": (-1, 1)})
