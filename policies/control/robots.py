"""The controller's robot interface, and its implementation for any LeRobot `Robot`."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from policies.control.guards import Kind
from vla.core.types import ActionSpec, Observation
from vla.processing.pictures import to_uint8_picture


class Robot(Protocol):
    """The interface a controller needs. An OSError other than TimeoutError means that the robot is lost. Any other
    exception counts as transient: the controller holds, and stops if it persists (`policies.control.watched_robot`)."""

    action_spec: ActionSpec
    """Its control_hz is the rate at which `send` is to be called."""
    kinds: tuple[Kind, ...]
    """The kind of each action component, A entries."""
    proprio_names: tuple[str, ...]

    def connect(self) -> None:
        """Connect to the robot. ConnectionError if that fails."""

    def observe(self) -> tuple[Observation, float]:
        """The latest observation (batch of one) and when it was taken, on the clock of `time.monotonic`."""

    def rest(self) -> tuple[float, ...]:
        """The action that leaves the robot as it is. NaN for a switch whose state the robot does not report."""

    def send(self, action_A: NDArray[np.float32]) -> Sequence[float] | None:
        """Command an action (A,). Returns the action the robot took if it reports a different one, else None."""

    @property
    def done(self) -> bool:
        """True when the episode is over (simulation); the run then ends before its time."""

    def disconnect(self) -> None:
        """Leave the robot in a safe state and disconnect. May be called twice."""


def lerobot_robot(kind: str, values: Mapping[str, str]) -> Any:
    """LeRobot's robot of a type, from the words of a command line. ValueError naming the types or fields there are, or
    the driver that is not installed.

    Types of installed plugins are known, too.
    """
    try:
        from policies.control.robot_types import make_robot
    except ImportError as error:
        raise ValueError(f"LeRobot cannot be loaded, a package that it needs is missing: {error}") from error

    robot = make_robot(kind, values)
    for what in ("action_features", "observation_features"):
        try:
            features = getattr(robot, what)
        except Exception as error:  # a driver may know them only once it is connected
            text = " ".join(str(error).split())
            raise ValueError(f"robot {kind} does not tell its {what}: {type(error).__name__}: {text}") from error
        if not isinstance(features, Mapping) or not all(isinstance(name, str) for name in features):
            raise ValueError(f"robot {kind} must tell its {what} as a dict of names, it tells {features!r:.80}")
    return robot


def state_names(robot: Any) -> list[str]:
    """The numbers of a LeRobot robot's observation, in its order."""
    return [name for name, kind in robot.observation_features.items() if not isinstance(kind, tuple)]


