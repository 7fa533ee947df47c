"""The test cell: the suite's scene around the FR3, and the robot type `franka` through libfranka's real protocol."""

import os
import threading
import time

import numpy as np
import pytest

pytest.importorskip("franky", reason="./run setup franka")
pytest.importorskip("franky_sim", reason="./run setup franka-sim")

from bascule.commands.franka_cell import FrankaCell
from bascule.franka_cell.cell import Cell, CellConfig
from envs.backends.cpu_worlds import TabletopWorlds
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from policies.control.config import ControlConfig
from policies.control.controller import control
from policies.control.robots import LeRobotRobot
from policies.franka.config_franka import FrankaConfig
from policies.franka.feed import ask
from policies.franka.franka import ACTIONS, Franka
from vla.core.types import PolicySpec

HOST = f"127.7.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"  # tests that run beside this one have others
DOWN = dict(zip(ACTIONS, (0.0, 0.0, -0.3, 1.0), strict=True))


@pytest.fixture(scope="module")
def cell():
    """A cell that runs in a thread, slowly: it shares the interpreter with the test."""
    cell = Cell(CellConfig(host=HOST, port=0, speed=0.25, fps=40))
    thread = threading.Thread(target=cell.run, daemon=True)
    thread.start()
    yield cell
    cell.stop()
    thread.join(timeout=5)


@pytest.fixture
def arm(cell):
    ask(cell.windows.address, {"do": "fault", "kind": "none"})
    ask(cell.windows.address, {"do": "scene", "seed": 5_000_003})
    arm = Franka(FrankaConfig(host=HOST, realtime=False, feed=cell.windows.address))
    yield arm
    arm.disconnect()


def driven(arm, action, seconds):
    """Send `action` every 20 ms; the observations."""
    seen, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        seen.append(arm.get_observation())
        arm.send_action(action)
        time.sleep(0.02)
    return seen


def test_the_cell_is_the_suites_scene_around_another_arm(cell, arm):
    worlds = TabletopWorlds(load_suite("tabletop-pick"), 1, render=RenderOptions(96))
    worlds.render_images = False
    worlds.start_episodes([5_000_003], None, None)
    model, data = worlds.model, worlds.data[0]
    assert cell.verdict.instruction == worlds.episodes[0].instruction
    there = worlds.state.active[0]
    # The same but for what the things sink into the table while the cell runs.
    np.testing.assert_allclose(cell._rules.objects[0, there], worlds.state.objects[0, there], atol=1e-3)
    np.testing.assert_allclose(cell.model.geom_rgba[cell.index.colored_geom], worlds._rgba[0], atol=1e-6)
    front, ours = cell.model.camera("front"), model.camera("front")
    for field in ("pos", "quat", "fovy"):
        np.testing.assert_allclose(getattr(front, field), getattr(ours, field), atol=1e-6)

    def seen_from_the_fingers(model, data, index):
        import mujoco

        mujoco.mj_camlight(model, data)
        grip, camera = data.site_xmat[index.grip_site].reshape(3, 3), index.camera_ids[1]
        return grip.T @ (data.cam_xpos[camera] - data.site_xpos[index.grip_site]), grip.T @ data.cam_xmat[
            camera
        ].reshape(3, 3)

    theirs, ours = (
        seen_from_the_fingers(cell.model, cell.data, cell.index),
        seen_from_the_fingers(model, data, worlds.index),
    )
    np.testing.assert_allclose(theirs[0], ours[0], atol=1e-4)
    np.testing.assert_allclose(theirs[1], ours[1], atol=1e-3)
    assert cell.model.camera("wrist").fovy == model.camera("wrist").fovy


