"""Configuration and report of a control run, and the checks of both that need no robot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from policies.control.guards import GuardConfig
from policies.control.robots import Robot
from policies.serving.wire import one_line
from vla.core.types import ActionChunk, ActionSpec, Observation

_FAILING = {
    "robot_error", "policy_error", "dead_server", "nonfinite_action", "teleop_error", "stale_observation",
    "not_following",
}  # fmt: skip
_RESTS = 0.1
"""Fraction of a position's range by which what it is measured at may differ from what leaves it there."""
JOINS = ("switch", "blend", "ensemble", "rtc")
"""Values of `ControlConfig.join`."""


@dataclass(frozen=True)
class ControlConfig:
    """Configuration of the control loop."""

    duration_s: float = 30.0
    policy_hz: float | None = None
    """Rate in Hz for which the policy's actions are meant, at most the robot's. None: the robot's."""
    n_action_steps: int | None = None
    """Request a new chunk after this many actions; None: the n_action_steps of the policy's spec, else half a chunk."""
    join: Literal["switch", "blend", "ensemble", "rtc"] = "blend"
    """How a new chunk takes over: at once, gradually, as a mean of all overlapping chunks, or by real-time chunking
    (the request carries the actions still to be executed: `vla.model.policy`)."""
    blend_steps: int = 2
    """Actions over which "blend" takes over."""
    catch_up_steps: int = 4
    """Number of actions over which displacements lost to latency are compensated; 0: never."""
    ensemble_decay: float = 0.01
    """Weight decay of the join "ensemble": 0 is the plain mean, larger values favour older chunks."""
    asynchronous: bool = True
    """Compute the next chunk while the current one is executed."""
    in_flight: int = 1
    """Requests in flight at the same time. Over a slow link more of them give more frequent answers, and fewer actions
    executed without a new observation."""
    dry_run: bool = False
    """Run the whole loop without sending actions to the robot."""
    estop_file: Path | None = None
    """The robot is stopped and disconnected as soon as this file exists."""
    server_timeout_s: float = 1.0
    """Seconds after which an unanswered request counts as a dead server."""
    hold_below: float | None = None
    """Hold (guard not_grounded) while the policy's confidence that it sees what the instruction names is below this,
    until it was reached once for the instruction. None: never. A policy's own threshold is
    `vla.core.grounding.threshold_of`."""
    guards: GuardConfig = field(default_factory=GuardConfig)


@dataclass(frozen=True)
class ControlReport:
    """The statistics of one control run."""

    ticks: int
    overruns: int
    """Ticks whose work ended after the next one's deadline: deadlines missed."""
    seconds: float
    ended: str
    """done (the task), time, stopped (a guard's slow stop) or disconnect."""
    guards: dict[str, int]
    """Guard -> ticks in which it tripped."""
    answers: int
    latency_ms: dict[str, float]
    """Latency of the policy's answers in ms: p50, p99. The warm-up is not included."""
    late_ms: dict[str, float]
    """Delay of the start of a tick in ms: p50, p99, max."""
    work_ms: dict[str, float]
    """Computation time of a tick in ms: p50, p99, max."""
    delays: dict[int, int]
    """Number of actions of a chunk that arrived too late to be executed -> how often."""
    error: str | None = None
    """The last error of the policy, its server or the robot that tripped a guard."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Guard -> the message when it tripped last, for guards that give a reason; "disconnect" ->
    why the robot could not be disconnected cleanly; "controller" -> an error of the loop itself; "camera" -> the
    cameras that showed one picture while the robot moved; "suspended" -> when nothing ran; "stuck" -> the call of the
    robot that took the longest."""
    drivers: dict[str, int] = field(default_factory=dict)
    """Driver (policy, human, hand_over) -> ticks, of a run in which a person may take over."""
    takeovers: int = 0
    """How often a person took over."""
    held_by: tuple[str, ...] = ()
    """Guards that held the robot at the last tick: with "time", the run ended before they stopped it."""

    @property
    def good(self) -> bool:
        """True if the run came to its end and neither the robot nor the policy was failing then."""
        failing = _FAILING & set(self.held_by)
        return self.ended in ("done", "time") and not failing and "disconnect" not in self.reasons

    def summary(self, scenes: Mapping[str, int]) -> str:
        """The report in lines of text. `scenes`: those that a simulated robot played, and its successes; may be
        empty."""
        done = f", {scenes['successes']} of {scenes['scenes']} scenes succeeded" if scenes else ""
        first = (
            f"{self.ended} after {self.ticks} ticks ({self.seconds:.1f} s), {self.overruns} deadlines missed"
            f" ({100 * self.overruns / max(self.ticks, 1):.3f}%){done}"
        )
        tripped = ", ".join(f"{name} {count}" for name, count in self.guards.items()) or "none"
        last = (
            f"ticks late p99 {self.late_ms['p99']:.2f} ms, max {self.late_ms['max']:.2f}; work p99 "
            f"{self.work_ms['p99']:.2f} ms; guards: {tripped}; {self.answers} answers, p50 "
            f"{self.latency_ms['p50']:.1f} ms, p99 {self.latency_ms['p99']:.1f} ms"
        )
        reasons = [f"{guard}: {one_line(reason)}" for guard, reason in self.reasons.items()]
        by_hand = self.drivers.get("human", 0)
        hands = [f"a person took over {self.takeovers} times and drove in {by_hand} ticks"] if self.drivers else []
        return "\n".join([first, *reasons, *hands, last])


