"""Guards: every wanted action passes here, and every way it can be wrong has one defined reaction.

    guard                reaction
    action_limit         the component is clipped to its bounds
    velocity_limit       the component is slowed to its limit
    acceleration_limit   the component's change of speed is cut to its limit
    stale_observation    hold; slow stop when it lasts
    stale_action         hold; slow stop when it lasts
    dead_server          hold; slow stop when it lasts
    nonfinite_action     slow stop
    policy_error         slow stop
    robot_error          hold; slow stop when it lasts
    teleop_error         hold; slow stop when it lasts
    not_following        hold; slow stop when it lasts
    not_grounded         hold
    outside_limits       recover; hold and slow stop where no speed for that is known
    workspace            slow stop
    estop                disconnect
    robot_lost           disconnect

Hold: positions stay where they were last sent (before that: where they were measured), displacements and velocities are
0, switches keep their state; while a component's state is not known, nothing is sent at all. Recover: positions outside
their limits, as a robot's may be when a run begins, go back to the nearest one, everything else holds, and the plan
waits; their speed is at most their velocity limit, or a whole range in `recovery_s` where none was given. Slow stop:
the speed ramps to 0 over `stop_s`, then the run ends. Disconnect: nothing more is sent.

A position does not follow when its commands have gone away from where it stands, by more than a fraction of its range,
for `follow_s` in which it did not move towards them at all: a robot without torque accepts every command. A robot that
lags or cuts commands short moves, and one that was stopped by something is not sent further. Grippers are left out:
they stand against what they hold.

`not_grounded` trips only where a run asked for it (`ControlConfig.hold_below`): the policy does not see what its
instruction names. Nothing is broken then, so that this hold lasts until the policy does see it, or the run's time is
over.

A position limit never makes a robot move: no reaction sends a position further from the last one than the velocity
limit allows. `Governor` is a function of its inputs and past inputs alone (no clock, no randomness), so a log of the
inputs replays bit for bit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla.core.types import ActionSpec

Kind = Literal["position", "displacement", "switch", "velocity"]
"""The kind of an action component: a target, a change per robot step, an on/off command, or a speed that lasts until
the next command."""
Reaction = Literal["run", "hold", "slow stop", "stopped", "disconnect", "recover"]
GUARDS = (
    "action_limit", "velocity_limit", "acceleration_limit", "stale_observation", "stale_action", "dead_server",
    "nonfinite_action", "policy_error", "workspace", "estop", "robot_lost", "robot_error", "outside_limits",
    "not_following", "not_grounded", "teleop_error",
)  # fmt: skip
KINDS: tuple[Kind, ...] = ("position", "displacement", "switch", "velocity")
_HOLDS_THINGS = re.compile("gripper|finger|hand|jaw|claw", re.IGNORECASE)
_STILL = 0.003
"""Fraction of a position's range within which it stands still: more than the noise of an encoder."""


@dataclass(frozen=True)
class GuardConfig:
    """Limits. There is no way to switch a guard off, only to widen its limit."""

    max_observation_age_s: float = 0.5
    max_action_age_s: float = 2.0
    """Between the observation that an action answers and the moment it would be played."""
    give_up_s: float = 3.0
    """A hold that lasts longer becomes a slow stop."""
    stop_s: float = 0.5
    """Length of a slow stop."""
    velocity: dict[str, float] = field(default_factory=dict)
    """Component name -> largest speed, action units per second."""
    acceleration: dict[str, float] = field(default_factory=dict)
    """Component name -> largest change of speed, action units per second squared."""
    workspace: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Proprio name -> the range in which it must be measured."""
    recovery_s: float = 5.0
    """A position without a velocity limit takes this long for its whole range on the way back into its limits."""
    follow_fraction: float = 0.1
    """Fraction of a position's range: commands this far from where it stands must move it."""
    follow_s: float = 1.0
    """Time of such commands without any movement, after which it does not follow."""


@dataclass(frozen=True)
class Inputs:
    """Everything known at one tick: a decision depends on it and on earlier decisions only."""

    now_s: float
    wanted: tuple[float, ...] | None
    """The plan's action; None when the plan has none."""
    proprio: tuple[float, ...]
    observation_age_s: float
    action_age_s: float = 0.0
    server_failed: bool = False
    """The last request failed, or has been waiting for too long."""
    fault: str | None = None
    """A guard that tripped outside: nonfinite_action, policy_error, estop, robot_lost."""
    robot_error: bool = False
    """The robot or one of its cameras raised an error, or gave what cannot be used, in this tick or sending the last
    one's action."""
    sent: tuple[float, ...] | None = None
    """The action that really went to the robot at the last tick, where it differs from the decided one."""
    ungrounded: bool = False
    """The policy does not see what its instruction names, and is to be held for it."""
    teleop_error: bool = False
    """The teleoperator of somebody who may take over cannot be read."""
    lapse_s: float = 0.0
    """Seconds before this tick in which nothing ran, as of a suspended process. No hold counts them."""


