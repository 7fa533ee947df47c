"""`vla control` and `vla lerobot` as a user runs them: a checkpoint, the simulated robot, the log, the exit code."""

import json

import numpy as np
import pytest

from policies.server import PolicyServer, serve_in_thread
from vla.bridge import BridgeConfig
from vla.cli import main
from vla.model import VLA, VLAConfig, VLAPolicy
from vla.processor import Stats
from vla.types import ActionSpec

SPEC = ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, 20.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(50, 8)), rng.uniform(-1, 1, (50, 4)))
    config = VLAConfig(bridge=BridgeConfig(width=32), head="flow")
    vla = VLA.build(config, stats=stats, action_spec=SPEC, cameras=("front", "wrist"))
    folder = tmp_path_factory.mktemp("ckpt") / "policy"
    vla.save(folder)
    return folder


def test_a_checkpoint_drives_the_simulated_robot_and_the_log_replays(checkpoint, tmp_path, capsys):
    log, report = tmp_path / "log.jsonl", tmp_path / "report.json"
    args = ["--duration-s", "2", "--give-up-s", "9", "--log", str(log), "--json", str(report), "--join", "rtc"]
    assert main(["control", str(checkpoint), *args, "--velocity", "dx", "3"]) == 0
    written = json.loads(report.read_text())
    assert written["report"]["ended"] in ("time", "done") and written["report"]["answers"] >= 1
    assert written["success"] is False and "ticks" in capsys.readouterr().out
    actions = [json.loads(line)["decision"]["action"] for line in log.read_text().splitlines() if "inputs" in line]
    assert len(actions) == written["report"]["ticks"] and np.abs(np.array(actions)[:, 0]).max() <= 3 / 50 + 1e-6
    assert main(["control", str(log), "--replay"]) == 0
    as_dataset(log, tmp_path / "set", actions)
    log.write_text(log.read_text().replace('"dx": 3.0', '"dx": 0.001', 1))
    assert main(["control", str(log), "--replay"]) == 1


def as_dataset(log, folder, actions):
    """The run as a LeRobotDataset: every tick, what was sent, and the frame that was seen last."""
    from policies.blackbox import frames_file
    from vla.data import load_dataset

    assert main(["control", str(log), "--to-dataset", str(folder)]) == 0
    data = load_dataset(folder)
    np.testing.assert_array_equal(data.action, np.array(actions, np.float32))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ticks = [line for line in lines if "inputs" in line]
    np.testing.assert_array_equal(data.proprio, np.array([t["inputs"]["proprio"] for t in ticks], np.float32))
    raw = np.fromfile(frames_file(log), np.uint8).reshape(-1, 2, 84, 84, 3)
    shown = [tick["frame"] for tick in ticks]
    assert len(raw) == shown[-1] + 1 <= len(ticks), "each picture is kept once"
    np.testing.assert_array_equal(data.images["wrist"][[0, -1]], raw[[shown[0], shown[-1]], 1])
    assert set(data.instruction) == {next(line["task"] for line in lines if "task" in line)}
    assert main(["control", str(log), "--to-dataset", str(folder)]) == 2, "never over another one"


def test_a_server_drives_it_and_an_estop_ends_it(checkpoint, tmp_path):
    policy = VLAPolicy.load(checkpoint)
    server = PolicyServer(policy, action_spec=SPEC, cameras=policy.cameras, port=0, proprio_dim=8)
    stop, report = tmp_path / "estop", tmp_path / "report.json"
    with serve_in_thread(server):
        args = ["control", server.uri, "--estop-file", str(stop), "--give-up-s", "9", "--json", str(report)]
        assert main([*args, "--duration-s", "1", "--dry-run"]) == 0
        stop.touch()
        assert main([*args, "--duration-s", "5"]) == 1
    assert json.loads(report.read_text())["report"]["guards"] == {"estop": 1}


def test_mistakes_are_one_line(checkpoint, tmp_path, capsys):
    assert main(["control", str(checkpoint), "--workspace", "grip_z=1"]) == 2
    assert main(["control", str(tmp_path), "--replay"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and "NAME:LOW:HIGH" in errors[0]
