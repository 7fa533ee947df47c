"""From the flags of a command to a robot that is not connected yet: LeRobot's, or a class of the user's own."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any


def arm_of(flags: Any) -> Any:
    """LeRobot's robot, not connected; None for the simulated one and for a class of the user's own. `flags`: a command
    with `robot`, `robot_args`, `limits`, `switches` and `hz`, as `vla control` explains them. ValueError for flags on
    components that the robot does not have."""
    if flags.robot is None or ":" in flags.robot:
        return None
    from policies.control.config import limits_by_name
    from policies.control.robots import lerobot_robot

    robot = lerobot_robot(flags.robot, flags.robot_args)
    names = tuple(robot.action_features)
    for option, named in (("--limits", limits_by_name(flags.limits, "--limits")), ("--switches", flags.switches)):
        if foreign := [name for name in named if name not in names]:
            raise ValueError(f"{option}: {flags.robot} has no component '{foreign[0]}'; it has {', '.join(names)}")
    return robot


def robot_of(flags: Any, policy: Any, arm: Any, *, instruction: str) -> Any:
    """The `policies.control.robots.Robot` that `policy` drives: `arm` (`arm_of`), its components in the policy's order,
    or a class of the user's own. `flags` as of `arm_of`. ValueError where they do not fit."""
    if arm is None:
        from policies.control.watched_robot import own_robot

        assert flags.robot is not None
        return own_robot(flags.robot, flags.robot_args, hz=flags.hz)
    from policies.control.config import limits_by_name
    from policies.control.robots import LeRobotRobot, state_names
    from vla.core.compatibility import fit, unnamed
    from vla.core.types import PolicySpec
    from vla.runtime.console import say

    spec, actions, state = policy.spec.action_spec, list(arm.action_features), state_names(arm)
    told = PolicySpec(_unbounded(actions), proprio_dim=len(state), proprio_names=tuple(state))
    found = fit(policy.spec, told, where="robot", rates=False, ranges=False)
    for notice in found.notices:
        say(notice)
    if (order := found.action_order) is not None:  # of the policy's components, by the robot's places
        actions = [name for _, name in sorted(zip(order, actions, strict=True))]
    if found.proprio_order is not None:
        state = [state[place] for place in found.proprio_order]
    ranges = () if spec is None or unnamed(spec.names) else zip(spec.low, spec.high, strict=True)
    limits = dict(zip(actions, ranges, strict=False))  # by their places: dx of a policy is dx.vel of a robot
    limits |= limits_by_name(flags.limits, "--limits")
    return LeRobotRobot(
        arm,
        instruction=instruction,
        control_hz=flags.hz or 50.0,
        limits=limits,
        switches=flags.switches,
        cameras=policy.spec.cameras,
        action_names=actions,
        proprio_names=state,
    )


def teleop_of(flags: Any) -> Any:
    """The teleoperator of a command with `teleop`, `teleop_args`, `robot` and `suite`, not connected; None without, and
    for the simulated robot's own corrector. ValueError for one that there is not."""
    from policies.teleop.simulated import CORRECTOR

    if flags.teleop == CORRECTOR:
        from envs.experts.corrector import check_corrected

        if flags.robot is not None or flags.teleop_args:
            wrong = "--teleop-args" if flags.teleop_args else "--robot"
            raise ValueError(f"--teleop {CORRECTOR} is a script beside the simulated robot: leave out {wrong}")
        check_corrected(flags.suite)
        return None
    if flags.teleop is None:
        return None
    from policies.teleop.teleoperators import lerobot_teleoperator, own_teleoperator

    return (own_teleoperator if ":" in flags.teleop else lerobot_teleoperator)(flags.teleop, flags.teleop_args)


def person_of(flags: Any, teleop: Any, robot: Any, guards: Any) -> Any:
    """The `policies.control.playback.Person` with a teleoperator (`teleop_of`) at this robot; None without one. `flags`
    as of `teleop_of`, and `take_over`. ValueError where the two do not fit, or nobody could press the key."""
    if flags.teleop is None:
        return None
    from policies.teleop.simulated import SimulatedCorrector
    from policies.teleop.takeover import TakeOver
    from vla.runtime.console import say

    person = TakeOver(teleop or SimulatedCorrector(robot), robot, guards, by=flags.take_over)
    if person.by == "key":
        if sys.stdin is None or not sys.stdin.isatty():
            raise ValueError(
                f"{flags.teleop} has no event, so one takes over by the space bar, and there is no terminal to press "
                "it in: run it in one, or choose --take-over motion"
            )
        say("space: take over, and hand back; any other key: emergency stop")
    return person


def _unbounded(names: Iterable[str]) -> Any:
    """The actions of a robot whose limits are not known yet."""
    from vla.core.types import ActionSpec

    return ActionSpec(tuple(names), *((bound,) * len(tuple(names)) for bound in (-math.inf, math.inf)), 0.0)
