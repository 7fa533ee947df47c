"""A person who takes over from a policy and hands back: when that is, and how the robot is led from one to the other.

Where the two want a position to be elsewhere, the difference fades at the speed at which a robot comes back into its
limits (`GuardConfig.recovery_s`, or its velocity limit), so that neither taking over nor handing back is a jump. While
it fades, and until the policy has a new chunk, the tick's label is `hand_over`. Displacements and velocities have no
place to be led from; switches (an on/off gripper) follow the person at once.

Every command, whoever gives it, passes the guards after this.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from policies.control.guards import GuardConfig
from policies.control.playback import Driver
from policies.control.robots import Robot
from policies.teleop.teleoperators import Commands, says_itself

By = Literal["key", "event", "motion"]
BYS: tuple[By, ...] = ("key", "event", "motion")
"""How a person takes over: by a key of the terminal, by an event of the teleoperator, by moving it."""
TAKE_OVER_KEY = b" "
_LETS_GO_S = {"key": 0.0, "event": 0.5, "motion": 1.0}
"""The person hands back when they have not said otherwise for this long: an event flickers, a hand rests."""
_MOVES = 0.03
"""Fraction of a component's range by which a teleoperator has been moved: more than its noise."""


class TakeOver:
    """One person with one teleoperator. A `policies.control.playback.Person`."""

    def __init__(self, teleop: Any, robot: Robot, guards: GuardConfig, *, by: By | None = None) -> None:
        """`by` None: by the teleoperator's event where it has one, else by the key. ValueError for a teleoperator that
        lacks components of the robot, or has no such event."""
        self.commands = Commands(teleop, robot)
        self.by: By = by or ("event" if says_itself(teleop) else "key")
        if self.by == "event" and not says_itself(teleop):
            raise ValueError("this teleoperator has no event for taking over: choose --take-over key, or motion")
        self._lets_go_s: float = getattr(teleop, "lets_go_s", _LETS_GO_S[self.by])
        self.drives = False
        self.driver: Driver = "policy"
        self.error: str | None = None
        self._toggled = threading.Event()  # by the thread that listens to the keys
        self._asked_for = False
        self._until_s = -math.inf
        self._hand: tuple[float, ...] | None = None
        self._resting: tuple[float, ...] | None = None
        self._last: tuple[float, ...] = (math.nan,) * len(robot.kinds)
        self._fade = Fade(robot, guards)
        self._waits = False  # for the policy's first chunk after a hand-back

    def key(self, key: bytes) -> bool:
        """True for the key that takes over and hands back, which is then no emergency stop."""
        if self.by != "key" or key != TAKE_OVER_KEY:
            return False
        self._toggled.set()
        return True

    def connect(self) -> bool:
        """See `Person.connect`."""
        return self._tried(self.commands.teleop.connect, "cannot be connected, ")

    def disconnect(self) -> None:
        """See `Person.disconnect`; a teleoperator moves nothing, so that one that cannot be let go is no error."""
        before = self.error
        self._tried(self.commands.teleop.disconnect, "")
        self.error = before

    def look(self, last: tuple[float, ...], now_s: float) -> None:
        """See `Person.look`."""
        self._last = last
        failed = self.error is not None
        if not self._tried(self._read, "fails: "):
            return
        if failed:  # the hand may be anywhere by now
            self._fade.begin()
        wants = self._wants()
        if wants:
            self._until_s = now_s + self._lets_go_s
        drives = wants or now_s < self._until_s
        if drives != self.drives:
            self._fade.begin()
            self._waits = not drives
            if not drives:
                self._resting = self._hand
        self.drives = drives

    def command(self, planned: tuple[float, ...] | None) -> tuple[float, ...] | None:
        """See `Person.command`."""
        wanted = self._hand if self.drives else planned
        if wanted is not None:
            self._waits = False
            wanted = self._fade(wanted, self._last)
        led = self._waits or self._fade.lasts
        self.driver = "hand_over" if led else "human" if self.drives else "policy"
        return wanted

    def _read(self) -> None:
        self._hand = self.commands.read(self._last)
        if self.by == "event":
            self._asked_for = self.commands.intervenes()

    def _wants(self) -> bool:
        if self.by == "event":
            return self._asked_for
        if self.by == "key":
            if self._toggled.is_set():
                self._toggled.clear()
                return not self.drives
            return self.drives
        assert self._hand is not None
        if self._resting is None:
            self._resting = self._hand
        moved = self._fade.moved(self._hand, self._resting)
        if moved:
            self._resting = self._hand
        return moved

    def _tried(self, call: Callable[[], Any], what: str) -> bool:
        try:
            call()
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            ours = text.startswith("the teleoperator")
            self.error = text if ours else f"the teleoperator {what}{type(error).__name__}: {text}".rstrip(": ")
            return False
        self.error = None
        return True


class Fade:
    """The difference between two who command positions, fading from all of it to none."""

    def __init__(self, robot: Robot, guards: GuardConfig) -> None:
        spec = robot.action_spec
        low, high = np.array(spec.low, np.float64), np.array(spec.high, np.float64)
        self._range = np.where(np.isfinite(high - low), high - low, 1.0)
        self._position = np.array([kind == "position" for kind in robot.kinds])
        speed = np.array([guards.velocity.get(name, math.inf) for name in spec.names])
        speed = np.where(np.isfinite(speed), speed, self._range / guards.recovery_s)
        self._step = np.maximum(speed / spec.control_hz, 1e-9)
        self._begun = False
        self._switch = np.array([kind == "switch" for kind in robot.kinds])
        self._whole = self._ticks = 0
        self._all = np.zeros(spec.dim)
        self._gave, self._before = (np.full(spec.dim, math.nan) for _ in range(2))

    @property
    def lasts(self) -> bool:
        """True while a difference is left."""
        return self._begun or self._ticks > 0

    def begin(self) -> None:
        """Somebody else commands from the next command on."""
        self._begun = True

    def __call__(self, wanted: Sequence[float], last: Sequence[float]) -> tuple[float, ...]:
        """The command (A,) on the way from `last`, what was sent last, to what is `wanted`."""
        target, at = np.array(wanted, np.float64), np.array(last, np.float64)
        # One that stood still where it was sent was held by a guard: it goes on from there.
        apart = np.where(self._position, np.abs(self._gave - at), 0.0)
        held = self._position & (at == self._before) & (apart > self._step)
        self._before = at
        if self._begun or held.any():
            apart = np.where(self._position, at - target, 0.0)
            self._all = np.where(np.isfinite(apart), apart, 0.0)
            self._whole = self._ticks = math.ceil(float((np.abs(self._all) / self._step).max(initial=0.0)) - 1e-9)
            self._begun = False
        self._ticks = max(0, self._ticks - 1)
        self._gave = target + self._all * (self._ticks / self._whole) if self._whole else target
        return tuple(map(float, self._gave))

    def moved(self, hand: Sequence[float], resting: Sequence[float]) -> bool:
        """True if a hand's command is another than when it rested: elsewhere, or any displacement at all."""
        rest = np.where(self._position | self._switch, np.array(resting, np.float64), 0.0)
        apart: NDArray[np.float64] = np.abs(np.array(hand, np.float64) - rest)
        return bool((apart > _MOVES * self._range).any())
