"""One robot's control loop: what happens in a tick. `policies.control.controller` keeps the time."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from policies.control.config import ControlConfig, ControlReport, is_pressed
from policies.control.flight_log import BlackBox
from policies.control.guards import Decision, Governor, Inputs
from policies.control.playback import Asking, Person
from policies.control.policy_source import PolicySource, Reasons
from policies.control.robots import Robot
from policies.control.watched_robot import WatchedRobot

_log = logging.getLogger(__name__)

_LAPSE_S = 0.5
"""A tick that begins so late, and later than an observation may be old, follows a time in which nothing ran."""
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
        person: Person | None = None,
    ) -> None:
        """`robot` is connected. `rest`: the action that leaves it as it is; None: the robot is asked. `watched`: the
        robot with what was seen of it so far. `person`: may take over from the policy, tick by tick."""
        if config.dry_run:  # a robot that is sent nothing follows nothing
            config = replace(config, guards=replace(config.guards, follow_s=1e9))
        self.robot, self.config, self.log = robot, config, log
        self.pressed, self.clock, self.dt = pressed, clock, 1.0 / robot.action_spec.control_hz
        self.watched = watched or WatchedRobot(robot, clock)
        self.person = person
        self._reasons = Reasons()
        self._rest = tuple(robot.rest()) if rest is None else rest
        self.governor = self._governor()
        self.policy = PolicySource(
            robot, inference, config, self.watched, self._reasons, log=log, clock=clock, rest=self._rest
        )
        self.started = 0.0
        self.ticks = self.overruns = 0
        self.ended: str | None = None
        self._fault: str | None = None
        self._reaction = "run"  # of the last tick; "run" plays the plan
        self._held_by: tuple[str, ...] = ()
        self._send_failed = False
        self._last = self._rest  # what the robot was sent last
        self._sent: tuple[float, ...] | None = None  # what went to the robot where it was not what had been decided
        self._guards: Counter[str] = Counter()
        self._drivers: Counter[str] = Counter()
        self._takeovers = 0
        self._late_s: list[float] = []
        self._work_s: list[float] = []

    def _governor(self) -> Governor:
        """The guards of a robot that is at rest."""
        robot = self.robot
        names = robot.proprio_names
        return Governor(self.config.guards, robot.action_spec, robot.kinds, rest=self._rest, proprio_names=names)

    def start(self, rest: tuple[float, ...] | None = None) -> float:
        """The clock starts. `rest`: where the robot is now, if that was measured anew."""
        if rest is not None:
            self._rest = self._last = rest
            self.governor = self._governor()
            self.policy.place(rest)
        if outside := self.governor.outside():
            self._reasons.by_guard["outside_limits"] = f"when the run began, {outside}"
        if self.log is not None:
            config, plain = self.config, asdict(self.config)
            self.log.start(
                config.guards, self.robot.action_spec, self.robot.kinds, self._rest, self.robot.proprio_names,
                **({} if self.person is None else {"teleop": True}),
                control={name: value for name, value in plain.items() if name != "guards"} | {
                    "estop_file": None if config.estop_file is None else str(config.estop_file)
                },
            )  # fmt: skip
        self.watched.spent_s.clear()
        self.watched.longest_s.clear()
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
        elif self.person is not None and self.person.error is not None:
            self.ended, guard = "stopped", "teleop_error"
            self._reasons.add(guard, self.person.error)
        else:
            self.ended, guard = "stopped", "robot_error"
        self._guards[guard] += 1
        if guard != "estop" and self.watched.trouble is not None:
            self._reasons.add(guard, self.watched.trouble)

    def _tell_estop(self) -> None:
        file = self.config.estop_file
        if file is not None and is_pressed(lambda: False, file):
            self._reasons.by_guard["estop"] = (
                f"the e-stop file {file} exists or cannot be looked for: remove it to drive the robot"
            )

    def fail(self, error: Exception) -> None:
        """End a run that cannot go on, because of an error that is neither the robot's nor the policy's."""
        self.ended = "disconnect"
        self._reasons.add("controller", error)

    def tick(self, deadline: float) -> Decision:
        """Look, ask, decide, send. `deadline`: when it was to begin."""
        self._late_s.append(self.clock() - deadline)
        decision, inputs = self._tick(self._lapsed(self._late_s[-1]))
        self.ticks += 1
        self._work_s.append(self.clock() - deadline - self._late_s[-1])
        who = self._who()
        if self.log is not None:
            plan = {"step": self.policy.plan.step, "remaining": self.policy.plan.remaining}
            self.log.tick(
                inputs,
                decision,
                obs=None if self.watched.latest is None else self.watched.latest[0],
                tick=self.ticks,
                late_s=self._late_s[-1],
                work_s=self._work_s[-1],
                plan=plan,
                sent=self._sent,
                **who,
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
        p50, p99 = _quantiles_ms(self.policy.latencies)[:2]
        watched = self.watched
        for name, told in (
            ("camera", watched.frozen),
            ("state", watched.jumped),
            ("echo", watched.unheeded),
            ("rate", self._too_slow()),
            ("stuck", self._stuck()),
        ):
            if told:
                self._reasons.by_guard[name] = told
        report = ControlReport(
            ticks=self.ticks,
            overruns=self.overruns,
            seconds=self.clock() - self.started,
            ended=self.ended or ("stopped" if self._reaction == "slow stop" else "time"),
            guards=dict(self._guards),
            answers=len(self.policy.latencies),
            latency_ms={"p50": p50, "p99": p99},
            late_ms=dict(zip(("p50", "p99", "max"), _quantiles_ms(self._late_s), strict=True)),
            work_ms=dict(zip(("p50", "p99", "max"), _quantiles_ms(self._work_s), strict=True)),
            delays=dict(sorted(self.policy.delays.items())),
            error=self._reasons.error,
            reasons=dict(self._reasons.by_guard),
            held_by=self._held_by,
            drivers=dict(self._drivers),
            takeovers=self._takeovers,
        )
        if self.log is not None:
            self.log.event(report=asdict(report))
        return report

    def _stuck(self, least_s: float = 0.0) -> str:
        """The call of the robot that took the longest, if it was a long time and most of `least_s`, in words; "" where
        none did."""
        method, took_s = max(self.watched.longest_s.items(), key=lambda item: item[1], default=("", 0.0))
        if took_s <= max(_LAPSE_S, self.config.guards.max_observation_age_s, least_s - self.dt):
            return ""
        return f"its {method}() took {took_s:.1f} s in one call, and nothing was sent meanwhile"

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

    def _lapsed(self, late_s: float) -> float:
        """Seconds in which nothing ran before this tick, 0.0 as a rule. What was planned before is then dropped, and
        the policy asked anew: the world has gone on."""
        if late_s <= max(_LAPSE_S, self.config.guards.max_observation_age_s):
            return 0.0
        self.policy.lapse(late_s, self._last, self.ticks)
        reason = (
            f"nothing ran for {late_s:.1f} s before tick {self.ticks + 1}: the process was suspended, or the machine "
            "stood still; the robot was sent nothing, then its plan was dropped and the policy asked anew"
        )
        self._reasons.by_guard["suspended"] = reason
        _log.warning("%s", reason)
        if self.log is not None:
            self.log.event(suspended=reason)
        return late_s

    def _tick(self, lapse_s: float) -> tuple[Decision, Inputs]:
        good = self.watched.observe()
        self._note_trouble(good)
        wanted = self._wanted()
        inputs = self._inputs(wanted, robot_error=self._send_failed or not good, lapse_s=lapse_s)
        decision = self.governor.decide(inputs)
        self._guards.update(decision.guards)
        if "workspace" in decision.guards:
            self._reasons.add("workspace", self.governor.beyond(inputs.proprio))
        if "stale_observation" in decision.guards and good:
            # Not an error of a call, so that `error` stays: the robot answers, with what it saw before.
            self._reasons.by_guard["stale_observation"] = self._stuck(inputs.observation_age_s) or (
                f"the robot's observe() answers with what was seen {inputs.observation_age_s:.1f} s ago: does its "
                "camera go on, and is the time it gives the time.monotonic() of its pictures?"
            )
        if "dead_server" in decision.guards and "dead_server" not in self._reasons.by_guard:
            # no error came: nothing did
            self._reasons.add(
                "dead_server",
                f"no answer for {self.policy.waiting_s():.1f} s: the policy's server is gone, stuck or slow (does "
                "`vla serve` still run there? One that compiles before its first answer: start again when it has; else "
                "--server-timeout-s and --give-up-s allow for more)",
            )
        late_s, age = self.policy.waiting_s(), inputs.action_age_s
        # Before the first answer, and for a moment, it is as it should be. No error of anybody, so that `error` stays.
        told = inputs.wanted is not None or late_s >= _LAPSE_S or decision.reaction != "hold"
        if "stale_action" in decision.guards and told:
            self._reasons.by_guard["stale_action"] = (
                f"the plan was played to its end, and the policy's next answer not there {late_s:.1f} s after it was "
                "asked for"
                if inputs.wanted is None
                else f"the action to play answered what was seen {age:.1f} s before (--max-action-age-s)"
            )
        if "not_following" in decision.guards:
            self._reasons.add("not_following", self.governor.not_following())
        self._send(decision, self.governor.before)
        self._reaction = decision.reaction
        self._held_by = () if self._reaction == "run" else tuple(decision.guards)
        self._last = self._sent or decision.action or self._last
        if self._reaction == "run" and not self._by_hand:
            self.policy.plan.advance()
        return decision, inputs

    @property
    def _by_hand(self) -> bool:
        return self.person is not None and self.person.drives

    def _wanted(self) -> tuple[float, ...] | None:
        """This tick's action: of the policy's plan, or of a person who has taken over."""
        person = self.person
        if person is not None:
            drove = person.drives
            with self.watched.timed("teleoperator's get_action"):
                person.look(self._last, self.clock() - self.started)
            if person.drives != drove:
                self.policy.begin_anew(self._last, self.ticks)
                self._takeovers += person.drives
            if person.error is not None:
                self._reasons.add("teleop_error", person.error)
            if person.drives:
                self.policy.listen(self.ticks)
                return person.command(None)
        self.policy.converse(self.ticks, running=self._reaction == "run", stopping=self._fault is not None)
        planned = self.policy.plan.wanted()
        return planned if person is None else person.command(planned)

    def _who(self) -> dict[str, Any]:
        """Tell who drove in this tick, for the log of a run in which somebody may take over, and in which scene."""
        if self.person is None:
            return {}
        self._drivers[self.person.driver] += 1
        return {"driver": self.person.driver, "scene": getattr(self.robot, "scenes", 0)}

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
            self._reasons.add("robot_lost" if self.watched.lost else "robot_error", self.watched.trouble)

    def _inputs(self, wanted: tuple[float, ...] | None, *, robot_error: bool, lapse_s: float) -> Inputs:
        # Looked for last, so that nothing is sent that was decided before somebody pressed it.
        if is_pressed(self.pressed, self.config.estop_file):
            self._fault = "estop"
            self._tell_estop()
        now = self.clock()
        obs, seen_s = self.watched.latest or (None, -np.inf)
        return Inputs(
            now_s=now - self.started,
            wanted=wanted,
            proprio=() if obs is None else tuple(np.asarray(obs.proprio[0], np.float32).tolist()),
            observation_age_s=float(now - seen_s),
            action_age_s=0.0 if self._by_hand else float(now - self.policy.plan.seen_s),
            server_failed=self.policy.server_failed,
            fault=self._fault or self.policy.fault,
            robot_error=robot_error,
            sent=self._sent,
            ungrounded=self.policy.ungrounded,
            teleop_error=self.person is not None and self.person.error is not None,
            lapse_s=lapse_s,
        )


def _quantiles_ms(seconds: list[float]) -> list[float]:
    return (1e3 * np.percentile(seconds, [50, 99, 100])).tolist() if seconds else [0.0, 0.0, 0.0]
