"""What may reach the robot: every wanted action passes here, and every way it can be wrong has one defined reaction.

    guard                reaction
    action_limit         the component is clipped to its bounds
    velocity_limit       the component is slowed to its limit
    acceleration_limit   the component's change of speed is cut to its limit
    stale_observation    hold; slow stop when it lasts
    stale_action         hold; slow stop when it lasts
    dead_server          hold; slow stop when it lasts
    nonfinite_action     slow stop
    policy_error         slow stop
    workspace            slow stop
    estop                disconnect
    robot_lost           disconnect

Hold: positions stay where they were commanded, displacements are 0, switches keep their state. Slow stop: the speed
ramps to 0 over `stop_s`, then the run ends. Disconnect: nothing more is sent. `Governor` is a function of its inputs
and past inputs alone (no clock, no randomness), so a log of the inputs replays bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla.types import ActionSpec

Kind = Literal["position", "displacement", "switch"]
"""What an action component is: a target, a change per robot step, or an on/off command."""
Reaction = Literal["run", "hold", "slow stop", "stopped", "disconnect"]
GUARDS = (
    "action_limit", "velocity_limit", "acceleration_limit", "stale_observation", "stale_action", "dead_server",
    "nonfinite_action", "policy_error", "workspace", "estop", "robot_lost",
)  # fmt: skip
KINDS: tuple[Kind, ...] = ("position", "displacement", "switch")


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


@dataclass(frozen=True)
class Inputs:
    """What is known at one tick. All a decision depends on, beside earlier decisions."""

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


@dataclass(frozen=True)
class Decision:
    """What to do at one tick."""

    action: tuple[float, ...] | None
    """To send, float32 values; None: send nothing."""
    reaction: Reaction
    guards: tuple[str, ...]
    """Those that tripped."""


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
        """`rest`: the action that keeps the robot as it is now. ValueError for a limit on something unknown."""
        if len(kinds) != spec.dim or len(rest) != spec.dim or any(kind not in KINDS for kind in kinds):
            raise ValueError(f"kinds and rest need {spec.dim} entries ({', '.join(spec.names)}), kinds of {KINDS}")
        for what, names in (("velocity", config.velocity), ("acceleration", config.acceleration)):
            if unknown := set(names) - set(spec.names):
                raise ValueError(f"{what} limit on unknown component {sorted(unknown)[0]!r}; known: {spec.names}")
        if unknown := set(config.workspace) - set(proprio_names):
            raise ValueError(f"workspace limit on unknown state {sorted(unknown)[0]!r}; known: {proprio_names}")
        for name in ("max_observation_age_s", "max_action_age_s", "give_up_s", "stop_s"):
            if not getattr(config, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
        self.config, self.spec = config, spec
        self._dt = 1.0 / spec.control_hz
        self._low, self._high = np.array(spec.low), np.array(spec.high)
        self._position = np.array([kind == "position" for kind in kinds])
        self._moving = np.array([kind != "switch" for kind in kinds])
        self._speed = np.array([config.velocity.get(n, math.inf) for n in spec.names]) * self._dt
        self._change = np.array([config.acceleration.get(n, math.inf) for n in spec.names]) * self._dt**2
        self._workspace = [(proprio_names.index(n), *bounds) for n, bounds in config.workspace.items()]
        self._last = np.array(rest, dtype=np.float64)
        self._step = np.where(self._moving & ~self._position, self._last, 0.0)  # how far the last tick moved
        self._held_since: float | None = None
        self._ramp: list[NDArray[np.float64]] | None = None  # what is left of a slow stop

    def decide(self, inputs: Inputs) -> Decision:
        """What to send now."""
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
            return self._limited(np.array(inputs.wanted, dtype=np.float64))
        if self._held_since is None:
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
        for index, low, high in self._workspace:
            if not low <= inputs.proprio[index] <= high:  # NaN is outside, too
                return "workspace"
        return None

    def _must_hold(self, inputs: Inputs) -> str | None:
        if not inputs.observation_age_s <= self.config.max_observation_age_s:
            return "stale_observation"
        if inputs.wanted is None:
            return "dead_server" if inputs.server_failed else "stale_action"
        if not inputs.action_age_s <= self.config.max_action_age_s:
            return "stale_action"
        return None

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
        moved = np.where(self._position, np.clip(self._last + step, self._low, self._high), step)
        action = np.where(self._moving, moved, self._last if switches is None else switches).astype(np.float32)
        self._step = np.where(self._position, action - self._last, np.where(self._moving, action, 0.0))
        self._last = action.astype(np.float64)
        return Decision(tuple(action.tolist()), reaction, guards)