@dataclass(frozen=True)
class Decision:
    """The action to send at one tick, and why."""

    action: tuple[float, ...] | None
    """To send, float32 values; None: send nothing."""
    reaction: Reaction
    guards: tuple[str, ...]
    """Those that tripped."""


class Follower:
    """Watches one position: does it move at all where it is sent?"""

    def __init__(self, name: str, index: int, measured: int, size: float, config: GuardConfig, dt: float) -> None:
        """`index` of the action, `measured` of the proprio; `size` of its range."""
        self.name, self._index, self._measured, self._dt = name, index, measured, dt
        self._far, self._still, self._follow_s = config.follow_fraction * size, _STILL * size, config.follow_s
        self._anchor: tuple[float, float] | None = None  # (command, measured) when it was last seen to follow
        self._towards, self._apart_s, self._now = 0.0, 0.0, (math.nan, math.nan)

    @property
    def lost(self) -> bool:
        return self._apart_s >= self._follow_s - self._dt / 2

    def look(self, last: NDArray[np.float64], inputs: Inputs, *, commanded: bool) -> None:
        """`last`: what was sent last. Time counts only while the plan is played (`commanded`)."""
        if len(inputs.proprio) <= self._measured or not math.isfinite(last[self._index]):
            return
        command, at = self._now = float(last[self._index]), inputs.proprio[self._measured]
        if self._anchor is None:
            self._anchor = self._now
        asked, stood = self._anchor
        towards = math.copysign(1.0, command - at)
        if (at - stood) * (self._towards if self.lost else towards) > self._still:
            self._anchor, self._apart_s = self._now, 0.0
            return
        if (at - stood) * towards < 0:  # it sinks, or still comes to rest
            self._anchor = asked, at
        # How far commands went since it was last seen to follow: a lasting error, as under a load, is none.
        if commanded and min((command - asked) * towards, abs(command - at)) > self._far:
            self._apart_s = self._dt + (self._apart_s if towards == self._towards else 0.0)
            self._towards = towards

    def words(self) -> str:
        command, at = self._now
        return f"{self.name} is commanded to {command:g} and stays at {at:g}"


def check_bounds(spec: ActionSpec) -> None:
    """ValueError for a component that is named twice, or whose lowest value is not below its highest. A position that
    cannot move has equal ones."""
    if len(set(spec.names)) < spec.dim:
        raise ValueError(
            f"the robot's action_spec names '{next(n for n in spec.names if spec.names.count(n) > 1)}' twice"
        )
    for what, bounds in (("low", spec.low), ("high", spec.high)):
        if len(bounds) != spec.dim:
            raise ValueError(
                f"the robot's action_spec.{what} needs {spec.dim} entries ({', '.join(spec.names)}), got {len(bounds)}"
            )
    for name, low, high in zip(spec.names, spec.low, spec.high, strict=True):
        if not low <= high:  # NaN is neither
            raise ValueError(
                f"the robot's action_spec must give the lowest and the highest value of '{name}', got low {low:g} and "
                f"high {high:g}"
            )