def test_the_arm_goes_where_it_is_sent_and_the_hand_closes_meanwhile(cell, arm):
    arm.connect()
    before = arm.get_observation()
    assert before["front"].shape == (96, 96, 3) and before["wrist"].any()
    assert before["finger_opening.pos"] > 0.95 and before["gripper_command.pos"] == 1.0
    arm.send_action({**DOWN, "dz.vel": -1.0, "gripper.pos": -1.0})
    assert cell.verdict.seconds < 0.2  # the hand needs 0.4 s of the cell's clock to close
    assert os.sched_getscheduler(0) == os.SCHED_OTHER  # libfranka's own thread has the highest priority, not this one
    stay, until = dict(zip(ACTIONS, (0.0, 0.0, 0.0, -1.0), strict=True)), time.monotonic() + 10
    while cell.verdict.seconds < 0.8 and time.monotonic() < until:
        (*_, after) = driven(arm, stay, 0.1)
    moved = np.array([after[f"grip_{axis}.pos"] - before[f"grip_{axis}.pos"] for axis in "xyz"])
    np.testing.assert_allclose(moved, [0, 0, -0.03], atol=2e-3)
    assert after["finger_opening.pos"] < 0.3 and after["gripper_command.pos"] == -1.0
    np.testing.assert_allclose([after[f"lead_{axis}.pos"] for axis in "xyz"], 0, atol=2e-3)
    told = ask(cell.windows.address, {"do": "verdict"})
    # libfranka's pose, measured, is the simulator's own: theirs would have told the one that was commanded.
    np.testing.assert_allclose(told["grip"], [after[f"grip_{axis}.pos"] for axis in "xyz"], atol=2e-3)
    assert told["commands"] > 100 and not told["success"]


def test_a_reflex_is_told_and_the_arm_is_held_until_somebody_recovers_it(cell, arm):
    arm.connect()
    driven(arm, DOWN, 0.1)
    ask(cell.windows.address, {"do": "fault", "kind": "reflex"})
    with pytest.raises(RuntimeError, match="stopped itself in a reflex"):
        driven(arm, DOWN, 2.0)
    with pytest.raises(RuntimeError, match="stopped itself in a reflex"):
        arm.send_action(DOWN)  # as long as nobody recovers it
    assert arm.is_connected
    arm.disconnect()
    arm.config.recoveries = 1
    arm.connect()  # which recovers from a reflex that stands
    driven(arm, DOWN, 0.1)
    ask(cell.windows.address, {"do": "fault", "kind": "reflex"})
    driven(arm, DOWN, 0.3)
    ask(cell.windows.address, {"do": "fault", "kind": "reflex"})
    with pytest.raises(RuntimeError, match="reflex"):
        driven(arm, DOWN, 2.0)


@pytest.mark.parametrize(
    ("kind", "told"), [("user-stop", "its stop is pressed"), ("guiding", "by hand"), ("locked", "brakes are locked")]
)
def test_an_arm_that_cannot_be_driven_says_why_in_one_line(cell, arm, kind, told):
    ask(cell.windows.address, {"do": "fault", "kind": kind})
    with pytest.raises(ConnectionError) as error:
        arm.connect()
    assert told in str(error.value) and HOST in str(error.value) and "\n" not in str(error.value)
    assert not arm.is_connected


def test_addresses_without_an_arm_are_told_apart(arm, monkeypatch):
    arm.config.host = "127.9.9.9"
    with pytest.raises(ConnectionError, match="refuses control: activate FCI"):
        arm.connect()

    def nobody(address, timeout):
        raise TimeoutError("timed out")

    monkeypatch.setattr("policies.franka.franka.socket.create_connection", nobody)
    arm.config.host = "192.0.2.1"
    with pytest.raises(ConnectionError, match=r"no arm at 192.0.2.1 \(nothing answers\)"):
        arm.connect()


class Down:
    """A policy that always moves down."""

    spec = PolicySpec(chunk_size=4, n_action_steps=2)

    def __init__(self, file):
        self.file, self.asked = file, 0

    def reset(self, env_ids=None):
        pass

    def act(self, obs, *, prefix=None):
        self.asked += 1
        if self.asked == 4:
            self.file.touch()
        return np.tile(np.array([0.0, 0.0, -0.3, 1.0], np.float32), (1, 4, 1))


