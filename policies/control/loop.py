"""One robot's control loop: what happens in a tick. `policies.control.controller` keeps the time."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np

from policies.chunking.merge import Blend, DelayEstimate, Ensemble, Join
from policies.control.config import ControlConfig, ControlReport, check_chunk, is_pressed, ticks_per_step
from policies.control.flight_log import BlackBox
from policies.control.guards import Decision, Governor, Inputs
from policies.control.playback import Answer, Asking, Inference, Plan
from policies.control.robots import Robot
from policies.control.watched_robot import WatchedRobot
from vla.core.grounding import FirstSight
from vla.core.types import Observation, Policy
from vla.language.talking import Said
from vla.processing.text import shortened

_log = logging.getLogger(__name__)
_MANY_OVERRUNS = 0.2
"""From this fraction of ticks with a missed deadline on, a run is slower than it was meant to be."""


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
        rest: tuple[float, ...] | None = None,
        watched: WatchedRobot | None = None,
    ) -> None:
        """`robot` is connected. `rest`: the action that leaves it as it is; None: the robot is asked. `watched`: the
        robot with what was seen of it so far."""
        if config.dry_run:  # a robot that is sent nothing follows nothing
            config = replace(config, guards=replace(config.guards, follow_s=1e9))
        self.robot, self.inference, self.config, self.log = robot, inference, config, log
        self.pressed, self.clock, self.dt = pressed, clock, 1.0 / robot.action_spec.control_hz
        self.watched = watched or WatchedRobot(robot, clock)
        self._ticks_per_step = ticks_per_step(robot.action_spec.control_hz, config.policy_hz)
        self._asked_at_ticks: deque[int] = deque()  # questions that are out, oldest first
        self._last_asked_at_tick = 0
        self._place(tuple(robot.rest()) if rest is None else rest)
        self.delay = DelayEstimate()
        self.chunk_size = 0
        self.started = 0.0
        self.ticks = self.overruns = 0
        self.ended: str | None = None
        self._fault: str | None = None
        self._error: str | None = None
        self._reasons: dict[str, str] = {}
        self._server_failed = False
        self._sight = None if config.hold_below is None else FirstSight(config.hold_below)
        self._ungrounded = False
        self._reaction = "run"  # of the last tick; "run" plays the plan
        self._held_by: tuple[str, ...] = ()
        self._send_failed = False
        self._sent: tuple[float, ...] | None = None  # what went to the robot where it was not what had been decided
        self._latencies: list[float] = []
        self._delays: Counter[int] = Counter()
        self._guards: Counter[str] = Counter()
        self._late_s: list[float] = []
        self._work_s: list[float] = []

    def _place(self, rest: tuple[float, ...]) -> None:
        """Guards and plan of a robot that is at `rest`."""
        spec, config = self.robot.action_spec, self.config
        self._rest = rest
        self.governor = Governor(
            config.guards, spec, self.robot.kinds, rest=rest, proprio_names=self.robot.proprio_names
        )
        self.plan = Plan(
            self.robot.kinds,
            ticks_per_step=self._ticks_per_step,
            rest=rest,
            join=_join(config),
            catch_up_steps=config.catch_up_steps,
            bounds=(spec.low, spec.high),
        )

    def warm_up(self, policy: Policy) -> None:
        """One answer before the clock starts: the first is always the slowest. An error is met again, in the loop.

        ValueError for an answer that is none for this robot.
        """
        if self.watched.latest is None and not self.watched.observe():
            return
        assert self.watched.latest is not None
        obs, seen_s = self.watched.latest
        try:
            policy.reset()
        except Exception as error:
            self._reason("policy_error", error)
            return
        first = Inference(policy, asynchronous=False, clock=self.clock)
        first.ask(obs, step=0, seen_s=seen_s)
        answer = first.fetch()
        if answer is not None and answer.chunk is not None:
            check_chunk(answer.chunk, self.robot.action_spec)
            self.chunk_size = len(answer.chunk)
            if self.config.join == "rtc":  # the guided way is another, and as slow the first time
                self.plan.install(answer.chunk, asked_at_step=0, seen_s=seen_s)
                first.ask(obs, step=0, seen_s=seen_s, prefix=self.plan.left(1))
                first.fetch()
                self.plan.clear()
            policy.reset()  # one that remembers has not decided anything yet

    def start(self, rest: tuple[float, ...] | None = None) -> float:
        """The clock starts. `rest`: where the robot is now, if that was measured anew."""
        if rest is not None:
            self._place(rest)
        if outside := self.governor.outside():
            self._reasons["outside_limits"] = f"when the run began, {outside}"
        if self.log is not None:
            config, plain = self.config, asdict(self.config)
            self.log.start(
                config.guards, self.robot.action_spec, self.robot.kinds, self._rest, self.robot.proprio_names,
                control={name: value for name, value in plain.items() if name != "guards"} | {
                    "estop_file": None if config.estop_file is None else str(config.estop_file)
                },
            )  # fmt: skip
        self.watched.spent_s.clear()
        self.started = self.clock()
        return self.started

    def give_up(self) -> None:
        """End a run before its first tick, because the robot is not there, does not say where it is, or the e-stop was
        pressed."""
        if is_pressed(self.pressed, self.config.estop_file):
            self.ended, guard = "disconnect", "estop"
            self._tell_estop()
        elif self.watched.lost:
            self.ended, guard = "disconnect", "robot_lost"
        else:
            self.ended, guard = "stopped", "robot_error"
        self._guards[guard] += 1
        if guard != "estop" and self.watched.trouble is not None:
            self._reason(guard, self.watched.trouble)

    def _tell_estop(self) -> None:
        file = self.config.estop_file
        if file is not None and is_pressed(lambda: False, file):
            self._reasons["estop"] = (
                f"the e-stop file {file} exists or cannot be looked for: remove it to drive the robot"
            )

    def fail(self, error: Exception) -> None:
        """End a run that cannot go on, because of an error that is neither the robot's nor the policy's."""
        self.ended = "disconnect"
        self._reason("controller", error)

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
                obs=None if self.watched.latest is None else self.watched.latest[0],
                tick=self.ticks,
                late_s=self._late_s[-1],
                work_s=self._work_s[-1],
                plan=plan,
                sent=self._sent,
            )
        if decision.reaction in ("stopped", "disconnect"):
            self.ended = decision.reaction
        elif (done := self.watched.done()) is None:
            self._send_failed = True  # the next tick holds, or disconnects
            self._note_trouble(False)
        elif done:
            self.ended = "done"
        return decision

    def report(self) -> ControlReport:
        p50, p99 = _quantiles_ms(self._latencies)[:2]
        for name, told in (("camera", self.watched.frozen), ("state", self.watched.jumped), ("rate", self._too_slow())):
            if told:
                self._reasons[name] = told
        report = ControlReport(
            ticks=self.ticks,
            overruns=self.overruns,
            seconds=self.clock() - self.started,
            ended=self.ended or ("stopped" if self._reaction == "slow stop" else "time"),
            guards=dict(self._guards),
            answers=len(self._latencies),
            latency_ms={"p50": p50, "p99": p99},
            late_ms=dict(zip(("p50", "p99", "max"), _quantiles_ms(self._late_s), strict=True)),
            work_ms=dict(zip(("p50", "p99", "max"), _quantiles_ms(self._work_s), strict=True)),
            delays=dict(sorted(self._delays.items())),
            error=self._error,
            reasons=dict(self._reasons),
            held_by=self._held_by,
        )
        if self.log is not None:
            self.log.event(report=asdict(report))
        return report

    def _too_slow(self) -> str:
        """How much less often the robot was commanded than it should be, and why, in words; "" where it was not."""
        if not self.ticks or self.overruns < max(_MANY_OVERRUNS * self.ticks, 3):
            return ""
        rate = self.ticks / (self.clock() - self.started)
        method, spent_s = max(self.watched.spent_s.items(), key=lambda item: item[1], default=("", 0.0))
        what, each_s = f"its {method}() takes", spent_s / self.ticks
        if each_s < self.dt / 2:
            what, each_s = "the machine is busy: a tick takes", sum(self._work_s) / self.ticks
        return (
            f"the robot was commanded {rate:.1f} times a second instead of {1 / self.dt:g}, and moved as much slower "
            f"than meant; {what} {1e3 * each_s:.0f} ms, and there are {1e3 * self.dt:.0f} ms: command it less often "
            "(--hz), or let its driver read the cameras in a thread"
        )

    def _tick(self) -> tuple[Decision, Inputs]:
        good = self.watched.observe()
        self._note_trouble(good)
        self._converse()
        inputs = self._inputs(robot_error=self._send_failed or not good)
        decision = self.governor.decide(inputs)
        self._guards.update(decision.guards)
        if "workspace" in decision.guards:
            self._reason("workspace", self.governor.beyond(inputs.proprio))
        if "stale_observation" in decision.guards and good:
            # Not an error of a call, so that `error` stays: the robot answers, with what it saw before.
            self._reasons["stale_observation"] = (
                f"the robot's observe() answers with what was seen {inputs.observation_age_s:.1f} s ago: does its "
                "camera go on, and is the time it gives the time.monotonic() of its pictures?"
            )
        if "dead_server" in decision.guards and "dead_server" not in self._reasons:  # no error came: nothing did
            self._reason(
                "dead_server",
                f"no answer for {self.inference.waiting_s():.1f} s: the policy's server is stuck or slow (one that "
                "compiles before its first answer: start again when it has; else --server-timeout-s and --give-up-s "
                "allow for more)",
            )
        if "not_following" in decision.guards:
            self._reason("not_following", self.governor.not_following())
        self._send(decision, self.governor.before)
        self._reaction = decision.reaction
        self._held_by = () if self._reaction == "run" else tuple(decision.guards)
        if self._reaction == "run":
            self.plan.advance()
        return decision, inputs

    def _send(self, decision: Decision, before: tuple[float, ...]) -> None:
        self._sent, self._send_failed = None, False
        if decision.action is None or self.config.dry_run:
            return
        self.watched.trouble = None
        self._sent = self.watched.send(decision.action, before)
        if self.watched.trouble is not None:  # the next tick holds, or disconnects
            self._send_failed = True
            self._note_trouble(False)

    def _note_trouble(self, good: bool) -> None:
        if self.watched.lost and self._fault is None:
            self._fault = "robot_lost"
        if not good and self.watched.trouble is not None:
            self._reason("robot_lost" if self.watched.lost else "robot_error", self.watched.trouble)

    def _reason(self, guard: str, what: str | Exception) -> None:
        text = what if isinstance(what, str) else f"{type(what).__name__}: {what}"
        self._error = self._reasons[guard] = text

    def _converse(self) -> None:
        """Fetch the policy's answer if there is one, and ask again when the plan has been played far enough."""
        answer = self.inference.fetch()
        if answer is not None:
            self._take(answer)
        if self._time_to_ask() and not self.inference.busy and self._fault is None:
            assert self.watched.latest is not None
            self._ask(*self.watched.latest)
            if not self.config.asynchronous and (answer := self.inference.fetch()):
                self._take(answer)
        self._server_failed = self._server_failed or self.inference.waiting_s() > self.config.server_timeout_s

    def _ask(self, obs: Observation, seen_s: float) -> None:
        going_on = self.config.join == "rtc" and self.plan.remaining > 0
        prefix = self.plan.left(self.delay.steps) if going_on else None
        self._asked_at_ticks.append(self.ticks)
        self._last_asked_at_tick = self.ticks
        scene = getattr(self.robot, "scenes", 0)  # of a simulated robot that plays one after another
        self.inference.ask(obs, step=self.plan.step, seen_s=seen_s, prefix=prefix, scene=scene)

    def _take(self, answer: Answer) -> None:
        asked_at_tick = self._asked_at_ticks.popleft()
        if answer.account is not None:
            self._tell(answer.account)
        error = answer.error
        if error is None:
            try:
                check_chunk(answer.chunk, self.robot.action_spec)
            except ValueError as misfit:
                error = misfit
        if error is None:
            self._server_failed = False
            self._latencies.append(answer.seconds)
            self.chunk_size = len(answer.chunk)
            if not self._hold_for(answer):
                late = self.plan.install(answer.chunk, asked_at_step=answer.asked_at_step, seen_s=answer.seen_s)
                self._delays[late] += 1
            # Held ticks count here as if they had been played: a robot that ran dry must learn to ask earlier.
            self.delay.add(math.ceil((self.ticks - asked_at_tick) / self._ticks_per_step))
            return
        if isinstance(error, OSError):  # ConnectionError, TimeoutError: the server is gone, maybe not for good
            self._server_failed = True
            self._reason("dead_server", error)
        else:
            self._fault = "nonfinite_action" if isinstance(error, FloatingPointError) else "policy_error"
            self._reason(self._fault, error)
            if self.log is not None:
                self.log.event(error=self._error)

    def _tell(self, account: Said) -> None:
        """Write what the policy says it does to the log of the run and the program's."""
        _log.info("the policy says: %s (confidence %.2f)", account.text, account.confidence)
        if self.log is not None:
            self.log.event(account=asdict(account))

    def _hold_for(self, answer: Answer) -> bool:
        """True if the answer is not to be played, because the policy does not see what its instruction names."""
        told = None if answer.confidence is None else np.array([answer.confidence])
        ungrounded = self._sight is not None and bool(self._sight.holds(told, [answer.instruction])[0])
        if ungrounded:
            self.plan.clear()  # what is left of it is for another instruction
            reason = (
                f"nothing in sight is what {shortened(answer.instruction)} names: confidence {answer.confidence:.3f}, "
                f"threshold {self.config.hold_below:.3f}"
            )
            self._reasons["not_grounded"] = reason
            if self.log is not None and not self._ungrounded:
                self.log.event(not_grounded=reason)
        self._ungrounded = ungrounded
        return ungrounded

    def _time_to_ask(self) -> bool:
        """Early enough that the robot does not run dry before the answer comes; several questions evenly apart."""
        if self.watched.latest is None:
            return False
        now = self.clock()
        if not now - self.watched.latest[1] <= self.config.guards.max_observation_age_s:
            return False  # nothing would be played that answers it
        if self._reaction != "run" and now - self.plan.seen_s > self.config.guards.max_action_age_s / 2:
            self.plan.clear()  # it has grown old while the robot held: it would not be played, and nothing be asked
        played, late = self.config.n_action_steps or (self.chunk_size + 1) // 2, self.delay.steps
        if self._ungrounded and self.ticks - self._last_asked_at_tick < played * self._ticks_per_step:
            return False  # look again as often as if it moved
        if self.plan.remaining > max(self.chunk_size - played, late if self.config.asynchronous else 0):
            return False
        apart = late * self._ticks_per_step / self.config.in_flight
        return not self._asked_at_ticks or self.ticks - self._last_asked_at_tick >= apart

    def _inputs(self, *, robot_error: bool) -> Inputs:
        # Looked for last, so that nothing is sent that was decided before somebody pressed it.
        if is_pressed(self.pressed, self.config.estop_file):
            self._fault = "estop"
            self._tell_estop()
        now = self.clock()
        obs, seen_s = self.watched.latest or (None, -np.inf)
        return Inputs(
            now_s=now - self.started,
            wanted=self.plan.wanted(),
            proprio=() if obs is None else tuple(np.asarray(obs.proprio[0], np.float32).tolist()),
            observation_age_s=float(now - seen_s),
            action_age_s=float(now - self.plan.seen_s),
            server_failed=self._server_failed,
            fault=self._fault,
            robot_error=robot_error,
            sent=self._sent,
            ungrounded=self._ungrounded,
        )


def _join(config: ControlConfig) -> Join:
    if config.join == "ensemble":
        return Ensemble(config.ensemble_decay)
    return Blend(config.blend_steps if config.join == "blend" else 0)


def _quantiles_ms(seconds: list[float]) -> list[float]:
    return (1e3 * np.percentile(seconds, [50, 99, 100])).tolist() if seconds else [0.0, 0.0, 0.0]
