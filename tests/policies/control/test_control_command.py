"""`vla control` and `vla lerobot` as a user runs them: a checkpoint, the simulated robot, the log, the exit code."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bascule.commands.control import Control
from bascule.main import main
from policies.control.config import ControlConfig
from policies.control.flight_log import read
from policies.control.guards import GuardConfig
from policies.load import load_policy
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from vla.core.types import ActionSpec, PolicySpec
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.processor import Stats

SPEC = ActionSpec(("dx", "dy", "dz", "gripper"), (-1.0,) * 4, (1.0,) * 4, 20.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(50, 8)), rng.uniform(-1, 1, (50, 4)))
    config = VLAConfig("tiny", BridgeConfig(width=32), head="flow", chunk_size=12, n_action_steps=4)
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
    as_dataset(log, tmp_path / "set", actions, capsys)
    (tmp_path / "cut.jsonl").write_text(log.read_text()[:-3])
    assert main(["control", str(tmp_path / "cut.jsonl"), "--replay"]) == 1
    assert "cut.jsonl is incomplete: it breaks off after" in capsys.readouterr().err
    log.write_text(log.read_text().replace('"dx": 3.0', '"dx": 0.001', 1))
    assert main(["control", str(log), "--replay"]) == 1


def test_flags_become_the_configuration_of_the_same_names():
    command = Control(
        "x", stop_s=0.7, velocity={"dx": 3.0}, workspace=("grip_z:0:0.4",), blend_steps=5, dry_run=True, duration_s=9.0
    )
    guards = command._guards()
    assert guards == GuardConfig(stop_s=0.7, velocity={"dx": 3.0}, workspace={"grip_z": (0.0, 0.4)})
    spec = PolicySpec(action_spec=SPEC, n_action_steps=4)
    assert command._config(guards, SimpleNamespace(spec=spec)) == ControlConfig(
        duration_s=9.0, policy_hz=20.0, n_action_steps=4, blend_steps=5, dry_run=True, guards=guards
    )


def as_dataset(log, folder, actions, capsys):
    """The run as a LeRobotDataset: every tick, what was sent, and the frame that was seen last."""
    from policies.control.flight_log import frames_file
    from vla.data.lerobot_dataset import load_dataset

    capsys.readouterr()
    assert main(["control", str(log), "--to-dataset", str(folder)]) == 0
    assert "Map" not in capsys.readouterr().err, "another package's progress bars"
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
    assert json.loads((folder / "meta" / "info.json").read_text())["fps"] == 50
    slow = log.with_name("slow.jsonl")  # the same ticks, at two fifths of the declared rate
    frames_file(slow).write_bytes(frames_file(log).read_bytes())
    for number, tick in enumerate(ticks):
        tick["inputs"]["now_s"] = number / 20
    slow.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["control", str(slow), "--to-dataset", str(folder.with_name("slow"))]) == 0
    assert json.loads((folder.with_name("slow") / "meta" / "info.json").read_text())["fps"] == 20
    frames_file(slow).unlink()
    capsys.readouterr()
    assert main(["control", str(slow), "--to-dataset", str(folder.with_name("blind"))]) == 2
    assert "slow.jsonl is without its pictures: put slow.jsonl.frames" in capsys.readouterr().err


def test_a_server_drives_it_and_an_estop_ends_it(checkpoint, tmp_path):
    server = PolicyServer({"flow": PolicySlot.of_folder(checkpoint, load=load_policy)}, port=0)
    stop, report, log = tmp_path / "estop", tmp_path / "report.json", tmp_path / "log.jsonl"
    with serve_in_thread(server):
        args = ["control", f"{server.uri}/flow", "--estop-file", str(stop), "--give-up-s", "9", "--json", str(report)]
        assert main([*args, "--duration-s", "1", "--dry-run", "--log", str(log)]) == 0
        stop.touch()
        assert main([*args, "--duration-s", "5"]) == 1
    assert json.loads(report.read_text())["report"]["guards"] == {"estop": 1}
    header, lines = read(log)
    # Whole chunks to play while an answer is on its way, though the next is asked for when 4 actions were played.
    assert header["control"]["n_action_steps"] == 4 and header["control"]["policy_hz"] == 20.0
    assert max(line["plan"]["remaining"] for line in lines if "plan" in line) > 4


def test_a_camera_that_the_robot_calls_otherwise_is_told_and_can_be_named(checkpoint, capsys):
    """Before anything moves, whatever the policy's server would say of the first observation."""
    vla = VLA.load(checkpoint)
    vla.processor.config = replace(vla.processor.config, cameras=("top", "wrist"))
    other = PolicyServer(VLAPolicy(vla), port=0)
    with serve_in_thread(other):
        assert main(["control", other.uri, "--duration-s", "2"]) == 2
        assert "it lacks 'top'" in capsys.readouterr().err
        assert main(["control", other.uri, "--duration-s", "1", "--cameras", "top=front"]) == 0
        assert "policy_error" not in capsys.readouterr().out


