"""LeRobot's configuration of a robot behind rosbridge: --robot.type=rosbridge."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.robots.config import RobotConfig


@RobotConfig.register_subclass("rosbridge")
@dataclass(kw_only=True)
class RosbridgeConfig(RobotConfig):
    """--robot.type=rosbridge: any robot whose pictures, state and commands are ROS topics."""

    config: str
    """A TOML file that says which topics (`policies.ros.topics`)."""
    url: str = "ws://127.0.0.1:9090"
    """Address of the rosbridge server."""
