"""LeRobot's own SO-101, its motors and its camera replaced by ones of numbers: everything between is LeRobot's."""

import contextlib

import numpy as np
from lerobot.robots.so_follower import so_follower
from lerobot.utils.errors import DeviceNotConnectedError

from policies.control.controller import ControlConfig, control
from policies.control.guards import GuardConfig
from policies.control.robots import LeRobotRobot, lerobot_robot
from tests.policies.control.toy_robot import Clock, Says

NAMES = tuple(
    f"{joint}.pos" for joint in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
)
LIMITS = {name: (0.0, 100.0) if name == "gripper.pos" else (-90.0, 90.0) for name in NAMES}
CAMERA = "{front: {type: opencv, index_or_path: 0, width: 6, height: 4, fps: 30}}"
HZ = 50.0


class Bus:
    """Servos that are at once where they are told to be. `trouble(bus)` runs at every reading."""

    def __init__(self, port, motors, calibration):
        self.motors, self.calibration, self.is_calibrated = motors, calibration, True
        self.at = dict.fromkeys(motors, 0.0)
        self.is_connected, self.torque, self.reads, self.written, self.trouble = False, None, 0, [], None

    def connect(self):
        self.is_connected = True

    def disconnect(self, disable_torque=True):
        self.is_connected, self.torque = False, not disable_torque

    def torque_disabled(self):
        return contextlib.nullcontext()

    def configure_motors(self): ...

    def write(self, *_): ...

    def sync_read(self, what, num_retry=0):
        self.reads += 1
        seen = dict(self.at)
        if self.trouble is not None:
            seen = self.trouble(self, seen) or seen
        return seen

    def sync_write(self, what, goal):
        assert self.is_connected, "a robot that was let go was sent an action"
        self.written.append(dict(goal))
        self.at.update(goal)


class Camera:
    """`shows(reads)` makes each picture; what it raises is raised."""

    width, height, use_rgb, use_depth = 6, 4, True, False

    def __init__(self):
        self.is_connected, self.reads, self.shows = False, 0, None

    def connect(self):
        self.is_connected = True

    def disconnect(self):
        if not self.is_connected:
            raise DeviceNotConnectedError("the camera is not connected")
        self.is_connected = False

    def read_latest(self):
        self.reads += 1
        return np.full((4, 6, 3), 7, np.uint8) if self.shows is None else self.shows(self.reads)


def so101(monkeypatch, **values):
    """LeRobot's robot of type so101_follower, made from the words of a command line."""
    monkeypatch.setattr(so_follower, "FeetechMotorsBus", Bus)
    monkeypatch.setattr(so_follower, "make_cameras_from_configs", lambda configs: {name: Camera() for name in configs})
    return lerobot_robot("so101_follower", {"port": "/dev/none", "id": "test", "cameras": CAMERA, **values})


def drive(arm, policy, *, seconds=1.0, guards=None, switches=("gripper.pos",), limits=LIMITS, log=None, **config):
    """One run in simulated time, the policy answering inside the loop; the report and what the servos were sent."""
    clock = Clock()
    robot = LeRobotRobot(
        arm, instruction="go", control_hz=HZ, limits=limits, switches=switches, cameras=("front",), clock=clock
    )
    policy = policy if hasattr(policy, "act") else Says(policy)
    settings = ControlConfig(duration_s=seconds, asynchronous=False, guards=guards or GuardConfig(), **config)
    report = control(robot, policy, settings, log=log, clock=clock, sleep=clock.sleep)
    assert not arm.bus.is_connected, "let go, whatever happened"
    return report, np.array([[sent[name.removesuffix(".pos")] for name in NAMES] for sent in arm.bus.written])
