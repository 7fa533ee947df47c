"""Corrections end to end: the control loop with a scripted corrector in simulation, its log as a dataset, training."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bascule.main import main
from envs.experts.corrector import CorrectedWorlds, Corrector
from envs.make import worlds_class
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from policies.control.config import ControlConfig
from policies.control.controller import control
from policies.control.flight_log import BlackBox, read
from policies.control.guards import GuardConfig
from policies.control.realtime_sim import LiveWorld
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from policies.teleop.simulated import SimulatedCorrector
from policies.teleop.takeover import TakeOver
from tests.policies.control.toy_robot import Clock, Says, WorldRobot
from vla.core.types import ActionSpec, Observation, PolicySpec
from vla.data.lerobot_dataset import load_dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "control"))  # a spawned process finds a module by its name
import own_robots  # noqa: E402
from toy_processes import Advised  # noqa: E402

PROPRIO = ("grip_x", "grip_y", "grip_z", "lead_x", "lead_y", "lead_z", "finger_opening", "gripper_command")


class Beside:
    """The corrector of an environment in this process."""

    def __init__(self, env, names):
        self.env, self.names = env, names

    def connect(self): ...

    def disconnect(self): ...

    def get_action(self):
        self.told = self.env.advice()
        return dict(zip(self.names, self.told[1:].tolist(), strict=True))

    def get_teleop_events(self):
        return {"is_intervention": bool(self.told[0])}


def test_a_hopeless_policy_is_corrected_in_the_loop_and_what_was_shown_can_be_learnt(tmp_path, capsys):
    spec = load_suite("tabletop-pick")
    log = tmp_path / "logs" / "0.jsonl"
    env = CorrectedWorlds(worlds_class(spec)(spec, 1, render=RenderOptions(24)))
    robot, clock = WorldRobot(env, seed=7, proprio_names=PROPRIO), Clock()
    robot.observe = lambda: (robot._latest, clock())
    who = TakeOver(Beside(env, robot.action_spec.names), robot, GuardConfig())
    rises = Says([[-0.2, 0.0, 0.3, -1.0]] * 8)  # with its gripper closed, wherever it is
    with BlackBox(log) as box:
        settings = ControlConfig(duration_s=20.0, asynchronous=False)
        report = control(robot, rises, settings, log=box, person=who, clock=clock, sleep=clock.sleep)
    assert report.ended == "done" and report.ticks < spec.horizon and report.takeovers == 1, "it was lifted in time"
    assert report.drivers["human"] > 10
    data = load_dataset_of(log.parent, tmp_path / "made")
    who_drove = [line["driver"] for line in read(log)[1] if "inputs" in line]
    assert data.intervention.tolist() == [one == "human" for one in who_drove] and data.fps == 20
    np.testing.assert_allclose(data.action[~data.intervention][0], [-0.2, 0.0, 0.3, -1.0], atol=1e-6)
    assert main(["check", str(tmp_path / "made"), "--pictures", "0"]) in (0, 1)
    start = ["--recipe", "smoke", "--steps", "2", "--batch-size", "4", "--dataset", str(tmp_path / "made")]
    assert main(["train", *start, "--backbone", "tiny", "--out", str(tmp_path / "start")]) == 0
    assert "--intervention-weight half learns the person's" in " ".join(capsys.readouterr().err.split())
    args = [*start, "--init", str(tmp_path / "start"), "--intervention-weight", "half", "--out", str(tmp_path / "out")]
    assert main(["train", *args]) == 0
    kept = json.loads((tmp_path / "out" / "train.json").read_text())
    assert kept["interventions"] == {"weight": None, "policy_frames": "leave", "shuffle_seed": None}


def load_dataset_of(logs, out):
    assert main(["control", str(logs), "--to-dataset", str(out)]) == 0
    return load_dataset(out)


def test_the_live_robots_corrector_drives_it_at_its_own_rate():
    robot = LiveWorld(Advised, control_hz=50.0, seed=1, proprio_names=("x", "gripper", "seed"))
    try:
        who = TakeOver(SimulatedCorrector(robot), robot, GuardConfig())
        settings = ControlConfig(duration_s=3.0, asynchronous=False, policy_hz=20.0)
        report = control(robot, Says([[0.0, 1.0]] * 8), settings, person=who)
    finally:
        robot.disconnect()
    assert report.ended == "done" and report.takeovers == 1 and report.drivers["human"] >= 5
    with pytest.raises(ValueError, match="has no corrector"):
        SimulatedCorrector(type("Robot", (), {"advises": False})())


def scene(thing, grip, *, gripper=1.0, rest=0.02):
    """One environment's state as `envs.tabletop.goals.privileged` lays it out."""
    row = np.zeros(16, np.float32)
    row[:3], row[3:6], row[8], row[11], row[13:16] = thing, np.subtract(thing, grip), rest, gripper, grip
    return Observation({}, np.zeros((1, 8), np.float32), ["pick"], row[None])


