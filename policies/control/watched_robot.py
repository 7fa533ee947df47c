"""A robot as the control loop calls it: whatever it or one of its cameras raises or returns becomes a state, no error.

A robot that says it is gone (OSError, but no TimeoutError) is lost. Everything else that is raised, and every
observation that cannot be used (a joint or a camera is missing, a joint is NaN, a picture has another size than
before), is trouble: the latest good observation stays, and grows old. A driver that calls sys.exit is trouble, too.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.control.config import believed, check_rest
from policies.control.guards import check_bounds
from policies.control.robots import Robot
from vla.core.config import find
from vla.core.types import ActionSpec, Observation

_log = logging.getLogger(__name__)

CLOCK_SLACK_S = 0.05
"""An observation may be this far ahead of the loop's clock: two clocks of one machine differ by less."""
JUMP_S = 0.2
"""Two measurements further apart than this are not compared: a position may have moved."""
FROZEN_S = 2.0
"""A camera that shows the very same picture for this long, while the state moves, is frozen or covered."""
NOT_LET_GO = "the robot could not be let go, its disconnect() was interrupted: switch its power off"
_RAISED = (Exception, SystemExit)
_ASKS = (
    "its connect() asks something on the terminal, and there is none to answer on: connect it in a terminal once "
    "(a LeRobot robot that is not calibrated: lerobot-calibrate)"
)
_MOVED = 0.05
"""Fraction of a state component's value, and at least a tenth of that in its own unit: more than an encoder's noise."""


def check_robot(robot: Any) -> None:
    """ValueError naming what a robot lacks of `policies.control.robots.Robot`, or the attribute that is none."""
    kind, remedy = type(robot).__name__, "see `Robot` in policies/control/robots.py"
    if not isinstance(spec := getattr(robot, "action_spec", None), ActionSpec):
        raise ValueError(
            f"robot {kind} needs self.action_spec = ActionSpec(names, low, high, control_hz), "
            f"it {'has none' if spec is None else f'is {type(spec).__name__}'}: {remedy}"
        )
    for name in ("kinds", "proprio_names"):
        value = getattr(robot, name, None)
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"robot {kind} needs {name}, a tuple of texts, got {value!r}: {remedy}")
    if lacking := [
        n for n in ("connect", "observe", "rest", "send", "disconnect") if not callable(getattr(robot, n, None))
    ]:
        raise ValueError(f"robot {kind} has no method {lacking[0]}(): {remedy}")
    if not hasattr(type(robot), "done") and not hasattr(robot, "done"):  # the type first: a property may raise
        raise ValueError(f"robot {kind} needs done, False for a robot that never ends a run by itself: {remedy}")
    if callable(getattr(type(robot), "done", None)):  # a method is true, which would end the run at its first tick
        raise ValueError(f"robot {kind} has a method done: it must be a property, or an attribute, of a bool: {remedy}")
    check_bounds(spec)


def own_robot(name: str, arguments: Mapping[str, str], hz: float | None = None) -> Any:
    """The robot that MODULE:CLASS `name` makes. ValueError naming it for whatever its module or its class raises, and
    for a rate `hz` that is asked for and not its own."""
    try:
        robot = find(name, {}, "robot")(**arguments)
    except _RAISED as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and text.startswith("robot '"):  # not found: it names it already
            raise
        raise ValueError(f"--robot {name} cannot be made: {type(error).__name__}: {text}") from error
    check_robot(robot)
    if hz not in (None, rate := robot.action_spec.control_hz):
        raise ValueError(f"--hz {hz:g}: {name} runs at {rate:g} Hz, as its action_spec says")
    return robot


