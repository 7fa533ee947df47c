"""LeRobot configurations of the simulation: --robot.type, --teleop.type, --env.type."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gymnasium.vector import VectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.processor import InfoProcessorStep, PolicyProcessorPipeline
from lerobot.robots.config import RobotConfig
from lerobot.teleoperators.config import TeleoperatorConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from vla.model.config import DEFAULT_PIXELS

INTERFACE = "bascule.interface"
"""Key of an observation's info: the environment's `vla.core.types.PolicySpec`."""


@RobotConfig.register_subclass("bascule_tabletop")
@dataclass(kw_only=True)
class BasculeTabletopConfig(RobotConfig):
    """--robot.type=bascule_tabletop: a simulated tabletop environment behind LeRobot's robot interface."""

    suite: str = "tabletop-pick"
    seed: int = 0
    """Seed of the first scene."""
    new_scenes: bool = False
    """After an episode ends, continue with the next seed. Otherwise the same scene is reset, so that the single
    instruction LeRobot's tools accept stays valid."""
    pause_s: float = 1.0
    """Seconds for which an ended episode stays still before the next reset."""
    image_size: int = DEFAULT_PIXELS
    """Height and width of its pictures. As the policy reads them is best: 84 for one on a backbone that is retired."""


@TeleoperatorConfig.register_subclass("bascule_expert")
@dataclass(kw_only=True)
class BasculeExpertConfig(TeleoperatorConfig):
    """--teleop.type=bascule_expert: the scripted expert operates the simulated robot."""


@EnvConfig.register_subclass("bascule")
@dataclass
class BasculeEnvConfig(EnvConfig):
    """--env.type=bascule: the tabletop environments for `lerobot-eval`, with the scenes and horizon of `vla eval`."""

    task: str | None = "tabletop-pick"
    """Name of the suite."""
    fps: int = 20
    image_size: int = DEFAULT_PIXELS
    """Height and width of the pictures. As the policy reads them is best: 84 for one on a backbone that is retired."""
    first_seed: int = 5_000_000
    """`envs.seeds.FIRST_EVALUATION_SEED`, a package that this one may not import. Added to LeRobot's
    seeds, which count from 1000 on: such numbers are training scenes here."""
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.features = {
            "agent_pos": PolicyFeature(FeatureType.STATE, (8,)),
            ACTION: PolicyFeature(FeatureType.ACTION, (4,)),
        }
        self.features_map = {"agent_pos": OBS_STATE, ACTION: ACTION}
        for camera in ("front", "wrist"):
            self.features[f"pixels/{camera}"] = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
            self.features_map[f"pixels/{camera}"] = f"{OBS_IMAGES}.{camera}"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `gymnasium.make`: none, since `create_envs` builds the environments."""
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, VectorEnv]]:
        """`n_envs` environments as one synchronous vector environment; `use_async_envs` is ignored, since each
        environment already runs in its own process."""
        from gymnasium.vector import AutoresetMode, SyncVectorEnv

        from policies.lerobot.tabletop_env import TabletopEnv

        make = partial(TabletopEnv, str(self.task), self.image_size, self.first_seed)
        envs = SyncVectorEnv([make] * n_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        self._interface = envs.get_attr("interface")[0]
        return {self.type: {0: envs}}

    def get_env_processors(self) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
        """(pre, post) pipelines: observations tell a Bascule policy the names and order of the environment's actions
        and state; actions pass unchanged."""
        return PolicyProcessorPipeline(steps=[_TellInterface(self)]), PolicyProcessorPipeline(steps=[])


@dataclass
class _TellInterface(InfoProcessorStep):
    """Puts the interface of the environments that a configuration has made into the info of each observation."""

    config: BasculeEnvConfig

    def info(self, info: dict[str, Any]) -> dict[str, Any]:
        """The info with `INTERFACE`, once there are environments."""
        side = getattr(self.config, "_interface", None)
        return info if side is None else {**info, INTERFACE: side}

    def transform_features(self, features: Any) -> Any:
        """The features, unchanged."""
        return features
