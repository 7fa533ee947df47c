"""The simulated robot and its scripted teleoperator as LeRobot's flags: --robot.type, --teleop.type."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.robots.config import RobotConfig
from lerobot.teleoperators.config import TeleoperatorConfig


@RobotConfig.register_subclass("bascule_tabletop")
@dataclass(kw_only=True)
class BasculeTabletopConfig(RobotConfig):
    """A tabletop world that behaves like a robot on a cable."""

    suite: str = "tabletop-pick"
    seed: int = 0
    """Of the first scene."""
    new_scenes: bool = False
    """After a scene is over, go on with the next seed. Otherwise the same scene starts again, so that the one
    instruction LeRobot's tools take stays the right one."""
    pause_s: float = 1.0
    """How long a scene that is over stands still before the next."""
    image_size: int = 84


@TeleoperatorConfig.register_subclass("bascule_expert")
@dataclass(kw_only=True)
class BasculeExpertConfig(TeleoperatorConfig):
    """The scripted expert at the controls of the simulated robot."""