def test_the_controllers_stop_leaves_the_arm_where_it_is(cell, arm, tmp_path):
    file = tmp_path / "stop"
    robot = LeRobotRobot(arm, instruction="down", control_hz=25, limits=dict.fromkeys(arm.action_features, (-1.0, 1.0)))
    assert robot.kinds == ("displacement",) * 3 + ("switch",)
    report = control(robot, Down(file), ControlConfig(duration_s=5, policy_hz=10, estop_file=file))
    assert report.ended == "disconnect" and "estop" in report.guards and report.good is False
    stood = ask(cell.windows.address, {"do": "verdict"})["grip"]
    assert stood[2] < 0.2  # it had moved
    time.sleep(0.3)
    np.testing.assert_allclose(ask(cell.windows.address, {"do": "verdict"})["grip"], stood, atol=1e-3)


@pytest.mark.parametrize(("lifted", "success"), [("named", True), ("other", False)])
def test_the_simulator_judges(cell, arm, lifted, success):
    episode = cell.source.sample(5_000_003)
    slot = (
        episode.goals[0].object if lifted == "named" else next(s for s in episode.slots if s != episode.goals[0].object)
    )
    at, grip = cell.index.object_qpos[slot], cell.data.site_xpos[cell.index.grip_site].copy()
    until = time.monotonic() + 2
    while not (cell.verdict.success or cell.verdict.wrong_object) and time.monotonic() < until:
        cell.data.qpos[at : at + 3] = grip  # into the fingers, again and again
        time.sleep(0.001)
    assert (cell.verdict.success, cell.verdict.wrong_object) == (success, not success)


def test_a_film_shows_the_episode_with_the_real_arms_meshes(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("bascule.franka_cell.film._SIZE_PX", 32)
    cell = Cell(CellConfig(host=f"127.8{HOST.removeprefix('127.7')}", port=0))
    assert not cell.film.save(tmp_path / "none.webp", "")
    for seconds, success in (
        (0.0, False),
        (0.1, False),
        (0.2, False),
        (0.3, True),
        (0.4, True),
        (1.0, True),
        (1.1, True),
    ):
        cell.verdict.seconds, cell.verdict.success, cell.verdict.at_s = seconds, success, 0.3 if success else None
        cell.data.qpos[cell.index.arm_qpos[0]] += 0.2
        cell.film.look(cell.verdict)
        cell.film.look(cell.verdict)  # every second control step is a frame
    assert len(cell.film._seen) == 4  # not before it moved, nor long after the verdict
    assert cell.film.save(tmp_path / "film.webp", "take it")
    with Image.open(tmp_path / "film.webp") as film:
        assert 1 < film.n_frames <= 4
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").getpixel((9, 9))[1] > 120  # the border of success
    with pytest.raises(ValueError, match="must end in .webp"):
        FrankaCell(film=tmp_path / "film.png").run()
    cell.windows.close()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("bascule.commands.franka_cell.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"franky-sim is missing: ./run setup franka-sim$"):
        FrankaCell().run()


def test_an_arm_that_stops_talking_is_lost(cell, arm):
    arm.connect()
    driven(arm, DOWN, 0.1)
    real = arm._arm

    class Silent:
        is_in_control = False

        @property
        def state(self):
            raise RuntimeError("libfranka: UDP receive: Timeout")

        def stop(self):
            real.stop()

    arm._arm = Silent()
    with pytest.raises(ConnectionError, match=f"arm at {HOST} does not answer any more: UDP receive: Timeout"):
        arm.send_action(DOWN)
    assert not arm.is_connected
    with pytest.raises(ConnectionError, match="does not answer any more"):
        arm.get_observation()
