"""A tabletop environment behind LeRobot's `Robot`, and its privileged expert behind `Teleoperator`.

LeRobot's tools drop numbers that are named neither NAME.pos nor NAME.vel: displacements are called .vel, the rest .pos.
Joints are called so already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lerobot.robots.robot import Robot
from lerobot.teleoperators.teleoperator import Teleoperator

from policies.lerobot.config_tabletop import BasculeExpertConfig, BasculeTabletopConfig
from policies.lerobot.simulation import make_simulation
from vla.core.types import Observation

_running: list[BasculeTabletop] = []  # connected robots: the teleoperator reads the state of the latest one


class BasculeTabletop(Robot):
    """The simulated robot. `send_action` runs one control step of the environment."""

    config_class = BasculeTabletopConfig
    name = "bascule_tabletop"
    is_calibrated = True
    moves_by_displacements = True  # its NAME.vel are displacements of one control step

    def __init__(self, config: BasculeTabletopConfig) -> None:
        super().__init__(config)
        self.config = config
        self.simulation = make_simulation(config.suite, config.image_size)
        env = self.simulation.env
        self.cameras = dict.fromkeys(env.cameras)  # LeRobot's tools count them
        self._actions = tuple(_called(name, "pos" if name == "gripper" else "vel") for name in env.action_spec.names)
        self._state = tuple(_called(name, "pos") for name in self.simulation.proprio_names)
        self.latest: Observation | None = None
        self.scenes = self.successes = 0
        self._still = 0  # control steps since the scene was over
        self._closed = False

    @property
    def observation_features(self) -> dict[str, Any]:
        """Name -> float for each proprio value, and name -> (H, W, 3) for each camera."""
        size = self.config.image_size
        return {**dict.fromkeys(self._state, float), **dict.fromkeys(self.cameras, (size, size, 3))}

    @property
    def action_features(self) -> dict[str, Any]:
        """Name -> float for each action component."""
        return dict.fromkeys(self._actions, float)

    @property
    def is_connected(self) -> bool:
        """True between `connect` and `disconnect`."""
        return self.latest is not None

    def connect(self, calibrate: bool = True) -> None:
        """Reset the environment to its first scene; `calibrate` has no effect."""
        if self._closed:  # connected once more
            self.simulation, self._closed = make_simulation(self.config.suite, self.config.image_size), False
        self._new_scene()
        _running.append(self)

    def calibrate(self) -> None:
        """Does nothing: a simulated robot needs no calibration."""

    def configure(self) -> None:
        """Does nothing: a simulated robot needs no configuration."""

    def get_observation(self) -> dict[str, Any]:
        """The latest proprio values and images (H, W, 3) uint8 by name. ConnectionError if not connected."""
        if self.latest is None:
            raise ConnectionError("the simulated robot is not connected")
        state = dict(zip(self._state, map(float, self.latest.proprio[0]), strict=True))
        return {**state, **{camera: image[0].copy() for camera, image in self.latest.images.items()}}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Clip the action to the bounds and run one control step with it. Returns the action that was executed;
        ConnectionError if not connected."""
        if self.latest is None:
            raise ConnectionError("the simulated robot is not connected")
        env = self.simulation.env
        wanted = np.array([float(action[name]) for name in self._actions], np.float32)
        sent = np.clip(wanted, env.action_spec.low, env.action_spec.high).astype(np.float32)
        result = env.step_chunk(sent[None, None])
        self.latest = result.obs
        self.successes += int(result.info["success"][0])
        if self._still or result.terminated[0] or result.truncated[0]:
            self._still += 1
        if self._still > self.config.pause_s * env.action_spec.control_hz:
            self._new_scene()
        return dict(zip(self._actions, map(float, sent), strict=True))

    def disconnect(self) -> None:
        """Close the environment. May be called twice."""
        if self.latest is not None:
            self.latest = None
            _running.remove(self)
            self.simulation.env.close()
            self._closed = True

    def _new_scene(self) -> None:
        seed = self.config.seed + (self.scenes if self.config.new_scenes else 0)
        self.simulation.expert.reset()
        self.latest = self.simulation.env.reset(seeds=[seed])
        self.scenes, self._still = self.scenes + 1, 0


class BasculeExpert(Teleoperator):
    """The scripted expert of the latest connected simulated robot, in place of a human operator."""

    config_class = BasculeExpertConfig
    name = "bascule_expert"
    is_calibrated = True
    feedback_features: dict[str, Any] = {}

    def __init__(self, config: BasculeExpertConfig) -> None:
        super().__init__(config)
        self.config, self._connected = config, False

    @property
    def action_features(self) -> dict[str, Any]:
        """The action features of the connected robot; empty without one."""
        return _running[-1].action_features if _running else {}

    @property
    def is_connected(self) -> bool:
        """True between `connect` and `disconnect`."""
        return self._connected

    def connect(self, calibrate: bool = True) -> None:
        """Mark the teleoperator as connected; `calibrate` has no effect."""
        self._connected = True

    def calibrate(self) -> None:
        """Does nothing: the expert needs no calibration."""

    def configure(self) -> None:
        """Does nothing: the expert needs no configuration."""

    def get_action(self) -> dict[str, Any]:
        """The expert's next action for the connected robot, by name and within its bounds. ConnectionError without a
        robot."""
        if not _running:
            raise ConnectionError("the scripted expert needs a connected robot: --robot.type=bascule_tabletop")
        robot = _running[-1]
        assert robot.latest is not None
        spec = robot.simulation.env.action_spec
        action = np.clip(robot.simulation.expert.act(robot.latest)[0, 0], spec.low, spec.high)
        return dict(zip(robot.action_features, map(float, action), strict=True))

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        """Does nothing: the expert takes no feedback."""

    def disconnect(self) -> None:
        """Mark the teleoperator as disconnected."""
        self._connected = False


def _called(name: str, kind: str) -> str:
    return name if name.endswith((".pos", ".vel")) else f"{name}.{kind}"
