"""The policy as the source of a robot's actions: when it is asked, what becomes of its answers, the plan they make."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from policies.chunking.merge import Blend, DelayEstimate, Ensemble, Join
from policies.control.config import ControlConfig, check_chunk, ticks_per_step
from policies.control.flight_log import BlackBox
from policies.control.playback import Answer, Asking, Inference, Plan
from policies.control.robots import Robot
from policies.control.watched_robot import WatchedRobot
from vla.core.grounding import FirstSight
from vla.core.types import Observation, Policy
from vla.language.talking import Said
from vla.processing.text import shortened

_log = logging.getLogger(__name__)


class Reasons:
    """Guard -> the message when it tripped last, and the last error of them all."""

    def __init__(self) -> None:
        self.by_guard: dict[str, str] = {}
        self.error: str | None = None

    def add(self, guard: str, what: str | Exception) -> None:
        """Note an error that trips `guard`."""
        self.error = self.by_guard[guard] = what if isinstance(what, str) else f"{type(what).__name__}: {what}"


class PolicySource:
    """Asks the policy, takes its answers, and plays them as a plan."""

    def __init__(
        self,
        robot: Robot,
        inference: Asking,
        config: ControlConfig,
        watched: WatchedRobot,
        reasons: Reasons,
        *,
        log: BlackBox | None,
        clock: Callable[[], float],
        rest: tuple[float, ...],
    ) -> None:
        """`rest`: the action that leaves the robot as it is. `reasons`: where errors are noted."""
        self._robot, self._config, self._watched, self._reasons = robot, config, watched, reasons
        self.inference, self._log, self._clock = inference, log, clock
        self._ticks_per_step = ticks_per_step(robot.action_spec.control_hz, config.policy_hz)
        self._asked_at_ticks: deque[int] = deque()  # questions that are out, oldest first
        self._last_asked_at_tick = 0
        self._begun_at_tick = 0  # answers to older questions are not played
        self._begun_anew = 0
        self._lapsed_s = 0.0  # of the time that the open questions wait, nothing ran in so much
        self.plan = self.planned_from(rest)
        self.delay = DelayEstimate()
        self.chunk_size = 0
        self.fault: str | None = None
        """A guard that an answer tripped: nonfinite_action or policy_error."""
        self.server_failed = False
        self.ungrounded = False
        """True while the policy does not see what its instruction names, in a run that asks for that."""
        self._sight = None if config.hold_below is None else FirstSight(config.hold_below)
        self.latencies: list[float] = []
        """Seconds that each answer took."""
        self.delays: Counter[int] = Counter()
        """Actions of an answer that came too late to be executed -> how often."""

    def planned_from(self, rest: tuple[float, ...]) -> Plan:
        """An empty plan of a robot that is at `rest`."""
        spec, config = self._robot.action_spec, self._config
        return Plan(
            self._robot.kinds,
            ticks_per_step=self._ticks_per_step,
            rest=rest,
            join=_join(config),
            catch_up_steps=config.catch_up_steps,
            bounds=(spec.low, spec.high),
        )

    def place(self, rest: tuple[float, ...]) -> None:
        """Begin at `rest`, with nothing planned."""
        self.plan = self.planned_from(rest)

    def begin_anew(self, rest: tuple[float, ...], tick: int) -> None:
        """Somebody else has moved the robot, to `rest`: drop the plan and the answers that are under way, and have the
        policy reset before it is asked again."""
        self.plan.restart(rest)
        self._begun_at_tick, self._begun_anew = tick, self._begun_anew + 1
        self.ungrounded = False

    def warm_up(self, policy: Policy) -> None:
        """One answer before the clock starts: the first is always the slowest. An error is met again, in the loop.

        ValueError for an answer that is none for this robot.
        """
        if self._watched.latest is None and not self._watched.observe():
            return
        assert self._watched.latest is not None
        obs, seen_s = self._watched.latest
        try:
            policy.reset()
        except Exception as error:
            self._reasons.add("policy_error", error)
            return
        first = Inference(policy, asynchronous=False, clock=self._clock)
        first.ask(obs, step=0, seen_s=seen_s)
        answer = first.fetch()
        if answer is not None and answer.chunk is not None:
            check_chunk(answer.chunk, self._robot.action_spec)
            self.chunk_size = len(answer.chunk)
            if self._config.join == "rtc":  # the guided way is another, and as slow the first time
                self.plan.install(answer.chunk, asked_at_step=0, seen_s=seen_s)
                first.ask(obs, step=0, seen_s=seen_s, prefix=self.plan.left(1))
                first.fetch()
                self.plan.clear()
            policy.reset()  # one that remembers has not decided anything yet

    def converse(self, tick: int, *, running: bool, stopping: bool) -> None:
        """Fetch the policy's answer if there is one, and ask again when the plan has been played far enough. `running`:
        the last tick played the plan. `stopping`: the run is at its end, nothing is asked any more."""
        self.listen(tick)
        if self._time_to_ask(tick, running) and not self.inference.busy and not stopping and self.fault is None:
            assert self._watched.latest is not None
            self._ask(*self._watched.latest, tick)
            if not self._config.asynchronous:
                self.listen(tick)
        self.server_failed = self.server_failed or self.waiting_s() > self._config.server_timeout_s

    def waiting_s(self) -> float:
        """Seconds since the oldest open question was asked, without those in which nothing ran; 0 without one."""
        return max(0.0, self.inference.waiting_s() - self._lapsed_s)

    def lapse(self, seconds: float, rest: tuple[float, ...], tick: int) -> None:
        """Nothing ran for so long, with the robot at `rest`: drop the plan, and the answers that are under way."""
        self.plan.restart(rest)
        self._begun_at_tick = tick
        self._lapsed_s += seconds

    def listen(self, tick: int) -> None:
        """Fetch the policy's answer if there is one."""
        answer = self.inference.fetch()
        if answer is not None:
            self._lapsed_s = 0.0
            self._take(answer, tick)

    def _ask(self, obs: Observation, seen_s: float, tick: int) -> None:
        going_on = self._config.join == "rtc" and self.plan.remaining > 0
        prefix = self.plan.left(self.delay.steps) if going_on else None
        self._asked_at_ticks.append(tick)
        self._last_asked_at_tick = tick
        # of a simulated robot that plays one after another; and somebody else's moving it ends an episode, too
        scene = getattr(self._robot, "scenes", 0) + self._begun_anew
        self.inference.ask(obs, step=self.plan.step, seen_s=seen_s, prefix=prefix, scene=scene)

    def _take(self, answer: Answer, tick: int) -> None:
        asked_at_tick = self._asked_at_ticks.popleft()
        if answer.account is not None:
            self.tell(answer.account)
        error = answer.error
        if error is None:
            try:
                check_chunk(answer.chunk, self._robot.action_spec)
            except ValueError as misfit:
                error = misfit
        if error is None:
            self.server_failed = False
            self.latencies.append(answer.seconds)
            assert answer.chunk is not None
            self.chunk_size = len(answer.chunk)
            if asked_at_tick < self._begun_at_tick:
                return
            if not self._hold_for(answer):
                late = self.plan.install(answer.chunk, asked_at_step=answer.asked_at_step, seen_s=answer.seen_s)
                self.delays[late] += 1
            # Held ticks count here as if they had been played: a robot that ran dry must learn to ask earlier.
            self.delay.add(math.ceil((tick - asked_at_tick) / self._ticks_per_step))
            return
        if isinstance(error, OSError):  # ConnectionError, TimeoutError: the server is gone, maybe not for good
            self.server_failed = True
            self._reasons.add("dead_server", error)
        else:
            self.fault = "nonfinite_action" if isinstance(error, FloatingPointError) else "policy_error"
            self._reasons.add(self.fault, error)
            if self._log is not None:
                self._log.event(error=self._reasons.error)

    def tell(self, account: Said) -> None:
        """Write what the policy says it does to the log of the run and the program's."""
        _log.info("the policy says: %s (confidence %.2f)", account.text, account.confidence)
        if self._log is not None:
            self._log.event(account=asdict(account))

    def _hold_for(self, answer: Answer) -> bool:
        """True if the answer is not to be played, because the policy does not see what its instruction names."""
        told = None if answer.confidence is None else np.array([answer.confidence])
        ungrounded = self._sight is not None and bool(self._sight.holds(told, [answer.instruction])[0])
        if ungrounded:
            self.plan.clear()  # what is left of it is for another instruction
            reason = (
                f"nothing in sight is what {shortened(answer.instruction)} names: confidence {answer.confidence:.3f}, "
                f"threshold {self._config.hold_below:.3f}"
            )
            self._reasons.by_guard["not_grounded"] = reason
            if self._log is not None and not self.ungrounded:
                self._log.event(not_grounded=reason)
        self.ungrounded = ungrounded
        return ungrounded

    def _time_to_ask(self, tick: int, running: bool) -> bool:
        """Early enough that the robot does not run dry before the answer comes; several questions evenly apart."""
        if self._watched.latest is None:
            return False
        now, config = self._clock(), self._config
        if not now - self._watched.latest[1] <= config.guards.max_observation_age_s:
            return False  # nothing would be played that answers it
        if not running and now - self.plan.seen_s > config.guards.max_action_age_s / 2:
            self.plan.clear()  # it has grown old while the robot held: it would not be played, and nothing be asked
        played, late = config.n_action_steps or (self.chunk_size + 1) // 2, self.delay.steps
        if self.ungrounded and tick - self._last_asked_at_tick < played * self._ticks_per_step:
            return False  # look again as often as if it moved
        if self.plan.remaining > max(self.chunk_size - played, late if config.asynchronous else 0):
            return False
        apart = late * self._ticks_per_step / config.in_flight
        return not self._asked_at_ticks or tick - self._last_asked_at_tick >= apart


def _join(config: ControlConfig) -> Join:
    if config.join == "ensemble":
        return Ensemble(config.ensemble_decay)
    return Blend(config.blend_steps if config.join == "blend" else 0)
