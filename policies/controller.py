"""A policy at the controls of a robot: a fixed-rate loop with guards on every action and a black box of every tick.

Deadlines are on the monotonic clock. A tick that overruns is counted, and the next one comes a whole period after it:
missed ticks are never made up in a burst.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from policies.blackbox import BlackBox
from policies.guards import Decision, Governor, GuardConfig, Inputs
from policies.plan import Answer, Inference, Plan
from policies.robots import Robot
from vla.types import Observation, Policy


@dataclass(frozen=True)
class ControlConfig:
    """How a policy drives a robot."""

    duration_s: float = 30.0
    policy_hz: float | None = None
    """Rate at which the policy's actions were meant; a whole fraction of the robot's. None: the robot's."""
    n_action_steps: int | None = None
    """Ask again after this many actions of a chunk; None: after half of it."""
    blend_steps: int = 2
    """Actions over which a new chunk takes over from the old one."""
    asynchronous: bool = True
    """Compute the next chunk while the current one is played."""
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
    """Ticks whose work ended after the next one's deadline."""
    seconds: float
    ended: str
    """done (the task), time, stopped (a guard's slow stop) or disconnect."""
    guards: dict[str, int]
    """Guard -> ticks in which it tripped."""
    answers: int
    latency_ms: dict[str, float]
    """Of the policy's answers: p50, p99. The warm-up is not among them."""
    delays: dict[int, int]
    """Actions of a chunk that came too late because the robot had played those steps -> how often."""


