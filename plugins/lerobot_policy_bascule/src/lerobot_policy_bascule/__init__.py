"""Imported by LeRobot's tools when they start: registers policy, worlds, simulated robot and scripted teleoperator.

All of them live in `policies.lerobot`. Only the world behind the robot is joined on here, because policies do not know
the simulator.
"""

from policies.franka.config_franka import FeedCameraConfig, FrankaConfig
from policies.lerobot.config_tabletop import BasculeEnvConfig, BasculeExpertConfig, BasculeTabletopConfig
from policies.lerobot.configuration_bascule import BasculeConfig
from policies.lerobot.simulation import Simulation, use_simulation
from policies.ros.config_rosbridge import RosbridgeConfig

__all__ = [
    "BasculeConfig",
    "BasculeEnvConfig",
    "BasculeExpertConfig",
    "BasculeTabletopConfig",
    "FeedCameraConfig",
    "FrankaConfig",
    "RosbridgeConfig",
]


def _simulation(suite: str, image_size: int) -> Simulation:
    from envs import make_vec
    from envs.experts.registry import make_expert

    env = make_vec(suite, 1, num_workers=1, image_size=image_size)
    return Simulation(env, make_expert(suite, 1), env.proprio_names)


use_simulation(_simulation)