class WatchedRobot:
    """Calls a robot's methods and turns its exceptions into states; none of these methods raises them."""

    def __init__(self, robot: Robot, clock: Callable[[], float]) -> None:
        self._robot, self._clock = robot, clock
        self.latest: tuple[Observation, float] | None = None
        """The latest good observation, and when it was taken."""
        self.lost = False
        self.trouble: str | None = None
        """The reason why the last call failed; None where it did not."""
        self.frozen = ""
        """The cameras that have stood still while the robot moved, in words; "" for none."""
        self.jumped = ""
        """Positions that were measured far from where they had been a moment before, in words; "" for none."""
        self.unheeded = ""
        """A command that the robot says it took otherwise, and that was not believed, in words; "" for none."""
        self.spent_s: Counter[str] = Counter()
        """Seconds that the robot's methods have taken, by their names."""
        self.longest_s: Counter[str] = Counter()
        """Seconds of the longest call of each."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._seen: dict[str, _Seen] = {}
        self._given: tuple[Any, Any] | None = None
        spec = robot.action_spec
        self._half: dict[int, float] = {  # state index of a position: half of its range
            [*robot.proprio_names].index(name): (high - low) / 2
            for name, kind, low, high in zip(spec.names, robot.kinds, spec.low, spec.high, strict=False)
            if kind == "position" and name in robot.proprio_names and 0 < high - low < math.inf
        }
        # a tenth of the most; positions have a guard of their own
        drives = [kind in ("displacement", "velocity") for kind in robot.kinds]
        self._driving = np.where(drives, 0.1 * np.array(spec.high, np.float64), np.inf)
        self._driven_s = -math.inf
        self._calling: tuple[str, float] | None = None

    @contextmanager
    def told_when_stuck(self, after_s: float) -> Iterator[None]:
        """Log one line for a call of the robot that takes longer than `after_s`: the loop that waits for it cannot."""
        ended = threading.Event()

        def watch() -> None:
            told = None
            while not ended.wait(0.1):
                calling = self._calling
                if calling not in (None, told) and time.monotonic() - calling[1] > after_s:
                    told = calling
                    line = "the robot's %s() has not returned for %g s: nothing is sent to it; Ctrl-C ends the run"
                    _log.error(line, calling[0], after_s)

        thread = threading.Thread(target=watch, name="stuck-robot", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @contextmanager
    def timed(self, method: str) -> Iterator[None]:
        """A call of the robot, or of what belongs to it, for `spent_s` and `told_when_stuck`."""
        began = self._clock()
        self._calling = (method, time.monotonic())
        try:
            yield
        finally:
            self._calling = None
            self.spent_s[method] += (took_s := self._clock() - began)
            self.longest_s[method] = max(took_s, self.longest_s[method])

    def connect(self) -> bool:
        """Connect to the robot. Returns True on success; otherwise `trouble` holds the reason."""
        try:
            self._robot.connect()
        except _RAISED as error:
            self.lost, self.trouble = True, _ASKS if isinstance(error, EOFError) else _words(error)
            return False
        return True

    def begin(self) -> None:
        """Say that the run's clock starts now, to a robot that wants to know (a simulated one: `LiveWorld.begin`)."""
        begin = getattr(self._robot, "begin", None)
        try:
            if begin is not None:
                begin()
        except _RAISED as error:
            self._fail(error)

    def observe(self) -> bool:
        """Read an observation into `latest`, a copy: drivers reuse their buffers. True if it is valid."""
        try:
            with self.timed("observe"):
                shown = self._robot.observe()
            if not isinstance(shown, tuple | list) or len(shown) != 2:
                raise ValueError(
                    "the robot's observe() must return an Observation and the time.monotonic() at which it was taken, "
                    f"it returned {_named(shown)}"
                )
            obs, seen_s = shown
            self._check(obs, seen_s)
        except _RAISED as error:
            self._fail(error)
            return False
        self.trouble = None
        if self._is_given(obs, seen_s):
            return True
        state = np.array(obs.proprio, np.float32)
        self._look_for_frozen(obs, float(seen_s))
        self._look_for_jumps(state[0], float(seen_s))
        images = {camera: self._seen[camera].picture for camera in obs.images}
        kept = replace(obs, images=images, proprio=state, **_views(obs))
        self._given, self.latest = (obs, seen_s), (kept, float(seen_s))
        return True

    def _is_given(self, obs: Any, seen_s: Any) -> bool:
        """True for the observation that `latest` holds already."""
        return self._given is not None and obs is self._given[0] and seen_s == self._given[1]

    def _look_for_jumps(self, state_P: NDArray[np.float32], seen_s: float) -> None:
        """Log one line for every position that is measured more than half of its range away from where it was a moment
        before, which no motor moves in that time."""
        if self.latest is None or not 0 < (after_s := seen_s - self.latest[1]) <= JUMP_S:
            return
        before_P = self.latest[0].proprio[0]
        for index in [i for i, half in self._half.items() if abs(state_P[i] - before_P[i]) > half]:
            del self._half[index]  # told once
            line = (
                f"'{self._robot.proprio_names[index]}' was measured at {before_P[index]:g} and {1000 * after_s:.0f} ms "
                f"later at {state_P[index]:g}: does its encoder wrap, was it zeroed anew, or is a reading wrong? The "
                "policy reads it as it comes"
            )
            self.jumped = f"{self.jumped}; {line}" if self.jumped else line
            _log.warning("%s", line)

    def _look_for_frozen(self, obs: Observation, seen_s: float) -> None:
        """Log one line for every camera that shows the same picture, bit for bit, while the state moves. A real one's
        noise, and a rendered one's motion, change some pixel."""
        state = np.array(obs.proprio[0], np.float64)
        for camera, image in obs.images.items():
            seen = self._seen.get(camera)
            if seen is None or not _alike(seen.picture, np.asarray(image)):
                self._seen[camera] = _Seen(np.array(image), seen_s, state)  # a copy: drivers reuse their buffers
            elif not seen.told and (seen_s - seen.since_s >= FROZEN_S and (moved := self._moved(seen, state))):
                seen.told = True
                line = f"camera '{camera}' has shown the very same picture for {seen_s - seen.since_s:.1f} s {moved}"
                self.frozen = f"{self.frozen}; {line}" if self.frozen else line
                _log.warning("%s", line)

    def _moved(self, seen: _Seen, state_P: NDArray[np.float64]) -> str:
        """Say how the robot moved, or was to, since a camera showed what it shows now; "" where it did not."""
        if _moved(seen.state, state_P):
            return "in which the robot moved: is it frozen or covered?"
        if self._clock() - JUMP_S < self._driven_s > seen.since_s and np.array_equal(seen.state, state_P):
            return "and the state the very same numbers, while the robot was to move: does its driver still read them?"
        return ""

    def rest(self) -> tuple[float, ...] | None:
        """The action (A,) that leaves the robot as it is; None if the robot cannot report it now."""
        try:
            with self.timed("rest"):
                rest = self._robot.rest()
            rest = self._numbers("rest", rest)
            for name, kind, value in zip(self._robot.action_spec.names, self._robot.kinds, rest, strict=True):
                if not math.isfinite(value) and kind != "switch":
                    raise ValueError(f"'{name}' is measured as {value}")
            if self.latest is not None and self._clock() - self.latest[1] <= JUMP_S:
                check_rest(rest, self.latest[0], self._robot)
        except _RAISED as error:
            self._fail(error)
            return None
        return rest

    def send(self, action: tuple[float, ...], before: tuple[float, ...]) -> tuple[float, ...] | None:
        """Send an action (A,). Returns what reached the robot if that differs: `before` after a failure; else None."""
        try:
            with self.timed("send"):
                sent = self._robot.send(np.array(action, np.float32))
            if (np.abs(action) > self._driving).any():
                self._driven_s = self._clock()
            unheeded = getattr(self._robot, "unheeded", "")
            if sent is not None:
                seen = None if self.latest is None else self.latest[0]
                sent, odd = believed(self._numbers("send", sent), action, before, seen, self._robot)
                unheeded = unheeded or odd
            if unheeded and not self.unheeded:
                self.unheeded = unheeded
                _log.warning("%s", unheeded)
            return sent
        except _RAISED as error:
            self._fail(error)
            return before

    def done(self) -> bool | None:
        """True when the episode is over; None if the robot cannot say so now."""
        try:
            done = self._robot.done
        except _RAISED as error:
            self._fail(error)
            self.trouble = f"the robot's done raises {self.trouble}"
            return None
        if not isinstance(done, bool | np.bool_):  # a text or a function is true, whatever it means
            self._fail(ValueError(f"the robot's done must be True or False, it is {_named(done)}"))
            return None
        return bool(done)

    def disconnect(self) -> str | None:
        """Disconnect the robot. Returns the error message if that failed."""
        try:
            with self.timed("disconnect"):
                self._robot.disconnect()
        except _RAISED as error:
            return f"the robot could not be let go, its disconnect() failed: switch its power off ({_words(error)})"
        except KeyboardInterrupt:  # somebody who does not want to wait: what is left of it, nobody knows
            return NOT_LET_GO
        return None

    def _numbers(self, method: str, given: Any) -> tuple[float, ...]:
        """An action that a method returned. ValueError naming the method unless it has one number per component."""
        names = self._robot.action_spec.names
        try:
            numbers = tuple(map(float, given))
        except (TypeError, ValueError):
            numbers = None
        if numbers is None or isinstance(given, str | bytes | Mapping) or len(numbers) != len(names):
            raise ValueError(
                f"the robot's {method}() must return {'None or ' if method == 'send' else ''}{len(names)} numbers "
                f"({', '.join(names)}), it returned {_named(given) if numbers is None else len(numbers)}"
            )
        return numbers

    def _fail(self, error: BaseException) -> None:
        self.lost = self.lost or (isinstance(error, OSError) and not isinstance(error, TimeoutError))
        self.trouble = _words(error)

    def _check(self, obs: Any, seen_s: Any) -> None:
        """Raise ValueError naming the defect of an unusable observation."""
        if self._is_given(obs, seen_s):
            return  # checked already
        if not isinstance(obs, Observation):
            raise ValueError(f"the robot's observe() must return an Observation first, it returned {_named(obs)}")
        if not isinstance(seen_s, int | float | np.number) or isinstance(seen_s, bool):
            raise ValueError(
                f"the robot's observe() must return a time.monotonic() second, it returned {_named(seen_s)}"
            )
        if not math.isfinite(seen_s):
            raise ValueError(f"the robot's observe() must return a time.monotonic() second, it returned {seen_s}")
        if seen_s > self._clock() + CLOCK_SLACK_S:
            ahead = seen_s - self._clock()
            raise ValueError(f"the robot's clock is {ahead:.2f} s ahead of the controller's: ages cannot be measured")
        names = self._robot.proprio_names
        words = obs.instruction
        if isinstance(words, str) or len(words) != 1 or not isinstance(words[0], str):
            raise ValueError(f'the robot\'s instruction must be a list of one text, ["pick up ..."], got {words!r}')
        proprio = np.asarray(obs.proprio)
        if proprio.dtype.kind not in "iuf":
            raise ValueError(f"the robot's state must be an array of numbers (1, P), got {_dtype(obs.proprio)}")
        if proprio.ndim != 2 or len(proprio) != 1 or (names and proprio.shape[1] != len(names)):
            raise ValueError(f"the robot's state must have the shape (1, {len(names) or 'P'}), got {proprio.shape}")
        if not np.isfinite(proprio).all():
            index = int(np.flatnonzero(~np.isfinite(proprio[0]))[0])
            raise ValueError(f"'{names[index] if names else f'state {index}'}' is measured as {proprio[0, index]}")
        if not isinstance(obs.images, Mapping):
            raise ValueError(f"the robot's images must be a dict of camera and picture, got {_named(obs.images)}")
        for camera, image in obs.images.items():
            shape = np.shape(image)
            if getattr(image, "dtype", None) != np.uint8 or len(shape) != 4 or 0 in shape:
                raise ValueError(f"camera '{camera}' must show (1, H, W, 3) uint8, got {shape} {_dtype(image)}")
            if self._shapes.setdefault(camera, shape) != shape:
                before, now = (f"{w}x{h} pixels of {c} channels" for _, h, w, c in (self._shapes[camera], shape))
                raise ValueError(f"camera '{camera}' shows {now}, it was {before} when the run began")
        if missing := self._shapes.keys() - obs.images.keys():
            raise ValueError(f"camera '{min(missing)}' is missing from the observation")


