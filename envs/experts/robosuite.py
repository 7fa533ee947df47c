"""Scripted experts of the robosuite suites. Each is a script: a generator of where the hand should be next.

The fingers close along the grip site's x axis (since robosuite 1.5) and reach along its z axis.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from envs.adapters.robosuite_suites import GRASP_BAR_M
from vla.core.types import ActionChunk, Observation, PolicySpec, Prefix

Vector = NDArray[np.float64]

_MAX_DELTA_M, _MAX_DELTA_RAD = 0.05, 0.5
_OPEN, _CLOSED = -1.0, 1.0
_UP = np.array([0.0, 0.0, 1.0])
_PATIENT = 1000
"""Steps for what has to happen before anything else can: the horizon ends it."""


@dataclass
class Sight:
    """Privileged input of a scripted expert, refreshed before each of its steps."""

    grip: Vector = field(default_factory=lambda: np.zeros(3))
    rotation: Vector = field(default_factory=lambda: np.eye(3))
    """Rotation matrix (3, 3) of the grip site, world frame: columns are its axes."""
    state: Vector = field(default_factory=lambda: np.zeros(0))
    """The suite's privileged state (`envs.adapters.robosuite_suites`)."""


@dataclass(frozen=True)
class Command:
    """Where the hand should go."""

    position: Vector
    rotation: Vector
    gripper: float
    speed: float = 1.0
    """Greatest component of the translation."""


Script = Generator[Command, None, bool]


class _Lost(Exception):
    """Raised when the gripper has lost the object it held."""