def watched(scenes):
    corrector = Corrector(1)
    return [(corrector.watch(one), bool(corrector.drives[0]))[1] for one in scenes]


def test_the_corrector_takes_over_by_rules_that_a_person_could_follow():
    thing, above = (0.5, 0.0, 0.02), partial(scene, (0.5, 0.0, 0.02))
    comes = [above((0.5, 0.0, 0.2 - 0.015 * k)) for k in range(10)]
    assert not any(watched(comes)), "it comes nearer"
    assert watched([comes[0]] * 12) == [False] * 10 + [True] * 2, "no progress for half a second"
    goes = [above((0.5, 0.1 + 0.01 * k, 0.1)) for k in range(8)]
    assert watched(goes).index(True) in (5, 6), "it drifts away, by four centimetres"
    closed = above((0.5, 0.1, 0.02), gripper=-1.0)
    assert watched([comes[0], closed, closed, closed]) == [False] * 3 + [True], "it has closed on nothing"
    held = scene((0.5, 0.0, 0.06), (0.5, 0.0, 0.06), gripper=-1.0)
    assert watched([*[comes[0]] * 11, held, held]) == [*[False] * 10, True, False, False], "held and lifted: safe"
    fallen = scene((0.5, 0.0, 0.01), (0.5, 0.1, 0.1), rest=0.034)
    assert not any(watched([fallen] * 30)), "nobody can take hold of it"
    assert thing[2] == 0.02


def test_a_teleoperator_of_the_command_line_must_fit(capsys, tmp_path):
    def refused(*words):
        assert main(["control", "ws://127.0.0.1:9", *words]) == 2
        return capsys.readouterr().err

    assert "leave out --robot" in refused("--teleop", "corrector", "--robot", "so101_follower", "--task", "x")
    assert "does not know the tasks of tabletop-ten" in refused("--teleop", "corrector", "--suite", "tabletop-ten")
    assert "changes nothing without --teleop" in refused("--take-over", "motion")
    assert "LeRobot teleoperator" in refused("--teleop", "so101_leder")
    assert "--take-over key listens" in refused("--teleop", "corrector", "--take-over", "key", "--no-estop-key")
    assert "no module" in refused("--teleop", "nowhere:Hand")
    assert main(["control", str(tmp_path), "--to-dataset", str(tmp_path / "out")]) == 2
    assert "without logs (*.jsonl)" in capsys.readouterr().err
    assert main(["demos", "tabletop-pick", "--corrections"]) == 2
    assert "name the one that is to be corrected with --policy" in capsys.readouterr().err


def test_a_robot_and_a_teleoperator_of_ones_own_from_the_command_line(tmp_path, capsys):
    spec = ActionSpec(own_robots.NAMES, (-1.0,) * 3, (1.0,) * 3, 50.0)
    policy = Says(np.zeros((8, 3), np.float32), PolicySpec(spec, 8, 4, ("front",), 2, ("x", "y")))
    log = tmp_path / "log.jsonl"
    with serve_in_thread(PolicyServer({"toy": PolicySlot(policy)}, port=0)) as server:
        args = ["control", server.uri, "--robot", "own_robots:Right", "--duration-s", "2", "--log", str(log)]
        args += ["--json", str(tmp_path / "report.json")]
        args += ["--server-timeout-s", "60", "--give-up-s", "60"]  # whatever else the machine has to do
        args += ["--teleop", "own_robots:Leader", "--teleop-args", "far", "0.5"]
        assert main(args) == 2, "it has no event"
        assert "there is no terminal to press it in" in capsys.readouterr().err
        assert main([*args, "--take-over", "motion"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())["report"]
    assert report["takeovers"] == 1 and report["drivers"]["human"] > 40 and report["drivers"]["policy"] > 5
    assert "a person took over 1 times" in capsys.readouterr().out
    assert main(["control", str(log), "--replay"]) == 0
    assert max(line["decision"]["action"][0] for line in read(log)[1] if "inputs" in line) == 0.5
