"""A policy at the controls of a robot: a fixed-rate loop with guards on every action and a black box of every tick.

Deadlines are on the monotonic clock. A tick that overruns is counted, and the next one comes a whole period after it:
missed ticks are never made up in a burst.
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from policies.blackbox import BlackBox
from policies.guards import Decision, Governor, GuardConfig, Inputs
from policies.joining import Blend, DelayEstimate, Ensemble, Join
from policies.plan import Answer, Asking, Inference, Plan
from policies.robots import Robot
from vla.types import Observation, Policy


@dataclass(frozen=True)
class ControlConfig:
    """How a policy drives a robot."""

    duration_s: float = 30.0
    policy_hz: float | None = None
    """Rate at which the policy's actions were meant, at most the robot's. None: the robot's."""
    n_action_steps: int | None = None
    """Ask again after this many actions of a chunk; None: after half of it."""
    join: Literal["switch", "blend", "ensemble", "rtc"] = "blend"
    """How a new chunk takes over: at once, gradually, as a mean of all that overlap, or by itself (the policy is told
    what is still to be played: `policies.rtc`)."""
    blend_steps: int = 2
    """Actions over which "blend" takes over."""
    catch_up_steps: int = 4
    """Actions over which displacements that came too late are made up for; 0: never."""
    ensemble_decay: float = 0.01
    """Of "ensemble": 0 is the plain mean, more favours older chunks."""
    asynchronous: bool = True
    """Compute the next chunk while the current one is played."""
    in_flight: int = 1
    """Questions on their way at the same time. Behind a slow link more of them make for more answers, and for fewer
    actions between them that nobody has looked at."""
    dry_run: bool = False
    """Do everything but send."""
    estop_file: Path | None = None
    """The robot is let go as soon as this file exists."""
    server_timeout_s: float = 1.0
    """An answer that takes longer counts as a dead server."""
    guards: GuardConfig = field(default_factory=GuardConfig)


@dataclass(frozen=True)
class ControlReport:
    """What happened."""

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
    """Of the policy's answers: p50, p99. The warm-up is not among them."""
    late_ms: dict[str, float]
    """How long after its time a tick began: p50, p99, max."""
    work_ms: dict[str, float]
    """How long its work took: p50, p99, max."""
    delays: dict[int, int]
    """Actions of a chunk that came too late because the robot had played those steps -> how often."""
    error: str | None = None
    """What the policy, its server or the robot said, where that is why a guard tripped; the last one."""