def _rotation(quat_wxyz: Vector) -> Vector:
    w, x, y, z = quat_wxyz / np.linalg.norm(quat_wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _rotation_vector(matrix: Vector) -> Vector:
    """Axis times angle (rad), for angles below pi."""
    twice = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    sine = np.linalg.norm(twice) / 2
    angle = np.arctan2(sine, (np.trace(matrix) - 1) / 2)
    return twice * (0.5 if sine < 1e-9 else angle / (2 * sine))


def _turned(vector: Vector, axis: Vector, angle: float) -> Vector:
    """`vector` turned about the unit `axis` (Rodrigues)."""
    c, s = np.cos(angle), np.sin(angle)
    return c * vector + s * np.cross(axis, vector) + (1 - c) * (axis @ vector) * axis


def _downward(yaw: float) -> Vector:
    """The hand pointing straight down, its fingers closing along `yaw`."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])


def _wrapped(angle: float, period: float) -> float:
    """In [-period / 2, period / 2)."""
    return (angle + period / 2) % period - period / 2


def _servo(see: Sight, command: Command) -> NDArray[np.float32]:
    """One OSC_POSE action toward a command."""
    move = (command.position - see.grip) / _MAX_DELTA_M
    move *= min(1.0, command.speed / max(np.abs(move).max(), 1e-9))
    turn = 0.6 * _rotation_vector(command.rotation @ see.rotation.T) / _MAX_DELTA_RAD
    turn *= min(1.0, 1.0 / max(np.abs(turn).max(), 1e-9))
    return np.concatenate([move, turn, [command.gripper]]).astype(np.float32)


def _go(
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
    """Head for a place that may move; True once there. Raises `_Lost` when `lost()`."""
    for _ in range(steps):
        if lost and lost():
            raise _Lost
        command = Command(where(), rotation, gripper, speed)
        angle = np.linalg.norm(_rotation_vector(rotation @ see.rotation.T))
        if np.linalg.norm(command.position - see.grip) < within_m and angle < within_rad:
            return True
        yield command
    return False


def _at(position: Vector) -> Callable[[], Vector]:
    """A place that does not move."""
    fixed = position.copy()
    return lambda: fixed


def _level(where: Callable[[], Vector], height: float) -> Vector:
    return np.array([*where()[:2], height])


def _stay(where: Callable[[], Vector], rotation: Vector, gripper: float, steps: int) -> Iterator[Command]:
    for _ in range(steps):
        yield Command(where(), rotation, gripper)


class RobosuiteExpert:
    """Policy of one-step chunks from `envs.adapters.robosuite_env`'s proprio and privileged state."""

    spec = PolicySpec(chunk_size=1, n_action_steps=1)

    def __init__(self, suite: str, num_envs: int) -> None:
        self._script = _SCRIPTS.get(suite, _grasp)
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
        see.grip, see.rotation, see.state = proprio[:3], _rotation(proprio[3:7]), state
        script = self._running[i] or self._script(see)
        self._running[i] = script
        command = next(script, None)
        if command is None:  # it has nothing more to do: out of the way
            command = Command(see.grip + 0.1 * _UP, see.rotation, _OPEN)
        return _servo(see, command)


def _grasp(see: Sight) -> Script:
    """Lift, Stack, Can: grasp from above, and let go over the goal if there is one; again, if that was no success."""
    has_goal = see.state[7] > 0.5

    def grasp() -> Vector:
        return see.state[0:3] + see.state[11] * _UP

    def over_goal() -> Vector:
        return see.state[4:7] + see.grip - see.state[0:3]

    def lost() -> bool:
        return bool(np.linalg.norm(see.grip - see.state[0:3]) > 0.06)

    while True:
        mine = float(np.arctan2(see.rotation[1, 0], see.rotation[0, 0]))
        hand = _downward(mine + _face(see.state, mine))
        yield from _go(see, lambda: grasp() + 0.10 * _UP, hand, _OPEN, within_m=0.015, within_rad=0.05)
        yield from _go(see, grasp, hand, _OPEN, within_m=0.006, within_rad=0.05, steps=40)
        yield from _stay(grasp, hand, _CLOSED, 6)
        high = see.grip[2] + (max(0.10, see.state[6] - see.state[2] + 0.13) if has_goal else 0.10)
        try:
            up = _at(np.array([*see.grip[:2], high]))
            yield from _go(see, up, hand, _CLOSED, within_m=0.02 if has_goal else 0.0, lost=lost)
            across = partial(_level, over_goal, high)
            yield from _go(see, across, hand, _CLOSED, within_m=0.015, steps=80, lost=lost)
            yield from _go(see, over_goal, hand, _CLOSED, within_m=0.005, steps=40, speed=0.5, lost=lost)
        except _Lost:
            continue
        yield from _stay(lambda: see.grip, hand, _OPEN, 6)
        yield from _go(see, lambda: see.grip + 0.1 * _UP, hand, _OPEN, within_m=0.0, steps=15)


def _face(state: Vector, rest_yaw: float) -> float:
    """Turn of the hand (rad from `rest_yaw`) that has the fingers close on two faces of a box.

    The nearest such turn; but beside what it is to be stacked on, if that is close, the one with more room for fingers.
    """
    turn = _wrapped(state[3] - rest_yaw, np.pi / 2)
    beside = state[4:6] - state[0:2]
    if state[7] < 0.5 or np.linalg.norm(beside) > 0.12:
        return turn
    other = turn - np.copysign(np.pi / 2, turn)
    return min((turn, other), key=lambda yaw: abs(beside @ [np.cos(rest_yaw + yaw), np.sin(rest_yaw + yaw)]))


def _square(see: Sight) -> Script:
    """NutAssemblySquare: take the nut by its handle, turn it square with the peg, thread it on with a light hand."""

    def centre() -> Vector:
        return see.state[0:3]

    def grasp() -> Vector:
        return see.state[4:7] + 0.010 * _unit(see.state[4:7] - centre())

    def over_peg(height: float) -> Vector:
        return see.grip + np.array([*(see.state[7:9] - centre()[:2]), height - centre()[2]])

    def lost() -> bool:
        return bool(np.linalg.norm(see.grip - see.state[4:7]) > 0.06)

    start, mine = see.grip.copy(), float(np.arctan2(see.rotation[1, 0], see.rotation[0, 0]))
    yield from _stay(lambda: start, _downward(mine), _OPEN, 12)  # the nut falls onto the table first
    while True:
        outward = see.state[4:6] - centre()[:2]
        # The fingers close across the handle, which is a bar that points away from the nut.
        yaw = mine + _wrapped(float(np.arctan2(outward[1], outward[0])) + np.pi / 2 - mine, np.pi)
        hand = _downward(yaw)
        yield from _go(see, lambda: grasp() + 0.10 * _UP, hand, _OPEN, within_m=0.010, within_rad=0.05)
        yield from _go(see, grasp, hand, _OPEN, within_m=0.006, within_rad=0.05, steps=50)
        yield from _stay(grasp, hand, _CLOSED, 8)
        try:
            up = _at(see.grip + 0.20 * _UP)
            yield from _go(see, up, hand, _CLOSED, within_m=0.02, steps=50, speed=0.5, lost=lost)
            for angle in _steps_to_square(float(see.state[3]), yaw, mine):
                hand = _downward(yaw + angle)
                here = _at(see.grip)
                yield from _go(see, here, hand, _CLOSED, within_m=0.05, within_rad=0.05, steps=25, lost=lost)
            for height, near, turn in ((0.985, 0.02, 0.03), (0.985, 0.006, 0.03), (0.975, 0.003, 0.02)):
                above = partial(over_peg, height)
                yield from _go(
                    see, above, hand, _CLOSED, within_m=near, within_rad=turn, steps=60, speed=0.5, lost=lost
                )
            for _ in range(60):
                if lost():
                    raise _Lost
                if centre()[2] < 0.86:
                    break
                # Above the peg's top the nut is centred; around it the peg does that.
                aside = np.clip(see.state[7:9] - centre()[:2], -0.01, 0.01) if centre()[2] > 0.958 else np.zeros(2)
                yield Command(see.grip + np.array([*aside, -0.012]), hand, _CLOSED)
        except _Lost:
            continue
        yield from _stay(lambda: see.grip, hand, _OPEN, 5)
        yield from _go(see, lambda: see.grip + 0.1 * _UP, hand, _OPEN, within_m=0.0, steps=8)


def _unit(vector: Vector) -> Vector:
    return vector / np.linalg.norm(vector)


def _steps_to_square(nut_yaw: float, hand_yaw: float, rest_yaw: float) -> list[float]:
    """Turns of the hand (rad from now, at most 0.4 apart) after which the nut's sides are parallel to the peg's.

    Of the four such turns the one is chosen that is short, keeps the wrist near its rest, and does not have the handle
    point away from the robot, where the arm would have to stretch.
    """

    def cost(quarter: float) -> float:
        turn = _wrapped(quarter - nut_yaw, 2 * np.pi)
        from_rest = abs(_wrapped(hand_yaw + turn - rest_yaw, 2 * np.pi))
        return abs(turn) + (1.5 if abs(quarter) < 0.1 else 0.0) + (3.0 if from_rest > 2.0 else 0.0)

    turn = _wrapped(min((-np.pi / 2, 0.0, np.pi / 2, np.pi), key=cost) - nut_yaw, 2 * np.pi)
    count = max(1, int(np.ceil(abs(turn) / 0.4)))
    return [turn * k / count for k in range(1, count + 1)]


def _door(see: Sight) -> Script:
    """Door: grip the handle's bar from the front, turn the hand with it as one turns a handle, and pull.

    From above there is no room: the hand is wider than the gap between bar and door. Reaching toward the door, with one
    finger over and one under the bar, it has all the room there is, and its grip holds while the door swings.
    """

    def pose(more_latch: float = 0.0, more_hinge: float = 0.0, out: float = 0.0) -> tuple[Vector, Vector]:
        """(grip position, hand rotation) on the bar once latch and hinge have moved on by so much (rad)."""
        centre, bar, outward, hinge = see.state[0:3], see.state[3:6], see.state[6:9], see.state[9:12]
        bar = _turned(bar, -outward, more_latch)
        point = centre + GRASP_BAR_M * bar + out * outward
        point = hinge * [1, 1, 0] + point[2] * _UP + _turned((point - hinge) * [1, 1, 0], _UP, more_hinge)
        bar, outward = _turned(bar, _UP, more_hinge), _turned(outward, _UP, more_hinge)
        closing = np.cross(-outward, bar)
        hand = np.stack([closing, np.cross(-outward, closing), -outward], axis=1)
        flipped = hand * [-1.0, -1.0, 1.0]
        # The fingers are alike: the wrist takes the shorter way from where it is. (From where it began, a latch turned
        # by 1.2 rad is as far one way as the other, and the hand went to and fro.)
        return point, max(hand, flipped, key=lambda rotation: np.trace(see.rotation.T @ rotation))

    while True:
        yield from _go(see, lambda: pose(out=0.10)[0], pose()[1], _OPEN, within_m=0.015, within_rad=0.08, steps=80)
        yield from _go(see, lambda: pose(out=0.005)[0], pose()[1], _OPEN, within_m=0.008, within_rad=0.05, steps=40)
        yield from _stay(lambda: pose()[0], pose()[1], _CLOSED, 6)
        for _ in range(200):
            if np.linalg.norm(pose()[0] - see.grip) > 0.08:
                break
            if see.state[12] < 1.3 and see.state[13] < 0.02:
                yield Command(*pose(more_latch=0.25), _CLOSED)
            else:  # the latch's tip must be all the way out of the frame, and stay so until it is past it
                yield Command(*pose(more_latch=0.1 if see.state[13] < 0.1 else 0.0, more_hinge=0.10), _CLOSED)


_SCRIPTS: dict[str, Callable[[Sight], Script]] = {"robosuite-square": _square, "robosuite-door": _door}
