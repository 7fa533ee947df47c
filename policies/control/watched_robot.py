"""A robot as the control loop calls it: whatever it or one of its cameras raises or returns becomes a state, no error.

A robot that says it is gone (OSError, but no TimeoutError) is lost. Everything else that is raised, and every
observation that cannot be used (a joint or a camera is missing, a joint is NaN, a picture has another size than
before), is trouble: the latest good observation stays, and grows old.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from policies.control.robots import Robot
from vla.core.types import Observation

CLOCK_SLACK_S = 0.05
"""An observation may be this far ahead of the loop's clock: two clocks of one machine differ by less."""


class WatchedRobot:
    """Calls a robot's methods and turns its exceptions into states; none of these methods raises them."""

    def __init__(self, robot: Robot, clock: Callable[[], float]) -> None:
        self._robot, self._clock = robot, clock
        self.latest: tuple[Observation, float] | None = None
        """The latest good observation, and when it was taken."""
        self.lost = False
        self.trouble: str | None = None
        """The reason why the last call failed; None where it did not."""
        self._shapes: dict[str, tuple[int, ...]] = {}

    def connect(self) -> bool:
        """Connect to the robot. Returns True on success; otherwise `trouble` holds the reason."""
        try:
            self._robot.connect()
        except Exception as error:
            self.lost, self.trouble = True, _words(error)
            return False
        return True

    def observe(self) -> bool:
        """Read an observation into `latest`. True if it is valid. A clean call ends earlier trouble, but not a loss."""
        try:
            obs, seen_s = self._robot.observe()
            self._check(obs, seen_s)
        except Exception as error:
            self._fail(error)
            return False
        self.latest, self.trouble = (obs, float(seen_s)), None
        return True

    def rest(self) -> tuple[float, ...] | None:
        """The action (A,) that leaves the robot as it is; None if the robot cannot report it now."""
        try:
            rest = tuple(map(float, self._robot.rest()))
            for name, kind, value in zip(self._robot.action_spec.names, self._robot.kinds, rest, strict=True):
                if not math.isfinite(value) and kind != "switch":
                    raise ValueError(f"'{name}' is measured as {value}")
        except Exception as error:
            self._fail(error)
            return None
        return rest

    def send(self, action: tuple[float, ...], before: tuple[float, ...]) -> tuple[float, ...] | None:
        """Send an action (A,). Returns what reached the robot if that differs: `before` after a failure; else None."""
        try:
            sent = self._robot.send(np.array(action, np.float32))
        except Exception as error:
            self._fail(error)
            return before
        return None if sent is None else tuple(map(float, sent))

    def disconnect(self) -> str | None:
        """Disconnect the robot. Returns the error message if that failed."""
        try:
            self._robot.disconnect()
        except Exception as error:
            return f"the robot could not be let go: {_words(error)}"
        return None

    def _fail(self, error: Exception) -> None:
        self.lost = self.lost or (isinstance(error, OSError) and not isinstance(error, TimeoutError))
        self.trouble = _words(error)

    def _check(self, obs: Any, seen_s: Any) -> None:
        """Raise ValueError naming the defect of an unusable observation."""
        if self.latest is not None and obs is self.latest[0] and seen_s == self.latest[1]:
            return  # checked already
        if not isinstance(obs, Observation):
            raise ValueError(f"the robot shows {type(obs).__name__}, expected an observation")
        if seen_s > self._clock() + CLOCK_SLACK_S:
            ahead = seen_s - self._clock()
            raise ValueError(f"the robot's clock is {ahead:.2f} s ahead of the controller's: ages cannot be measured")
        names = self._robot.proprio_names
        proprio = np.asarray(obs.proprio)
        if proprio.ndim != 2 or len(proprio) != 1 or (names and proprio.shape[1] != len(names)):
            raise ValueError(f"the robot's state must have the shape (1, {len(names) or 'P'}), got {proprio.shape}")
        if not np.isfinite(proprio).all():
            index = int(np.flatnonzero(~np.isfinite(proprio[0]))[0])
            raise ValueError(f"'{names[index] if names else f'state {index}'}' is measured as {proprio[0, index]}")
        for camera, image in obs.images.items():
            shape = np.shape(image)
            if getattr(image, "dtype", None) != np.uint8 or len(shape) != 4 or 0 in shape:
                raise ValueError(f"camera '{camera}' must show (1, H, W, 3) uint8, got {shape} {_dtype(image)}")
            if self._shapes.setdefault(camera, shape) != shape:
                before, now = ("x".join(map(str, s[2:0:-1])) for s in (self._shapes[camera], shape))
                raise ValueError(f"camera '{camera}' shows {now} pixels, it was {before} when the run began")
        if missing := self._shapes.keys() - obs.images.keys():
            raise ValueError(f"camera '{min(missing)}' is missing from the observation")


def _dtype(value: object) -> str:
    return str(getattr(value, "dtype", type(value).__name__))


def _words(error: Exception) -> str:
    """One line, never empty."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
