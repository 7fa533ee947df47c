"""Teleoperators for tests: one that does what a script says, tick by tick."""

import enum

from policies.teleop.takeover import TakeOver


class Event(enum.Enum):
    """Events as LeRobot names them."""

    IS_INTERVENTION = "is_intervention"


class Hand:
    """A leader arm for the toy robot, with an event. `script(tick)` -> (takes over?, command by name); an exception is
    raised. Ticks count from 0."""

    action_features = dict.fromkeys(("x", "dy", "gripper"), float)

    def __init__(self, script=None):
        self.script, self.tick, self.connected = script, -1, False

    @property
    def is_connected(self):
        return self.connected

    def connect(self):
        self.connected = True

    def disconnect(self):
        self.connected = False

    def get_action(self):
        self.tick += 1
        self.takes, command = self.script(self.tick)
        if isinstance(command, Exception):
            raise command
        return command

    def get_teleop_events(self):
        return {Event.IS_INTERVENTION: self.takes}


class Still(Hand):
    """One without an event."""

    get_teleop_events = None


def person(script, robot, guards, make=Hand, **how):
    """Somebody at the toy robot."""
    return TakeOver(make(script), robot, guards, **how)