def ticks_per_step(robot_hz: float, policy_hz: float | None) -> Fraction:
    """Robot ticks to one action of the policy. ValueError for rates that make no sense."""
    if not robot_hz > 0:
        raise ValueError("the robot's action_spec must say its rate (control_hz)")
    ratio = Fraction(robot_hz).limit_denominator(10_000) / Fraction(policy_hz or robot_hz).limit_denominator(10_000)
    if ratio < 1:
        raise ValueError(f"policy_hz must be at most the robot's {robot_hz:g} Hz, got {policy_hz:g}")
    return ratio


def limits_by_name(limits: Iterable[str], flag: str) -> dict[str, tuple[float, float]]:
    """["x:0:1"] -> {"x": (0.0, 1.0)}. ValueError for another form, or a name that `flag` gives twice."""
    found: dict[str, tuple[float, float]] = {}
    for text in limits:
        try:
            name, low, high = text.split(":")
            bounds = float(low), float(high)
        except ValueError:
            raise ValueError(f"a limit is NAME:LOW:HIGH, got {text!r}") from None
        if name in found:
            raise ValueError(f"{flag} gives '{name}' twice: give one of them")
        found[name] = bounds
    return found


def check_limits(guards: GuardConfig, spec: ActionSpec, kinds: Sequence[str]) -> None:
    """ValueError for a limit of speed that changes nothing, because its component is a switch."""
    for what, limits in (("velocity", guards.velocity), ("acceleration", guards.acceleration)):
        for name in [name for name in limits if kinds[spec.names.index(name)] == "switch"]:
            raise ValueError(
                f"--{what} {name}: it is a switch, which is sent as the policy gives it and not limited in speed: "
                "leave it out"
            )


def is_pressed(pressed: Callable[[], bool], file: Path | None) -> bool:
    """True when a key was pressed, the e-stop file exists, or its absence cannot be verified (OSError)."""
    try:
        return pressed() or (file is not None and file.exists())
    except OSError:
        return True


def check_estop_file(file: Path | None) -> None:
    """ValueError for a file that nobody can make, because there is no such folder: a stop that never comes."""
    try:
        missing = file is not None and not file.absolute().parent.is_dir()
    except OSError:  # not to be looked for, which is a stop of its own
        return
    if missing:
        raise ValueError(f"--estop-file {file}: there is no folder {file.parent}, so nobody could stop the robot by it")


def check_chunk(chunk: ActionChunk | None, spec: ActionSpec) -> None:
    """Raise ValueError for an answer that is no action chunk (C, A) for a robot with these components."""
    shape, dtype = np.shape(chunk), np.asarray(chunk).dtype
    if dtype.kind not in "iuf":
        raise ValueError(f"the policy must answer numbers, it answers {dtype if shape else type(chunk).__name__}")
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"the policy must answer a chunk of actions (C, {spec.dim}), it answers {shape}")
    if shape[1] != spec.dim:
        raise ValueError(
            f"the policy's actions have {shape[1]} components, this robot takes {spec.dim} ({', '.join(spec.names)}): "
            "serve a policy for this robot, or cut its actions to these components there (openpi: its output transform)"
        )


def check_rest(rest: Sequence[float], obs: Observation, robot: Robot) -> None:
    """Raise ValueError for a position that is to rest elsewhere than it was measured a moment ago: the robot would be
    sent there at once."""
    state = dict(zip(robot.proprio_names, obs.proprio[0].tolist(), strict=False))
    spec = robot.action_spec
    for name, kind, value, low, high in zip(spec.names, robot.kinds, rest, spec.low, spec.high, strict=True):
        at, size = state.get(name, value), high - low
        if kind == "position" and math.isfinite(size) and abs(value - at) > max(_RESTS * size, 1e-6 * abs(at)) > 0:
            raise ValueError(
                f"the robot's rest() says that '{name}' stays at {value:g}, where it is measured at {at:g}: rest() "
                "must give the position that it has"
            )


def believed(
    sent: Sequence[float], action: Sequence[float], before: Sequence[float], obs: Observation | None, robot: Robot
) -> tuple[tuple[float, ...], str]:
    """The action that a robot says it took, as far as that can be: a position lies near the way from where the robot
    was sent `before`, or is measured, to where it is sent now. And a line about the first one that does not, whose
    command stands: to go on from there would be a jump. ValueError for a number that is none."""
    state = {} if obs is None else dict(zip(robot.proprio_names, obs.proprio[0].tolist(), strict=False))
    spec, taken, told = robot.action_spec, [], ""
    for i, (name, kind) in enumerate(zip(spec.names, robot.kinds, strict=True)):
        if not math.isfinite(sent[i]):
            raise ValueError(f"the robot's send() says that it took {sent[i]} for '{name}'")
        way, room = (before[i], action[i], state.get(name, action[i])), _RESTS * (spec.high[i] - spec.low[i])
        near = kind != "position" or not math.isfinite(room) or min(way) - room <= sent[i] <= max(way) + room
        taken.append(sent[i] if near else action[i])
        if not near:
            told = told or (
                f"the robot's send() says that it took {sent[i]:g} for '{name}', where {action[i]:g} was sent: is that "
                "in another unit? The log and the guards go by what was sent"
            )
    return tuple(taken), told
