"""Limits of a Franka arm, from its data sheet, and those within which a policy moves it."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ArmLimits:
    """The limits of one arm's end effector, elbow excluded, and of its gripper. libfranka aborts a motion beyond them.

    Source: Franka Robotics, FCI documentation, "Control interface specification and robot limits", limits in Cartesian
    space of the FR3 and of the FER (Panda), frankarobotics.github.io/docs; gripper: "Franka Hand product manual".
    """

    translation_m_s: float
    translation_m_s2: float
    translation_m_s3: float
    rotation_rad_s: float
    rotation_rad_s2: float
    rotation_rad_s3: float
    gripper_m_s: float = 0.1
    """Speed of the opening between the fingers, twice a finger's."""
    gripper_n: float = 70.0
    """Continuous grasping force."""


FR3 = ArmLimits(3.0, 9.0, 4500.0, 2.5, 17.0, 8500.0)
PANDA = ArmLimits(1.7, 13.0, 6500.0, 2.5, 25.0, 12500.0)
ARMS = {"fr3": FR3, "panda": PANDA}


@dataclass(frozen=True)
class MotionLimits:
    """The largest speed, acceleration and jerk of the hand that ruckig plans with, and the gripper's speed and force.

    Below the arm's own: a tabletop policy asks for 3 cm in 50 ms at most, and libfranka's smoothing of the commanded
    poses (100 Hz) makes jerks three times as large as those that were planned.
    """

    speed_m_s: float = 0.8
    acceleration_m_s2: float = 6.0
    jerk_m_s3: float = 1000.0
    turn_rad_s: float = 1.5
    turn_rad_s2: float = 8.0
    turn_rad_s3: float = 2000.0
    gripper_m_s: float = 0.1
    gripper_n: float = 30.0

    def refuse_beyond(self, arm: ArmLimits, name: str) -> None:
        """ValueError naming the first limit that is not positive, or beyond what the arm `name` can do."""
        for mine, theirs in zip(fields(self), fields(arm), strict=True):
            value, most = getattr(self, mine.name), getattr(arm, theirs.name)
            if not 0 < value <= most:
                raise ValueError(
                    f"{mine.name} must be above 0 and at most {most:g}, the limit of arm {name}: {value:g}"
                )
