"""The corrector of the simulated robot as a teleoperator: a script in a person's place, for tests and experiments."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from policies.control.realtime_sim import LiveWorld
from policies.teleop.teleoperators import per_tick

CORRECTOR = "corrector"
"""Its name on a command line."""


class SimulatedCorrector:
    """A `policies.teleop.teleoperators.Teleoperator` beside the simulated robot, with an event of its own."""

    lets_go_s = 0.0
    """Seconds without its event after which it has handed back: a script does not flicker as a hand does."""

    def __init__(self, robot: LiveWorld) -> None:
        """ValueError for a simulated robot whose environment has nobody who corrects."""
        if not robot.advises:
            raise ValueError("this simulated robot's environment has no corrector")
        self._robot = robot
        self._action: Mapping[str, float] = {}
        self._drives = False

    def connect(self) -> None:
        """It is there as soon as the robot is."""

    def disconnect(self) -> None:
        """Nothing is held."""

    def get_action(self) -> Mapping[str, float]:
        """See `Teleoperator.get_action`."""
        robot = self._robot
        self._drives, action = robot.advice
        # What it says answers what was seen up to two of the environment's steps ago: near its goal it takes half of
        # the way, or it would go to and fro.
        eased = action * np.where(np.array(robot.kinds) == "switch", 1.0, 0.5 + 0.5 * np.abs(action))
        return dict(zip(robot.action_spec.names, per_tick(robot.action_spec, robot.kinds, eased), strict=True))

    def get_teleop_events(self) -> Mapping[str, bool]:
        """Tell if it takes over, by LeRobot's name of that event."""
        return {"is_intervention": self._drives}
