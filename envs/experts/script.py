"""Scripts for a hand under OSC_POSE: generators of where it should be next. The base of scripted experts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vla.core.types import ActionChunk, Observation, PolicySpec, Prefix

Vector = NDArray[np.float64]

MAX_DELTA_M, MAX_DELTA_RAD = 0.05, 0.5
OPEN, CLOSED = -1.0, 1.0
NOISE_CORRELATION = 0.7
"""Lag-1 correlation of the noise on an expert's commands: independent noise on displacements averages out and disturbs
nothing."""
UP = np.array([0.0, 0.0, 1.0])
_PATIENT = 1000
"""Steps for what has to happen before anything else can: the horizon ends it."""


@dataclass
class Sight:
    """Privileged input of a scripted expert, refreshed before each of its steps."""

    grip: Vector = field(default_factory=lambda: np.zeros(3))
    rotation: Vector = field(default_factory=lambda: np.eye(3))
    """Rotation matrix (3, 3) of the grip site, world frame: columns are its axes."""
    state: Vector = field(default_factory=lambda: np.zeros(0))
    """The suite's privileged state."""
    proprio: Vector = field(default_factory=lambda: np.zeros(0))
    """(P,) as a policy sees it."""


@dataclass(frozen=True)
class Command:
    """Where the hand should go."""

    position: Vector
    rotation: Vector
    gripper: float
    speed: float = 1.0
    """Greatest component of the translation."""


Script = Generator[Command, None, bool]


class Lost(Exception):  # noqa: N818 - a turn of events, not an error
    """Raised when the gripper has lost the object it held."""


def rotation_of(quat_wxyz: Vector) -> Vector:
    """(3, 3) rotation matrix of a quaternion."""
    w, x, y, z = quat_wxyz / np.linalg.norm(quat_wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_vector(matrix: Vector) -> Vector:
    """Axis times angle (rad), for angles below pi."""
    twice = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    sine = np.linalg.norm(twice) / 2
    angle = np.arctan2(sine, (np.trace(matrix) - 1) / 2)
    return twice * (0.5 if sine < 1e-9 else angle / (2 * sine))


def turned(vector: Vector, axis: Vector, angle: float) -> Vector:
    """`vector` turned about the unit `axis` (Rodrigues)."""
    c, s = np.cos(angle), np.sin(angle)
    return c * vector + s * np.cross(axis, vector) + (1 - c) * (axis @ vector) * axis


def about(matrix: Vector, vector: Vector) -> Vector:
    """A rotation matrix turned by a rotation vector, both in the world frame."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-9:
        return matrix
    return np.stack([turned(column, vector / angle, angle) for column in matrix.T], axis=1)


def downward(yaw: float) -> Vector:
    """The hand pointing straight down, its fingers closing along `yaw`."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])


def wrapped(angle: float, period: float) -> float:
    """In [-period / 2, period / 2)."""
    return (angle + period / 2) % period - period / 2


def tilted(rest: Vector, forward: Vector, closing: float, tilt: float) -> Vector:
    """The hand at rest, turned until its fingers close at the angle `closing` from `forward` (level, unit), then tilted
    to point `forward` by `tilt` (rad)."""
    yaw = float(np.arctan2(forward[1], forward[0])) + closing - np.pi / 2
    return about(about(rest, wrapped(yaw, np.pi) * UP), -tilt * np.cross(UP, forward))


def servo(see: Sight, command: Command) -> NDArray[np.float32]:
    """One OSC_POSE action toward a command."""
    move = (command.position - see.grip) / MAX_DELTA_M
    move *= min(1.0, command.speed / max(np.abs(move).max(), 1e-9))
    turn = 0.6 * rotation_vector(command.rotation @ see.rotation.T) / MAX_DELTA_RAD
    turn *= min(1.0, 1.0 / max(np.abs(turn).max(), 1e-9))
    return np.concatenate([move, turn, [command.gripper]]).astype(np.float32)


def go(
    see: Sight,
    where: Callable[[], Vector],
    rotation: Vector,
    gripper: float,
    *,
    within_m: float,
    within_rad: float = np.inf,
    steps: int = _PATIENT,
    speed: float = 1.0,
    lost: Callable[[], bool] | None = None,
) -> Script:
    """Head for a place that may move; True once there. Raises `Lost` when `lost()`."""
    for _ in range(steps):
        if lost and lost():
            raise Lost
        command = Command(where(), rotation, gripper, speed)
        angle = np.linalg.norm(rotation_vector(rotation @ see.rotation.T))
        if np.linalg.norm(command.position - see.grip) < within_m and angle < within_rad:
            return True
        yield command
    return False


def at(position: Vector) -> Callable[[], Vector]:
    """A place that does not move."""
    fixed = position.copy()
    return lambda: fixed


def stay(where: Callable[[], Vector], rotation: Vector, gripper: float, steps: int) -> Iterator[Command]:
    """Some steps at a place that may move."""
    for _ in range(steps):
        yield Command(where(), rotation, gripper)


class ScriptedExpert:
    """Policy of one-step chunks: one script per environment, of OSC_POSE actions (B, 1, 7)."""

    spec = PolicySpec(chunk_size=1, n_action_steps=1)

    def __init__(self, script: Callable[[Sight], Script], rotation: Callable[[Vector], Vector], num_envs: int) -> None:
        """`script` begins an episode; `rotation` returns the hand's (3, 3) matrix of an observation's proprio (P,)."""
        self._script, self._rotation = script, rotation
        self._sights = [Sight() for _ in range(num_envs)]
        self._running: list[Script | None] = [None] * num_envs

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""
        for i in range(len(self._running)) if env_ids is None else env_ids:
            self._running[i] = None

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Observation of B environments -> action chunk (B, 1, 7)."""
        if obs.privileged is None:
            raise ValueError("the scripted expert needs the simulator's state: Observation.privileged is None")
        rows = zip(obs.proprio.astype(np.float64), obs.privileged.astype(np.float64), strict=True)
        return np.stack([self._act(i, proprio, state) for i, (proprio, state) in enumerate(rows)])[:, None]

    def _act(self, i: int, proprio: Vector, state: Vector) -> NDArray[np.float32]:
        see = self._sights[i]
        see.grip, see.rotation, see.state, see.proprio = proprio[:3], self._rotation(proprio), state, proprio
        script = self._running[i] or self._script(see)
        self._running[i] = script
        command = next(script, None)
        if command is None:  # it has nothing more to do: out of the way
            command = Command(see.grip + 0.1 * UP, see.rotation, OPEN)
        return servo(see, command)
