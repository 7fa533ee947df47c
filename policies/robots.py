"""Robots as the controller sees them: a small interface, a simulated world behind it, and any LeRobot `Robot`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from policies.guards import Kind
from vla.config import lookup
from vla.types import ActionSpec, Observation, VecEnv


class Robot(Protocol):
    """What a controller needs. A method that raises OSError (but no TimeoutError) says that the robot is lost; anything
    else it raises is trouble that may pass: the controller holds, and stops when it lasts (`policies.watched`)."""

    action_spec: ActionSpec
    """Its control_hz is the rate at which `send` is to be called."""
    kinds: tuple[Kind, ...]
    """Of each action component."""
    proprio_names: tuple[str, ...]

    def connect(self) -> None: ...

    def observe(self) -> tuple[Observation, float]:
        """The latest observation (batch of one) and when it was taken, on the clock of `time.monotonic`."""

    def rest(self) -> tuple[float, ...]:
        """The action that leaves the robot as it is. NaN for a switch whose state the robot does not report."""

    def send(self, action_A: NDArray[np.float32]) -> Sequence[float] | None:
        """Command the robot. The action that it really took, where it says so: it may have limits of its own."""

    @property
    def done(self) -> bool:
        """The task is over (simulation), so that the run may end before its time."""

    def disconnect(self) -> None:
        """Leave the robot safe and let go of it. May be called twice."""


class WorldRobot:
    """One simulated world as a robot. Each `send` runs one control step and renders what is then seen."""

    def __init__(self, env: VecEnv, *, seed: int, task: str | None = None, proprio_names: Sequence[str] = ()) -> None:
        """`env` must have one world; it is closed on disconnecting. A component named gripper is a switch, the others
        are displacements."""
        if env.num_envs != 1:
            raise ValueError(f"a robot is one world, this environment has {env.num_envs}")
        self._env, self._seed, self._task = env, seed, task
        self.action_spec = env.action_spec
        self.kinds: tuple[Kind, ...] = tuple(
            "switch" if name == "gripper" else "displacement" for name in env.action_spec.names
        )
        self.proprio_names = tuple(proprio_names)
        self.success = False
        self._done = False
        self._latest: Observation | None = None

    def connect(self) -> None:
        tasks = None if self._task is None else [self._task]
        self._see(self._env.reset(seeds=[self._seed], tasks=tasks))

    def observe(self) -> tuple[Observation, float]:
        if self._latest is None:
            raise ConnectionError("the simulated robot is not connected")
        return self._latest, time.monotonic()  # never stale: the world stands still between two calls of `send`

    def rest(self) -> tuple[float, ...]:
        return tuple(1.0 if kind == "switch" else 0.0 for kind in self.kinds)

    def send(self, action_A: NDArray[np.float32]) -> None:
        if self._latest is None:
            raise ConnectionError("the simulated robot is not connected")
        result = self._env.step_chunk(np.asarray(action_A, np.float32)[None, None])
        self._see(result.obs)
        self.success = self.success or bool(result.info["success"][0])
        self._done = self._done or bool(result.terminated[0] or result.truncated[0])

    @property
    def done(self) -> bool:
        return self._done

    def disconnect(self) -> None:
        if self._latest is not None:
            self._latest = None
            self._env.close()

    def _see(self, obs: Observation) -> None:
        # Without the simulator's state: a policy on a robot has no such thing.
        self._latest = Observation(obs.images, obs.proprio, obs.instruction)


def lerobot_robot(kind: str, values: Mapping[str, str]) -> Any:
    """LeRobot's robot of a type, from the words of a command line. ValueError naming the types or flags there are.

    Types of installed plugins are known, too.
    """
    import draccus
    from lerobot import robots  # noqa: F401 registers LeRobot's own
    from lerobot.robots import RobotConfig
    from lerobot.robots.utils import make_robot_from_config
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    config = lookup(kind, RobotConfig.get_known_choices(), "LeRobot robot")
    names = {field.name for field in fields(config)}
    if foreign := [name for name in values if name not in names]:
        raise ValueError(f"robot {kind} has no '{foreign[0]}'; it has {', '.join(sorted(names))}")
    return make_robot_from_config(draccus.decode(config, dict(values)))


class LeRobotRobot:
    """Any LeRobot `Robot` under this interface. Components NAME.vel are displacements, the others positions."""

    def __init__(
        self,
        robot: Any,
        *,
        instruction: str,
        control_hz: float,
        limits: Mapping[str, tuple[float, float]],
        switches: Sequence[str] = (),
    ) -> None:
        """`limits`: the range of every action component, by LeRobot's name for it; LeRobot itself knows none.
        `switches`: components that are on/off commands.

        ValueError naming a component without limits.
        """
        names = tuple(robot.action_features)
        if missing := [name for name in names if name not in limits]:
            raise ValueError(f"the robot's component '{missing[0]}' has no limits: give its lowest and highest value")
        low, high = zip(*(limits[name] for name in names), strict=True)
        self._robot, self._instruction = robot, instruction
        self.action_spec = ActionSpec(names, tuple(map(float, low)), tuple(map(float, high)), control_hz)
        self.kinds: tuple[Kind, ...] = tuple("switch" if name in switches else _kind(name) for name in names)
        features = robot.observation_features
        self.proprio_names = tuple(name for name, kind in features.items() if kind is float)
        self._cameras = tuple(name for name, kind in features.items() if isinstance(kind, tuple))
        absent = [
            name
            for name, kind in zip(names, self.kinds, strict=True)
            if kind == "position" and name not in self.proprio_names
        ]
        if absent:
            raise ValueError(f"the robot does not report '{absent[0]}', so it cannot be held where it is")
        self.done = False

    def connect(self) -> None:
        if not self._robot.is_connected:
            self._robot.connect()

    def observe(self) -> tuple[Observation, float]:
        start = time.monotonic()  # before the cameras are read: an age must never look younger than it is
        seen = self._robot.get_observation()
        images = {camera: np.asarray(seen[camera], np.uint8)[None] for camera in self._cameras}
        proprio = np.array([[seen[name] for name in self.proprio_names]], np.float32)
        return Observation(images, proprio, [self._instruction]), start

    def rest(self) -> tuple[float, ...]:
        seen = self._robot.get_observation()
        return tuple(
            {"position": float(seen.get(name, 0.0)), "displacement": 0.0, "switch": 1.0}[kind]
            for name, kind in zip(self.action_spec.names, self.kinds, strict=True)
        )

    def send(self, action_A: NDArray[np.float32]) -> None:
        self._robot.send_action(dict(zip(self.action_spec.names, map(float, action_A), strict=True)))

    def disconnect(self) -> None:
        if self._robot.is_connected:
            self._robot.disconnect()


def _kind(name: str) -> Kind:
    return "displacement" if name.endswith(".vel") else "position"