def test_mistakes_are_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a quickstart's runs/ in the current folder would be named in the messages
    assert main(["control", str(checkpoint), "--workspace", "grip_z=1"]) == 2
    assert main(["control", str(tmp_path), "--replay"]) == 2
    for words, message in (
        (["control", "127.0.0.1:8000"], "for a server, write ws://127.0.0.1:8000"),
        (["control", str(tmp_path / "none")], "there is no checkpoint at"),
        (["control", "http://127.0.0.1:8000"], "expected ws://HOST:PORT"),
        (["control", str(checkpoint), "--suite", "tabletop-pik"], "did you mean 'tabletop-pick'"),
        (["control", str(checkpoint), "--policy-hz", "80"], "policy_hz must be at most the robot's 50 Hz"),
        (["control", str(checkpoint), "--in-flight", "2"], "is of connections to a server"),
        (["control", str(checkpoint), "--n-action-steps", "13"], "n_action_steps must be in 1..12 (the chunk size)"),
        (["control", str(checkpoint), "--hz", "10"], "must be at least the simulation's 20 Hz (--hz), got 10 Hz"),
        (["control", str(checkpoint), "--velocity", "dq", "1"], "component 'dq'; known: dx, dy, dz, gripper"),
        (["serve", str(tmp_path / "none")], "there is no checkpoint at"),
        (["serve", str(checkpoint), "--port", "99999"], "--port must be at most 65,535, got 99999"),
        (["serve", str(checkpoint), "--host", "0.0.0.0"], "set an api key"),
        (["serve", str(checkpoint), "--host", "no.such.host.invalid", "--api-key", "k"], "no.such.host.invalid:8000"),
        (["serve", str(checkpoint), "--n-action-steps", "13"], "n_action_steps must be in 1..12"),
        (["serve", str(checkpoint), "--layout", "libro"], "did you mean 'libero'"),
        (["export", str(tmp_path / "none"), "--out", str(tmp_path / "o")], "there is no checkpoint at"),
        (["export", str(checkpoint), "--out", str(log_file(tmp_path))], "log.jsonl is a file, not a folder"),
    ):
        assert main(words) == 2, words
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) >= 1 and message in said[-1] and "Traceback" not in "".join(said), (words, said)


def log_file(folder):
    path = folder / "log.jsonl"
    path.write_text("")
    return path


def test_a_server_that_is_not_there_is_one_line(monkeypatch, capsys):
    from policies.serving import client

    wait = client.PolicyClient.__init__
    monkeypatch.setattr(client.PolicyClient, "__init__", lambda *args, **more: wait(*args, timeout_s=0.3, **more))
    for uri in ("ws://127.0.0.1:9", "ws://no.such.host.invalid:8000"):
        assert main(["control", uri]) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert f"no answer from a policy server at {uri}" in said and "is `vla serve` running there" in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--limits", "dx:0:1"), "--limits is of a LeRobot robot: name its type with --robot"),
        (("--switches", "gripper"), "--switches is of a LeRobot robot"),
        (("--robot-args", "port", "x"), "--robot-args is of a LeRobot robot"),
        (("--robot", "so101_follower", "--task", "go", "--endless"), "--endless changes nothing with --robot so101_"),
        (("--robot", "so101_follower", "--task", "go", "--suite", "tabletop-ten"), "it is of the simulated one"),
        (("--robot", "so101_follower", "--task", "go", "--image-size", "50"), "--image-size changes nothing with"),
        (("--api-key", "x"), "which is no server: leave it out"),
        (("--join", "switch", "--blend-steps", "4"), "--blend-steps changes nothing with --join switch"),
        (("--replay",), "is a folder: --replay takes the log of a run"),
        (("log", "--replay", "--velocity", "dx", "1"), "--velocity changes nothing beside --replay, which reads a log"),
        (("log", "--replay", "--no-estop-key"), "--estop-key changes nothing beside --replay"),
        (("log", "--to-dataset", "x", "--hz", "20"), "--hz changes nothing beside --to-dataset"),
    ],
)
def test_options_that_would_not_be_heeded_are_refused(tmp_path, capsys, args, words):
    policy = [] if args[0] == "log" else [str(tmp_path)]
    assert main(["control", *policy, *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