class Governor:
    """Turns wanted actions into safe ones, tick by tick."""

    def __init__(
        self,
        config: GuardConfig,
        spec: ActionSpec,
        kinds: tuple[Kind, ...],
        *,
        rest: tuple[float, ...],
        proprio_names: tuple[str, ...] = (),
    ) -> None:
        """`rest`: the action that keeps the robot as it is now, NaN where that is not known. ValueError for a limit on
        something unknown, or a limit that is none."""
        if len(kinds) != spec.dim or len(rest) != spec.dim or any(kind not in KINDS for kind in kinds):
            odd = [repr(kind) for kind in kinds if kind not in KINDS] or [f"{len(kinds)} and {len(rest)}"]
            raise ValueError(
                f"the robot's kinds and rest need {spec.dim} entries ({', '.join(spec.names)}), each kind one of "
                f"{', '.join(KINDS)}; got {', '.join(odd)}"
            )
        check_bounds(spec)
        for what, names in (("velocity", config.velocity), ("acceleration", config.acceleration)):
            if unknown := set(names) - set(spec.names):
                raise ValueError(
                    f"{what} limit on unknown component {sorted(unknown)[0]!r}; known: {', '.join(spec.names)}"
                )
            if bad := [name for name, limit in names.items() if not limit > 0]:
                raise ValueError(f"the {what} limit of {bad[0]} must be positive, got {names[bad[0]]}")
        if unknown := set(config.workspace) - set(proprio_names):
            raise ValueError(
                f"workspace limit on unknown state {sorted(unknown)[0]!r}; known: {', '.join(proprio_names)}"
            )
        for name, (low, high) in config.workspace.items():
            if not low < high:
                raise ValueError(f"the workspace limit of {name} must be lowest and highest, got {low:g} and {high:g}")
        for name in (one.name for one in fields(config) if one.type == "float"):
            if not getattr(config, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
        self.config, self.spec, self._proprio_names = config, spec, proprio_names
        self._dt = 1.0 / spec.control_hz
        self._low, self._high = np.array(spec.low, np.float64), np.array(spec.high, np.float64)
        self._position = np.array([kind == "position" for kind in kinds])
        self._moving = np.array([kind != "switch" for kind in kinds])
        per_second = np.array([kind == "velocity" for kind in kinds])  # others are per tick
        speed = np.array([config.velocity.get(n, math.inf) for n in spec.names])
        change = np.array([config.acceleration.get(n, math.inf) for n in spec.names])
        self._speed = np.where(per_second, speed, speed * self._dt)
        self._change = np.where(per_second, change * self._dt, change * self._dt**2)
        self._workspace = [(proprio_names.index(n), *bounds) for n, bounds in config.workspace.items()]
        self._recovery = np.where(np.isfinite(self._speed), self._speed, self._range() / config.recovery_s * self._dt)
        measured = {name: index for index, name in enumerate(proprio_names)}
        self._followers = [
            Follower(name, i, measured[name], self._range()[i], config, self._dt)
            for i, name in enumerate(spec.names)
            if self._position[i] and name in measured and self._range()[i] > 0 and not _HOLDS_THINGS.search(name)
        ]
        self._last = np.array(rest, dtype=np.float64)
        self._before = self._last  # the action before that one
        self._step = np.where(self._moving & ~self._position, self._last, 0.0)  # how far the last tick moved
        self._inside, self._nowhere = False, np.zeros(spec.dim, np.bool_)
        self._held_since: float | None = None
        self._ramp: list[NDArray[np.float64]] | None = None  # what is left of a slow stop

    def decide(self, inputs: Inputs) -> Decision:
        """The action to send now."""
        if inputs.sent is not None:
            self._correct(np.array(inputs.sent, dtype=np.float64))
        for follower in self._followers:
            follower.look(self._last, inputs, commanded=self._held_since is None and self._ramp is None)
        if inputs.fault in ("estop", "robot_lost"):
            return Decision(None, "disconnect", (inputs.fault,))
        if self._ramp is None and (cause := self._must_stop(inputs)):
            self._begin_stop()
            return self._stopping((cause,))
        if self._ramp is not None:
            return self._stopping(())
        cause = self._must_hold(inputs)
        if cause is None:
            self._held_since = None
            if self._outside().any():
                return self._recover()
            return self._limited(np.array(inputs.wanted, dtype=np.float64))
        if self._held_since is not None:
            self._held_since += inputs.lapse_s
        if self._held_since is None or cause == "not_grounded":  # nothing is failing: no time to give up counts
            self._held_since = inputs.now_s
        if inputs.now_s - self._held_since > self.config.give_up_s:
            self._begin_stop()
            return self._stopping((cause,))
        return self._send(np.zeros_like(self._step), "hold", (cause,))

    def _must_stop(self, inputs: Inputs) -> str | None:
        if inputs.fault is not None:
            return inputs.fault
        if inputs.wanted is not None and not np.isfinite(inputs.wanted).all():
            return "nonfinite_action"
        return "workspace" if self.beyond(inputs.proprio) else None

    def beyond(self, proprio: tuple[float, ...]) -> str:
        """The measured state that is outside the workspace, in words; "" where all is within."""
        for index, low, high in self._workspace:
            if not low <= proprio[index] <= high:  # NaN is outside, too
                return f"{self._proprio_names[index]} is at {proprio[index]:g}, its workspace is {low:g} to {high:g}"
        return ""

    def not_following(self) -> str:
        """The positions that do not follow their commands, in words; "" for none."""
        told = [follower.words() for follower in self._followers if follower.lost]
        return f"{'; '.join(told)}: is torque on, and is the way free?" if told else ""

    def _must_hold(self, inputs: Inputs) -> str | None:
        if inputs.robot_error or inputs.teleop_error:
            return "robot_error" if inputs.robot_error else "teleop_error"
        if not inputs.observation_age_s <= self.config.max_observation_age_s:
            return "stale_observation"
        if any(follower.lost for follower in self._followers):
            return "not_following"
        if inputs.ungrounded and not inputs.server_failed:
            return "not_grounded"
        if inputs.wanted is None:
            return "dead_server" if inputs.server_failed else "stale_action"
        if not inputs.action_age_s <= self.config.max_action_age_s:
            return "stale_action"
        if (self._outside() & ~(self._recovery > 0)).any():
            return "outside_limits"
        return None

    @property
    def before(self) -> tuple[float, ...]:
        """The action before the last one, or rest before the first: in effect still, if the last did not arrive."""
        return tuple(self._before.tolist())

    def outside(self) -> str:
        """The positions that are outside their limits, in words; "" for none."""
        told = []
        for i in np.flatnonzero(self._outside()):
            text = f"{self.spec.names[i]} is at {self._last[i]:g}, its limits are {self._low[i]:g} to {self._high[i]:g}"
            if not self._recovery[i] > 0:
                text += f", and nothing says how fast it may go back: give --velocity {self.spec.names[i]} SPEED"
            told.append(text)
        return "; ".join(told)

    def _outside(self) -> NDArray[np.bool_]:
        if self._inside:  # once inside, no decision leads out again
            return self._nowhere
        slack = 1e-6 * np.maximum(1.0, np.abs(self._last))  # an action is a float32, limits are not
        outside = self._position & ((self._last < self._low - slack) | (self._last > self._high + slack))
        self._inside = bool(np.isfinite(self._last[self._position]).all() and not outside.any())
        return outside

    def _range(self) -> NDArray[np.float64]:
        """Highest minus lowest of each position; that of the narrowest other one for those that have none, as a joint
        that stood still in all demonstrations. 0: no position has any."""
        size = np.where(self._position & np.isfinite(self._high - self._low), self._high - self._low, 0.0)
        return np.where(size > 0, size, np.min(size[size > 0], initial=np.inf) if (size > 0).any() else 0.0)

    def _correct(self, sent: NDArray[np.float64]) -> None:
        """Go on from what was really sent, not from what was decided."""
        known = np.isfinite(sent) & (self._position | ~self._moving)
        self._last, self._inside = np.where(known, sent, self._last), False
        self._step = np.where(known & self._position, self._last - self._before, self._step)

    def _recover(self) -> Decision:
        """One tick nearer to the limits, and no further than to them."""
        step = np.clip(np.clip(self._last, self._low, self._high) - self._last, -self._recovery, self._recovery)
        step = np.clip(step, self._step - self._change, self._step + self._change)
        return self._send(np.where(self._outside(), step, 0.0), "recover", ("outside_limits",))

    def _limited(self, wanted: NDArray[np.float64]) -> Decision:
        guards = []
        inside = np.clip(wanted, self._low, self._high)
        if (inside != wanted).any():
            guards.append("action_limit")
        step = np.where(self._position, inside - self._last, inside)
        smooth = np.clip(step, self._step - self._change, self._step + self._change)
        if (smooth != step)[self._moving].any():
            guards.append("acceleration_limit")
        # Last, because it is the limit that must hold whatever the others did.
        slow = np.clip(smooth, -self._speed, self._speed)
        if (slow != smooth)[self._moving].any():
            guards.append("velocity_limit")
        return self._send(np.where(self._moving, slow, 0.0), "run", tuple(guards), switches=inside)

    def _begin_stop(self) -> None:
        ticks = max(1, math.ceil(self.config.stop_s / self._dt))
        self._ramp = [self._step * (1 - (k + 1) / ticks) for k in range(ticks)]

    def _stopping(self, guards: tuple[str, ...]) -> Decision:
        assert self._ramp is not None
        step = self._ramp.pop(0) if self._ramp else np.zeros_like(self._step)
        return self._send(step, "slow stop" if self._ramp else "stopped", guards)

    def _send(
        self,
        step: NDArray[np.float64],
        reaction: Reaction,
        guards: tuple[str, ...],
        switches: NDArray[np.float64] | None = None,
    ) -> Decision:
        step = np.where(self._moving, np.clip(step, -self._speed, self._speed), step)
        # A limit holds a position back and never pulls it: one that is outside may go no further and is not brought in.
        inside = np.clip(self._last + step, np.minimum(self._low, self._last), np.maximum(self._high, self._last))
        moved = np.where(self._position, inside, step)
        action = np.where(self._moving, moved, self._last if switches is None else switches).astype(np.float32)
        if not np.isfinite(action).all():  # the state of a component is not known yet: silence is the only hold
            return Decision(None, reaction, guards)
        self._before = self._last
        self._step = np.where(self._position, action - self._last, np.where(self._moving, action, 0.0))
        self._last = action.astype(np.float64)
        return Decision(tuple(action.tolist()), reaction, guards)
