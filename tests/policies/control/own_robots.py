"""Robots of a user's own, each with one mistake: what `--robot own_robots:CLASS` makes."""

import time

import numpy as np

from vla.core.types import ActionSpec, Observation

NAMES = ("dx", "dy", "gripper")


class Right:
    """A hand that does at once what it is told."""

    kinds, proprio_names, done = ("displacement", "displacement", "switch"), ("x", "y"), False
    low, high = (-1.0,) * 3, (1.0,) * 3

    def __init__(self, hz="50", clock=time.monotonic):
        self.action_spec = ActionSpec(NAMES, self.low, self.high, float(hz))
        self.clock, self.looks, self.sent, self.connected = clock, 0, [], False

    def connect(self):
        self.connected = True

    def observe(self):
        self.looks += 1
        images = {"front": np.zeros((1, 8, 8, 3), np.uint8)}
        return Observation(images, np.zeros((1, 2), np.float32), self.instruction()), self.clock()

    def instruction(self):
        return ["go"]

    def rest(self):
        return 0.0, 0.0, 1.0

    def send(self, action_A):
        self.sent.append(np.array(action_A))

    def disconnect(self):
        self.connected = False


class Reversed(Right):
    low, high = (1.0,) * 3, (-1.0,) * 3


class Swapped(Right):
    proprio_names = ("y", "x")
    kinds = ("switch", "displacement", "displacement")

    def __init__(self, hz="50"):
        super().__init__(hz)
        self.action_spec = ActionSpec(NAMES[::-1], self.low, self.high, float(hz))

    def rest(self):
        return 1.0, 0.0, 0.0


class NoSpec(Right):
    def __init__(self):
        pass


class NoDriver(Right):
    def __init__(self):
        import a_driver_that_is_not_installed  # noqa: F401


class Refuses(Right):
    def __init__(self, hz="50"):
        raise RuntimeError("motor 3\nis missing")


class DoesNotLetGo(Right):
    def disconnect(self):
        raise RuntimeError("torque off failed")


class Exits(Right):
    def __init__(self, hz="50"):
        raise SystemExit("no arm is plugged in")


class Leader:
    """A teleoperator of a user's own, without an event: it is moved for the first half second."""

    def __init__(self, far="0.5"):
        self.far = float(far)

    def connect(self):
        self.begun = None

    def get_action(self):
        self.begun = self.begun or time.monotonic()  # a loop on a busy machine begins long after it has connected
        moving = time.monotonic() - self.begun < 0.5
        return {"dx": self.far if moving else 0.0, "dy": 0.0, "gripper": 1.0}

    def disconnect(self): ...