class LeRobotRobot:
    """Any LeRobot `Robot` under this interface. Components NAME.vel are velocities, the others positions."""

    gives_depth = False
    """A depth camera of LeRobot's tells no calibration."""

    def __init__(
        self,
        robot: Any,
        *,
        instruction: str,
        control_hz: float,
        limits: Mapping[str, tuple[float, float]],
        switches: Sequence[str] = (),
        cameras: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
        proprio_names: Sequence[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limits`: the range of every action component, by LeRobot's name for it; LeRobot itself knows none.
        `switches`: components that are on/off commands. `cameras`: those the policy reads, which the robot must have;
        None: all that show colours. `action_names`, `proprio_names`: the robot's own in the order in which they are
        wanted; None: in the robot's.

        ValueError naming a component without limits, or what the robot does not have.
        """
        names = tuple(action_names or robot.action_features)
        switches = (*switches, *getattr(robot, "switches", ()))  # of a robot that says so itself
        if missing := [name for name in names if name not in limits]:
            raise ValueError(
                f"the robot's component '{missing[0]}' has no limits: give its lowest and highest value, "
                "--limits NAME:LOW:HIGH"
            )
        if foreign := [name for name in (*switches,) if name not in names]:
            raise ValueError(f"the robot has no component '{foreign[0]}' to switch; it has {', '.join(names)}")
        if foreign := [name for name in limits if name not in names]:
            raise ValueError(f"the robot has no component '{foreign[0]}' to limit; it has {', '.join(names)}")
        for name in names:
            if not limits[name][0] <= limits[name][1]:
                raise ValueError(f"the limits of '{name}' must be lowest and highest, got {limits[name]}")
        low, high = zip(*(limits[name] for name in names), strict=True)
        self._robot, self._instruction, self._clock = robot, instruction, clock
        self.action_spec = ActionSpec(names, tuple(map(float, low)), tuple(map(float, high)), control_hz)
        moving: Kind = "displacement" if getattr(robot, "moves_by_displacements", False) else "velocity"
        self.kinds: tuple[Kind, ...] = tuple(
            "switch" if name in switches else moving if _VELOCITY.search(name) else "position" for name in names
        )
        features = robot.observation_features
        self.proprio_names = tuple(proprio_names or state_names(robot))
        seen = {name: kind for name, kind in features.items() if isinstance(kind, tuple)}
        # A depth camera has one channel; no policy here reads it, and it must not disturb one that does not.
        self.cameras = tuple(name for name, shape in seen.items() if shape[-1] != 1) if cameras is None else (*cameras,)
        """The cameras that the policy reads."""
        if lacking := [camera for camera in self.cameras if camera not in seen]:
            known = ", ".join(seen) or "no camera"
            raise ValueError(f"the policy reads camera '{lacking[0]}', the robot has {known}: name them alike")
        absent = [
            name
            for name, kind in zip(names, self.kinds, strict=True)
            if kind == "position" and name not in self.proprio_names
        ]
        if absent:
            raise ValueError(f"the robot does not report '{absent[0]}', so it cannot be held where it is")
        self._measured: dict[str, float] = {}
        self._echoes: set[str] = set()  # components whose commands the robot has repeated as they were
        self.unheeded = ""
        """The first position that the robot says it took for another one, and that was not believed, in words."""
        self.done = False

    def connect(self) -> None:
        """Connect the LeRobot robot unless it is connected already. ConnectionError for one that says afterwards that
        it is not: whoever asks it so would never disconnect it."""
        if self._robot.is_connected:
            return
        self._robot.connect()
        if not self._robot.is_connected:
            with contextlib.suppress(Exception):
                self._robot.disconnect()
            raise ConnectionError("its connect() returned, and yet it says that it is not connected (is_connected)")

    def observe(self) -> tuple[Observation, float]:
        """The current observation (B = 1) and the time at which reading it began, so that its age is never
        underestimated."""
        start = self._clock()  # before the cameras are read: an age must never look younger than it is
        seen = self._look()
        images = {camera: _picture(seen, camera) for camera in self.cameras}
        proprio = np.array([[_number(seen, name) for name in self.proprio_names]], np.float32)
        return Observation(images, proprio, [self._instruction]), start

    def rest(self) -> tuple[float, ...]:
        """The action (A,) that leaves the robot as it is: measured positions, 0 for displacements and velocities, and
        NaN for switches that are not reported."""
        seen = self._look()
        rest = {"displacement": 0.0, "velocity": 0.0, "switch": math.nan}  # a switch that is not reported
        return tuple(
            _number(seen, name) if kind == "position" or (kind == "switch" and name in seen) else rest[kind]
            for name, kind in zip(self.action_spec.names, self.kinds, strict=True)
        )

    def send(self, action_A: NDArray[np.float32]) -> tuple[float, ...] | None:
        """Command an action (A,). Returns the action the robot reports to have taken if it differs, else None."""
        wanted = dict(zip(self.action_spec.names, map(float, action_A), strict=True))
        said = self._call(self._robot.send_action, wanted)
        if not isinstance(said, Mapping):
            return None
        taken = tuple(
            self._taken(i, name, kind, wanted[name], said.get(name, wanted[name]))
            for i, (name, kind) in enumerate(zip(self.action_spec.names, self.kinds, strict=True))
        )
        return None if taken == tuple(wanted.values()) else taken

    def disconnect(self) -> None:
        """Disconnect the LeRobot robot."""
        _let_go(self._robot)

    def _look(self) -> Mapping[str, Any]:
        seen = self._call(self._robot.get_observation)
        if not isinstance(seen, Mapping):
            raise ValueError(f"the robot's get_observation gave {type(seen).__name__}, expected a dict")
        for name in self.action_spec.names:
            with contextlib.suppress(ValueError):
                self._measured[name] = _number(seen, name)
        return seen

    def _taken(self, index: int, name: str, kind: Kind, wanted: float, said: Any) -> float:
        """Return what the robot took for a commanded component. Its echo is used only where it shortens the motion: it
        lies between the measured and the commanded position, or a stop and the commanded speed, and the robot is
        configured to clip (`max_relative_target`) or has echoed another command of this component unchanged; of a
        switch, where it lies within the range. An echo in other units is therefore ignored, and `unheeded` tells of
        it."""
        try:
            said = float(said)
        except (TypeError, ValueError):
            said = math.nan
        size = self.action_spec.high[index] - self.action_spec.low[index]
        if abs(said - wanted) <= 1e-3 * abs(wanted) + 1e-6:
            if abs(wanted) > 0.05 * size:  # 0 is 0 in any unit
                self._echoes.add(name)
            return wanted
        at, slack = self._measured.get(name, math.nan) if kind == "position" else 0.0, 0.02 * size
        if abs(said - wanted) <= _COARSE * size:
            return wanted
        if kind == "switch" and self.action_spec.low[index] - slack <= said <= self.action_spec.high[index] + slack:
            return said
        # A small difference may be a scale of the robot's: what is held would creep, if it were believed.
        echoed = name in self._echoes and abs(said - wanted) > slack
        cuts = echoed or getattr(getattr(self._robot, "config", None), "max_relative_target", None)
        if cuts and min(at, wanted) - slack <= said <= max(at, wanted) + slack:
            return said
        self.unheeded = self.unheeded or (
            f"the robot says that it took {said:g} for '{name}', where {wanted:g} was sent: is that in another unit, "
            "or a limit of its own (then give it, --limits NAME:LOW:HIGH)? The log and the guards go by what was sent"
        )
        return wanted

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """LeRobot's robots raise ConnectionError for a single bad packet, too: such a robot is not lost, only one that
        is not connected any more is. A camera's TimeoutError stays what it is."""
        try:
            return method(*arguments)
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if not _connected(self._robot):
                raise ConnectionError(f"the robot is not connected any more: {text}") from error
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise RuntimeError(text) from error
            raise


_COARSE = 0.002
"""Share of a component's range up to which an echo that is rounded to a motor's steps is no news."""
_VELOCITY = re.compile(r"\.vel$|velocity|\.v(x|y|z|theta)$")
"""Names of components that LeRobot's robots give as velocities: LeKiwi, Reachy 2's base, EarthRover."""


def _picture(seen: Mapping[str, Any], camera: str) -> NDArray[np.uint8]:
    """The camera's image as (1, H, W, 3) uint8. ValueError naming the camera."""
    if seen.get(camera) is None:
        raise ValueError(f"camera '{camera}' is missing from the robot's observation")
    picture = to_uint8_picture(seen[camera], name=camera)
    if picture.ndim != 3:
        raise ValueError(f"camera '{camera}' must show one picture (H, W, 3), got {picture.shape}")
    return picture[None]


def _number(seen: Mapping[str, Any], name: str) -> float:
    """The reported value as a float. ValueError naming the joint."""
    if name not in seen:
        raise ValueError(f"'{name}' is missing from the robot's observation")
    try:
        value = float(seen[name])
    except (TypeError, ValueError):
        raise ValueError(f"'{name}' must be a number, the robot gives {type(seen[name]).__name__}") from None
    if not math.isfinite(value):
        raise ValueError(f"'{name}' is measured as {value}")
    return value


def _connected(thing: Any, *, unknown: bool = False) -> bool:
    """`unknown`: the answer for a driver that cannot even say so."""
    try:
        return bool(thing.is_connected)
    except Exception:
        return unknown


def _let_go(robot: Any) -> None:
    """Disconnect a robot. LeRobot's refuse that when a single camera is gone; then each part is, on its own: the motors
    above all. Raises the first error, after everything was tried."""
    errors = []
    if _connected(robot, unknown=True):
        try:
            robot.disconnect()
        except Exception as error:
            errors.append(error)
        else:
            if _connected(robot):
                errors.append(RuntimeError("it returned, and yet the robot says that it is connected (is_connected)"))
    if not _connected(robot):
        release = getattr(getattr(robot, "config", None), "disable_torque_on_disconnect", None)
        for part in _parts(robot):
            if not _connected(part):
                continue
            try:
                if hasattr(part, "motors") and release is not None:
                    part.disconnect(release)
                else:
                    part.disconnect()
            except Exception as error:
                errors.append(error)
    if errors:
        raise errors[0]


def _parts(robot: Any, depth: int = 2) -> Iterator[Any]:
    """Arms, buses and cameras of a robot."""
    for value in [*getattr(robot, "__dict__", {}).values()]:
        for part in value.values() if isinstance(value, dict) else [value]:
            if callable(getattr(part, "disconnect", None)):
                yield part
                if depth > 1:
                    yield from _parts(part, depth - 1)