def control(
    robot: Robot,
    policy: Policy,
    config: ControlConfig,
    *others: Policy,
    log: BlackBox | None = None,
    pressed: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ControlReport:
    """Connect, drive, and disconnect whatever happens. `pressed` says whether an e-stop key was. `others`: further
    connections to the policy, in_flight - 1 of them.

    ValueError for a configuration that does not fit the robot or the policy.
    """
    ticks_per_step(robot.action_spec.control_hz, config.policy_hz)
    if config.join == "rtc" and not hasattr(policy, "act_after"):
        raise ValueError("rtc needs a flow head that can be told what is still to be played: choose the join blend")
    if config.in_flight != 1 + len(others) or (others and (config.join == "rtc" or not config.asynchronous)):
        raise ValueError(
            "in_flight counts the connections to one policy: give as many, only asynchronous, and not with join rtc, "
            "which must know the answer before it asks again"
        )
    try:
        robot.connect()
        inference = Inference(policy, *others, asynchronous=config.asynchronous, clock=clock)
        try:
            loop = ControlLoop(robot, inference, config, log=log, pressed=pressed, clock=clock)
            loop.warm_up(policy)
            return _run(loop, sleep)
        finally:
            inference.close()
    finally:
        robot.disconnect()


def _run(loop: ControlLoop, sleep: Callable[[float], None]) -> ControlReport:
    """Tick at the robot's rate. The garbage collector waits: a pause of its kind is a missed deadline."""
    clock, dt = loop.clock, loop.dt
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = loop.start()
        while not loop.ended and deadline - loop.started < loop.config.duration_s - dt / 2:
            loop.tick(deadline)
            deadline += dt
            left = deadline - clock()
            if left < 0 and not loop.ended:
                loop.overruns += 1
                deadline, left = clock() + dt, dt
            if not loop.ended:
                sleep(left)
    finally:
        if collecting:
            gc.enable()
    return loop.report()


class ControlLoop:
    """One robot's loop, a tick at a time. Whoever calls `tick` keeps the time."""

    def __init__(
        self,
        robot: Robot,
        inference: Asking,
        config: ControlConfig,
        *,
        log: BlackBox | None = None,
        pressed: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`robot` is connected."""
        self.robot, self.inference, self.config, self.log = robot, inference, config, log
        self.pressed, self.clock, self.dt = pressed, clock, 1.0 / robot.action_spec.control_hz
        rest, names = tuple(robot.rest()), robot.proprio_names
        self.governor = Governor(config.guards, robot.action_spec, robot.kinds, rest=rest, proprio_names=names)
        self._ticks_per_step = ticks_per_step(robot.action_spec.control_hz, config.policy_hz)
        self._asked_at_ticks: deque[int] = deque()  # questions that are out, oldest first
        self._last_asked_at_tick = 0
        self.plan = Plan(
            robot.kinds,
            ticks_per_step=self._ticks_per_step,
            rest=rest,
            join=_join(config),
            catch_up_steps=config.catch_up_steps,
            bounds=(robot.action_spec.low, robot.action_spec.high),
        )
        self.delay = DelayEstimate()
        self.chunk_size = 0
        self.started = 0.0
        self.ticks = self.overruns = 0
        self.ended: str | None = None
        self._fault: str | None = None
        self._error: str | None = None
        self._server_failed = False
        self._latest: tuple[Observation, float] | None = None
        self._latencies: list[float] = []
        self._delays: Counter[int] = Counter()
        self._guards: Counter[str] = Counter()
        self._late_s: list[float] = []
        self._work_s: list[float] = []
        if log is not None:
            log.start(
                config.guards, robot.action_spec, robot.kinds, rest, names,
                control={name: value for name, value in asdict(config).items() if name != "guards"} | {
                    "estop_file": None if config.estop_file is None else str(config.estop_file)
                },
            )  # fmt: skip

    def warm_up(self, policy: Policy) -> None:
        """One answer before the clock starts: the first is always the slowest. An error is met again, in the loop."""
        obs, seen_s = self.robot.observe()
        policy.reset()
        first = Inference(policy, asynchronous=False, clock=self.clock)
        first.ask(obs, step=0, seen_s=seen_s)
        answer = first.fetch()
        if answer is not None and answer.chunk is not None:
            self.chunk_size = len(answer.chunk)
            if self.config.join == "rtc":  # the guided way is another, and as slow the first time
                self.plan.install(answer.chunk, asked_at_step=0, seen_s=seen_s)
                first.ask(obs, step=0, seen_s=seen_s, prefix=self.plan.left(1))
                first.fetch()
                self.plan.clear()

    def start(self) -> float:
        """The clock starts."""
        self.started = self.clock()
        return self.started

    def tick(self, deadline: float) -> Decision:
        """Look, ask, decide, send. `deadline`: when it was to begin."""
        self._late_s.append(self.clock() - deadline)
        decision, inputs = self._tick()
        self.ticks += 1
        self._work_s.append(self.clock() - deadline - self._late_s[-1])
        if self.log is not None:
            plan = {"step": self.plan.step, "remaining": self.plan.remaining}
            self.log.tick(
                inputs,
                decision,
                obs=None if self._latest is None else self._latest[0],
                tick=self.ticks,
                late_s=self._late_s[-1],
                work_s=self._work_s[-1],
                plan=plan,
            )
        if decision.reaction in ("stopped", "disconnect"):
            self.ended = decision.reaction
        elif self.robot.done:
            self.ended = "done"
        return decision

    def report(self) -> ControlReport:
        p50, p99 = _quantiles_ms(self._latencies)[:2]
        report = ControlReport(
            ticks=self.ticks,
            overruns=self.overruns,
            seconds=self.clock() - self.started,
            ended=self.ended or "time",
            guards=dict(self._guards),
            answers=len(self._latencies),
            latency_ms={"p50": p50, "p99": p99},
            late_ms=dict(zip(("p50", "p99", "max"), _quantiles_ms(self._late_s), strict=True)),
            work_ms=dict(zip(("p50", "p99", "max"), _quantiles_ms(self._work_s), strict=True)),
            delays=dict(sorted(self._delays.items())),
            error=self._error,
        )
        if self.log is not None:
            self.log.event(report=asdict(report))
        return report

    def _tick(self) -> tuple[Decision, Inputs]:
        self._observe()
        self._converse()
        inputs = self._inputs()
        decision = self.governor.decide(inputs)
        self._guards.update(decision.guards)
        if decision.action is not None and not self.config.dry_run:
            try:
                self.robot.send(np.array(decision.action, np.float32))
            except OSError as error:
                self._lose_robot(error)  # the next tick disconnects
        if decision.reaction == "run":
            self.plan.advance()
        return decision, inputs

    def _observe(self) -> None:
        try:
            self._latest = self.robot.observe()
        except OSError as error:
            self._lose_robot(error)

    def _lose_robot(self, error: OSError) -> None:
        if self._fault is None:
            self._fault, self._error = "robot_lost", f"{type(error).__name__}: {error}"

    def _converse(self) -> None:
        """Fetch the policy's answer if there is one, and ask again when the plan has been played far enough."""
        answer = self.inference.fetch()
        if answer is not None:
            self._take(answer)
        if self._time_to_ask() and not self.inference.busy and self._fault is None:
            obs, seen_s = self._latest or (None, 0.0)
            if obs is not None:
                self._ask(obs, seen_s)
                if not self.config.asynchronous and (answer := self.inference.fetch()):
                    self._take(answer)
        self._server_failed = self._server_failed or self.inference.waiting_s() > self.config.server_timeout_s

    def _ask(self, obs: Observation, seen_s: float) -> None:
        going_on = self.config.join == "rtc" and self.plan.remaining > 0
        prefix = self.plan.left(self.delay.steps) if going_on else None
        self._asked_at_ticks.append(self.ticks)
        self._last_asked_at_tick = self.ticks
        self.inference.ask(obs, step=self.plan.step, seen_s=seen_s, prefix=prefix)

    def _take(self, answer: Answer) -> None:
        asked_at_tick = self._asked_at_ticks.popleft()
        if answer.error is None:
            self._server_failed = False
            self._latencies.append(answer.seconds)
            self.chunk_size = len(answer.chunk)
            late = self.plan.install(answer.chunk, asked_at_step=answer.asked_at_step, seen_s=answer.seen_s)
            # Held ticks count here as if they had been played: a robot that ran dry must learn to ask earlier.
            self.delay.add(math.ceil((self.ticks - asked_at_tick) / self._ticks_per_step))
            self._delays[late] += 1
            return
        self._error = f"{type(answer.error).__name__}: {answer.error}"
        if isinstance(answer.error, OSError):  # ConnectionError, TimeoutError: the server is gone, maybe not for good
            self._server_failed = True
        else:
            self._fault = "nonfinite_action" if isinstance(answer.error, FloatingPointError) else "policy_error"
            if self.log is not None:
                self.log.event(error=self._error)

    def _time_to_ask(self) -> bool:
        """Early enough that the robot does not run dry before the answer comes; several questions evenly apart."""
        played, late = self.config.n_action_steps or (self.chunk_size + 1) // 2, self.delay.steps
        if self.plan.remaining > max(self.chunk_size - played, late if self.config.asynchronous else 0):
            return False
        apart = late * self._ticks_per_step / self.config.in_flight
        return not self._asked_at_ticks or self.ticks - self._last_asked_at_tick >= apart

    def _inputs(self) -> Inputs:
        # Looked for last, so that nothing is sent that was decided before somebody pressed it.
        if self.pressed() or (self.config.estop_file is not None and self.config.estop_file.exists()):
            self._fault = "estop"
        now = self.clock()
        obs, seen_s = self._latest or (None, -np.inf)
        return Inputs(
            now_s=now - self.started,
            wanted=self.plan.wanted(),
            proprio=() if obs is None else tuple(np.asarray(obs.proprio[0], np.float32).tolist()),
            observation_age_s=float(now - seen_s),
            action_age_s=float(now - self.plan.seen_s),
            server_failed=self._server_failed,
            fault=self._fault,
        )


def _join(config: ControlConfig) -> Join:
    if config.join == "ensemble":
        return Ensemble(config.ensemble_decay)
    return Blend(config.blend_steps if config.join == "blend" else 0)


def ticks_per_step(robot_hz: float, policy_hz: float | None) -> Fraction:
    """Robot ticks to one action of the policy. ValueError for rates that make no sense."""
    if not robot_hz > 0:
        raise ValueError("the robot's action_spec must say its rate (control_hz)")
    ratio = Fraction(robot_hz).limit_denominator(10_000) / Fraction(policy_hz or robot_hz).limit_denominator(10_000)
    if ratio < 1:
        raise ValueError(f"policy_hz must be at most the robot's {robot_hz:g} Hz, got {policy_hz:g}")
    return ratio


def _quantiles_ms(seconds: list[float]) -> list[float]:
    return (1e3 * np.percentile(seconds, [50, 99, 100])).tolist() if seconds else [0.0, 0.0, 0.0]
