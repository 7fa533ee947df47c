"""A policy at the controls of a robot: a fixed-rate loop with guards on every action and a black box of every tick.

Deadlines are on the monotonic clock. A tick that overruns is counted, and the next one comes a whole period after it:
missed ticks are never made up in a burst.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

from policies.control.config import (
    JOINS,
    ControlConfig,
    ControlReport,
    check_estop_file,
    check_limits,
    is_pressed,
    ticks_per_step,
)
from policies.control.flight_log import BlackBox
from policies.control.guards import Governor
from policies.control.loop import ControlLoop
from policies.control.playback import Asking, Inference, Person
from policies.control.robots import Robot
from policies.control.watched_robot import NOT_LET_GO, WatchedRobot, check_robot
from vla.core.config import lookup
from vla.core.grounding import threshold_of
from vla.core.types import Policy

_log = logging.getLogger(__name__)


def control(
    robot: Robot,
    policy: Policy,
    config: ControlConfig,
    *others: Policy,
    log: BlackBox | None = None,
    pressed: Callable[[], bool] = lambda: False,
    asking: Asking | None = None,
    person: Person | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ControlReport:
    """Connect, drive, and disconnect whatever happens. `pressed` says whether an e-stop key was. `others`: further
    connections to the policy, in_flight - 1 of them. `asking`: where the chunks come from, if not from the policy,
    which then only warms up. `person`: somebody with a teleoperator, who may take over. `interrupted` says whether a
    KeyboardInterrupt was raised, which the robot's driver may have caught.

    Whatever the robot, its cameras, the policy or its server do ends in a report; an interrupt that could not let the
    robot go says so (KeyboardInterrupt with a message). ValueError for a configuration that does not fit the robot or
    the policy.
    """
    check_robot(robot)
    config = replace(config, n_action_steps=config.n_action_steps or policy.spec.n_action_steps)
    ticks_per_step(robot.action_spec.control_hz, config.policy_hz)
    if not (math.isfinite(config.duration_s) and config.duration_s > 0):
        raise ValueError(f"duration_s must be positive, got {config.duration_s}")
    check_estop_file(config.estop_file)
    if (chunk := policy.spec.chunk_size) is not None and not 1 <= (config.n_action_steps or 1) <= chunk:
        raise ValueError(f"n_action_steps must be in 1..{chunk} (the chunk size), got {config.n_action_steps}")
    lookup(config.join, dict.fromkeys(JOINS), "join")
    if config.join == "rtc" and not policy.spec.takes_prefix:
        raise ValueError("rtc needs a flow head that can be told what is still to be played: choose the join blend")
    if config.hold_below is not None:
        threshold_of(policy)  # refuses a policy that tells no confidence
    if config.in_flight != 1 + len(others) or (others and (config.join == "rtc" or not config.asynchronous)):
        raise ValueError(
            "in_flight counts the connections to one policy: give as many, only asynchronous, and not with join rtc, "
            "which must know the answer before it asks again"
        )
    if policy.spec.memory_frames and (others or config.n_action_steps != policy.spec.n_action_steps):
        raise ValueError(
            f"this policy remembers its decisions, {policy.spec.n_action_steps} steps apart: leave out n_action_steps "
            "and in_flight"
        )
    if policy.spec.routes and others:
        raise ValueError(
            "this policy chooses at its first decision how to act, and every connection would choose for itself: leave "
            "out in_flight"
        )
    unknown = (math.nan,) * len(robot.kinds)
    Governor(config.guards, robot.action_spec, robot.kinds, rest=unknown, proprio_names=robot.proprio_names)  # refuses
    check_limits(config.guards, robot.action_spec, robot.kinds)
    watched = WatchedRobot(robot, clock)
    with watched.told_when_stuck(config.guards.give_up_s):
        try:
            report = _drive(
                watched, robot, (policy, *others), config, log, pressed, asking, person, interrupted, clock, sleep
            )
        except BaseException as ended:  # no report will tell how the robot was left
            if (problem := _let_go(watched)) is not None and isinstance(ended, KeyboardInterrupt):
                raise KeyboardInterrupt(problem) from ended
            if problem is not None:
                _log.error("%s", problem)
            raise
        problem = _let_go(watched)
    if problem is not None:
        report = replace(report, error=problem, reasons={**report.reasons, "disconnect": problem})
    return report


def _let_go(watched: WatchedRobot) -> str | None:
    """Disconnect the robot, once more if an interrupt cut that short; the error message if that failed."""
    problem = watched.disconnect()
    return watched.disconnect() if problem == NOT_LET_GO else problem


def _drive(
    watched: WatchedRobot,
    robot: Robot,
    policies: tuple[Policy, ...],
    config: ControlConfig,
    log: BlackBox | None,
    pressed: Callable[[], bool],
    asking: Asking | None,
    person: Person | None,
    interrupted: Callable[[], bool],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> ControlReport:
    """Connect, wait until the robot says where it is, warm the policy up, and tick."""

    def until_known(look: Callable[[], tuple[float, ...] | None]) -> tuple[float, ...] | None:
        """Where the robot is. None: it did not say so for `give_up_s`, is lost, or the e-stop was pressed."""
        until = clock() + config.guards.give_up_s
        while not watched.lost and not is_pressed(pressed, config.estop_file):
            rest = look()
            _heed(interrupted)
            if rest is not None:
                return rest
            if clock() > until:
                break
            sleep(1.0 / robot.action_spec.control_hz)
        return None

    unknown = tuple(math.nan for _ in robot.kinds)
    rest = None
    # The file alone: keys are listened to once it is connected, which may ask for some itself.
    if not is_pressed(lambda: False, config.estop_file) and watched.connect() and (person is None or person.connect()):
        rest = until_known(lambda: watched.rest() if watched.observe() else None)
    inference = asking or Inference(*policies, asynchronous=config.asynchronous, clock=clock)
    try:
        loop = ControlLoop(
            robot, inference, config, log=log, pressed=pressed, clock=clock, rest=rest or unknown, watched=watched,
            person=person,
        )  # fmt: skip
        if rest is not None:
            loop.policy.warm_up(policies[0])
            rest = until_known(watched.rest)  # it may have sunk meanwhile
        loop.start(rest or unknown)
        if rest is None:
            loop.give_up()
            return loop.report()
        return _run(loop, sleep, interrupted)
    finally:
        inference.close()
        if person is not None:
            person.disconnect()


def _heed(interrupted: Callable[[], bool]) -> None:
    """KeyboardInterrupt once more, where a driver has caught it."""
    if interrupted():
        raise KeyboardInterrupt


def _run(loop: ControlLoop, sleep: Callable[[float], None], interrupted: Callable[[], bool]) -> ControlReport:
    """Tick at the robot's rate. The garbage collector waits: a pause of its kind is a missed deadline."""
    clock, dt = loop.clock, loop.dt
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        loop.watched.begin()
        deadline = loop.start()
        while not loop.ended and deadline - loop.started < loop.config.duration_s - dt / 2:
            loop.tick(deadline)
            _heed(interrupted)
            deadline += dt
            left = deadline - clock()
            if left < 0 and not loop.ended:
                loop.overruns += 1
                deadline, left = clock() + dt, dt
            if left > dt:  # the clock was set back: a robot must not be left alone for that long
                deadline, left = clock() + dt, dt
            if not loop.ended:
                sleep(left)
    except Exception as error:  # a mistake of ours: the robot is let go all the same, and the run is reported
        _log.exception("the control loop failed")
        loop.fail(error)
    finally:
        if collecting:
            gc.enable()
    return loop.report()