@dataclass
class _Seen:
    """A camera's picture, and the state when it was first shown."""

    picture: NDArray[Any]
    since_s: float
    state: NDArray[np.float64]
    told: bool = False


def _views(obs: Observation) -> dict[str, dict[str, NDArray[Any]] | None]:
    """Copies of depth and calibration."""
    given = {"depth": obs.depth, "intrinsics": obs.intrinsics, "extrinsics": obs.extrinsics}
    return {part: views and {camera: np.array(view) for camera, view in views.items()} for part, views in given.items()}


def _alike(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """True for equal pictures; a few pixels tell most others apart."""
    few = (slice(None), slice(None, None, 16), slice(None, None, 16))
    return one.shape == other.shape and np.array_equal(one[few], other[few]) and np.array_equal(one, other)


def _moved(before: NDArray[np.float64], now: NDArray[np.float64]) -> bool:
    return before.shape == now.shape and bool(
        (np.abs(now - before) > _MOVED * np.maximum(np.maximum(np.abs(before), np.abs(now)), 0.1)).any()
    )


def _named(value: object) -> str:
    """A returned value for a message: None, True, a list."""
    return repr(value) if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def _dtype(value: object) -> str:
    return str(getattr(value, "dtype", type(value).__name__))


def _words(error: BaseException) -> str:
    """One line, never empty."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
