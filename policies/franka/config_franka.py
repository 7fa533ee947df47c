"""LeRobot's configurations of the arm and of a camera feed: --robot.type=franka, cameras of type feed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lerobot.cameras.configs import CameraConfig
from lerobot.robots.config import RobotConfig

from policies.franka.limits import MotionLimits
from policies.franka.reference import ReferenceConfig

STATES = ("tabletop", "full")


@RobotConfig.register_subclass("franka")
@dataclass(kw_only=True)
class FrankaConfig(RobotConfig):
    """--robot.type=franka: a Franka Research 3 or Panda with the Franka Hand, through libfranka."""

    host: str
    """Address of the arm's control box, as in its Desk."""
    arm: str = "fr3"
    """fr3 or panda: whose limits hold."""
    realtime: bool = True
    """Insist on a real-time kernel, which a real arm needs. false: try without; the test cell needs none."""
    connect_s: float = 3.0
    """Give up after so many seconds in which the address does not answer."""
    state: str = "tabletop"
    """The state that it tells. tabletop: the eight numbers that the tabletop suites tell. full: also the width of the
    gripper, the yaw of the hand, and position and velocity of the joints."""
    yaw_rad: float = -math.pi / 2
    """The hand points down, turned by this about the vertical."""
    recoveries: int = 0
    """How often a run may recover from a reflex by itself and go on. A reflex that was there before is recovered from
    once, when the arm is connected."""
    force_n: float = 30.0
    torque_nm: float = 20.0
    """Contact forces and torques at which the arm stops in a reflex."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    motion: MotionLimits = field(default_factory=MotionLimits)
    cameras: dict[str, CameraConfig] = field(default_factory=dict)
    """LeRobot's cameras by name: opencv, intelrealsense, .., or feed."""
    feed: str | None = None
    """HOST:PORT of a test cell: all cameras that it has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, camera in self.cameras.items():
            if isinstance(camera, FeedCameraConfig) and camera.name is None:
                camera.name = name


@CameraConfig.register_subclass("feed")
@dataclass(kw_only=True)
class FeedCameraConfig(CameraConfig):
    """A camera whose pictures come over a socket, in the protocol of `policies.franka.feed`: a test cell's."""

    address: str = ""
    """HOST:PORT."""
    name: str | None = None
    """The camera's name over there. Default: the name it has here."""
    fps: int | None = 20
    width: int | None = 96
    height: int | None = 96