def control(
    robot: Robot,
    policy: Policy,
    config: ControlConfig,
    *,
    log: BlackBox | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ControlReport:
    """Connect, drive, and disconnect whatever happens. ValueError for a configuration that does not fit the robot."""
    ticks_per_step = _ticks_per_step(robot.action_spec.control_hz, config.policy_hz)
    try:
        robot.connect()
        loop = _Loop(robot, policy, config, log, ticks_per_step, clock, sleep)
        try:
            return loop.run()
        finally:
            loop.inference.close()
    finally:
        robot.disconnect()


class _Loop:
    def __init__(
        self,
        robot: Robot,
        policy: Policy,
        config: ControlConfig,
        log: BlackBox | None,
        ticks_per_step: int,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.robot, self.policy, self.config, self.log, self.clock, self.sleep = (
            robot,
            policy,
            config,
            log,
            clock,
            sleep,
        )
        rest = tuple(robot.rest())
        names = robot.proprio_names
        self.governor = Governor(config.guards, robot.action_spec, robot.kinds, rest=rest, proprio_names=names)
        self.plan = Plan(robot.kinds, ticks_per_step=ticks_per_step, blend_steps=config.blend_steps, rest=rest)
        self.inference = Inference(policy, asynchronous=config.asynchronous, clock=clock)
        self.fault: str | None = None
        self.server_failed = False
        self.latest: tuple[Observation, float] | None = None
        self.chunk_size = 0
        self.latencies: list[float] = []
        self.delays: Counter[int] = Counter()
        self.guards: Counter[str] = Counter()
        if log is not None:
            log.start(
                config.guards, robot.action_spec, robot.kinds, rest, names,
                control={name: value for name, value in asdict(config).items() if name != "guards"} | {
                    "estop_file": None if config.estop_file is None else str(config.estop_file)
                },
            )  # fmt: skip

    def run(self) -> ControlReport:
        dt = 1.0 / self.robot.action_spec.control_hz
        self._warm_up()
        start = deadline = self.clock()
        ticks = overruns = 0
        ended = "time"
        while deadline - start < self.config.duration_s - dt / 2:
            late_s = self.clock() - deadline
            decision, inputs = self._tick(start)
            ticks += 1
            if self.log is not None:
                plan = {"step": self.plan.step, "remaining": self.plan.remaining}
                self.log.tick(inputs, decision, tick=ticks, late_s=late_s, work_s=self.clock() - deadline, plan=plan)
            if decision.reaction in ("stopped", "disconnect"):
                ended = decision.reaction
                break
            if self.robot.done:
                ended = "done"
                break
            deadline += dt
            left = deadline - self.clock()
            if left < 0:
                overruns += 1
                deadline = self.clock() + dt
            self.sleep(deadline - self.clock() if left < 0 else left)
        p50, p99 = np.percentile(self.latencies, [50, 99]).tolist() if self.latencies else (0.0, 0.0)
        report = ControlReport(
            ticks=ticks,
            overruns=overruns,
            seconds=self.clock() - start,
            ended=ended,
            guards=dict(self.guards),
            answers=len(self.latencies),
            latency_ms={"p50": 1e3 * p50, "p99": 1e3 * p99},
            delays=dict(sorted(self.delays.items())),
        )
        if self.log is not None:
            self.log.event(report=asdict(report))
        return report

    def _warm_up(self) -> None:
        """One answer before the clock starts: the first is always the slowest. An error is met again, in the loop."""
        obs, seen_s = self.robot.observe()
        self.policy.reset()
        first = Inference(self.policy, asynchronous=False, clock=self.clock)
        first.ask(obs, step=0, seen_s=seen_s)
        answer = first.fetch()
        if answer is not None and answer.chunk is not None:
            self.chunk_size = len(answer.chunk)

    def _tick(self, start: float) -> tuple[Decision, Inputs]:
        self._observe()
        self._converse()
        inputs = self._inputs(start)
        decision = self.governor.decide(inputs)
        self.guards.update(decision.guards)
        if decision.action is not None and not self.config.dry_run:
            try:
                self.robot.send(np.array(decision.action, np.float32))
            except OSError:
                self.fault = "robot_lost"  # the next tick disconnects
        if decision.reaction == "run":
            self.plan.advance()
        return decision, inputs

    def _observe(self) -> None:
        try:
            self.latest = self.robot.observe()
        except OSError:
            self.fault = self.fault or "robot_lost"

    def _converse(self) -> None:
        """Fetch the policy's answer if there is one, and ask again when the plan has been played far enough."""
        answer = self.inference.fetch()
        if answer is not None:
            self._take(answer)
        if not self.inference.busy and self.fault is None and self.plan.remaining <= self._refill_at():
            obs, seen_s = self.latest or (None, 0.0)
            if obs is not None:
                self.inference.ask(obs, step=self.plan.step, seen_s=seen_s)
                if not self.config.asynchronous and (answer := self.inference.fetch()):
                    self._take(answer)
        self.server_failed = self.server_failed or self.inference.waiting_s() > self.config.server_timeout_s

    def _take(self, answer: Answer) -> None:
        if answer.error is None:
            self.server_failed = False
            self.latencies.append(answer.seconds)
            self.chunk_size = len(answer.chunk)
            late = self.plan.install(answer.chunk, asked_at_step=answer.asked_at_step, seen_s=answer.seen_s)
            self.delays[late] += 1
        elif isinstance(answer.error, OSError):  # ConnectionError, TimeoutError: the server is gone, maybe not for good
            self.server_failed = True
        else:
            self.fault = "nonfinite_action" if isinstance(answer.error, FloatingPointError) else "policy_error"
            if self.log is not None:
                self.log.event(error=f"{type(answer.error).__name__}: {answer.error}")

    def _refill_at(self) -> int:
        played = self.config.n_action_steps or (self.chunk_size + 1) // 2
        return max(self.chunk_size - played, 0)

    def _inputs(self, start: float) -> Inputs:
        # Looked for last, so that nothing is sent that was decided before somebody pressed it.
        if self.config.estop_file is not None and self.config.estop_file.exists():
            self.fault = "estop"
        now = self.clock()
        obs, seen_s = self.latest or (None, -np.inf)
        return Inputs(
            now_s=now - start,
            wanted=self.plan.wanted(),
            proprio=() if obs is None else tuple(np.asarray(obs.proprio[0], np.float32).tolist()),
            observation_age_s=float(now - seen_s),
            action_age_s=float(now - self.plan.seen_s),
            server_failed=self.server_failed,
            fault=self.fault,
        )


def _ticks_per_step(robot_hz: float, policy_hz: float | None) -> int:
    if not robot_hz > 0:
        raise ValueError("the robot's action_spec must say its rate (control_hz)")
    ratio = robot_hz / (policy_hz or robot_hz)
    if ratio < 1 or abs(ratio - round(ratio)) > 1e-6:
        raise ValueError(f"policy_hz must divide the robot's {robot_hz:g} Hz, got {policy_hz:g}")
    return round(ratio)
