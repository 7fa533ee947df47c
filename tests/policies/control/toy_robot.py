"""A small robot, a clock and a policy of numbers: what the tests of the control loop are played on."""

import time

import numpy as np

from policies.control.controller import ControlConfig, control
from policies.control.guards import GuardConfig
from vla.core.types import ActionSpec, Observation, PolicySpec

HZ = 50.0
SPEC = ActionSpec(("x", "dy", "gripper"), (-1.0, -0.5, -1.0), (1.0, 0.5, 1.0), HZ)
KINDS = ("position", "displacement", "switch")


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Slide:
    """Two axes and a gripper that do at once what they are told. `on_tick(robot)` runs at every observation."""

    action_spec, kinds, proprio_names = SPEC, KINDS, ("x", "y")

    def __init__(self, clock=time.monotonic, on_tick=None):
        self.clock, self.on_tick = clock, on_tick
        self.position, self.sent, self.times, self.seen_s = np.zeros(2, np.float32), [], [], None
        self.looks, self.connected, self.done = 0, False, False

    def connect(self):
        self.connected = True

    def observe(self):
        self.looks += 1
        if self.on_tick is not None:
            self.on_tick(self)
        images = {"front": np.zeros((1, 4, 4, 3), np.uint8)}
        seen_s = self.clock() if self.seen_s is None else self.seen_s
        return Observation(images, self.position[None].copy(), ["go"]), seen_s

    def rest(self):
        return (float(self.position[0]), 0.0, 1.0)

    def send(self, action_A):
        assert self.connected, "a robot that was let go was sent an action"
        self.sent.append(action_A.copy())
        self.times.append(self.clock())
        self.position = np.array([action_A[0], self.position[1] + action_A[1]], np.float32)

    def disconnect(self):
        self.connected = False

    def speeds(self):
        """Per tick, of x and y: what a person standing near would see."""
        actions = np.array(self.sent)
        return np.abs(np.stack([np.diff(actions[:, 0], prepend=0.0), actions[:, 1]], 1))


class Says:
    """A policy: `chunk` (C, A), or what it returns for the number of the question (exceptions are raised)."""

    def __init__(self, chunk, spec=PolicySpec()):
        self.chunk, self.spec, self.asked = chunk, spec, 0

    def reset(self, env_ids=None):
        pass

    def act(self, obs):
        self.asked += 1
        chunk = self.chunk(self.asked) if callable(self.chunk) else self.chunk
        if isinstance(chunk, Exception):
            raise chunk
        return np.array(chunk, np.float32)[None]


STEADY = [[0.1, 0.01, -1.0]] * 8


def drive(policy, robot=None, log=None, *, on_tick=None, seconds=1.0, guards=None, **config):
    """One run in simulated time, the policy answering inside the loop."""
    clock = Clock()
    robot = robot or Slide(clock, on_tick)
    settings = ControlConfig(duration_s=seconds, asynchronous=False, guards=guards or GuardConfig(), **config)
    policy = policy if hasattr(policy, "act") else Says(policy)
    report = control(robot, policy, settings, log=log, clock=clock, sleep=clock.sleep)
    assert not robot.connected
    return robot, report


class WorldRobot:
    """One simulated environment as a robot. Each `send` runs one control step and renders the next observation."""

    def __init__(self, env, *, seed, proprio_names=()):
        self._env, self._seed, self.action_spec = env, seed, env.action_spec
        self.kinds = tuple("switch" if name == "gripper" else "displacement" for name in env.action_spec.names)
        self.proprio_names = tuple(proprio_names)
        self.done = False

    def connect(self):
        self._see(self._env.reset(seeds=[self._seed]))

    def observe(self):
        return self._latest, time.monotonic()  # never stale: the simulation stands still between two calls of `send`

    def rest(self):
        return tuple(1.0 if kind == "switch" else 0.0 for kind in self.kinds)

    def send(self, action_A):
        result = self._env.step_chunk(np.asarray(action_A, np.float32)[None, None])
        self._see(result.obs)
        self.done = self.done or bool(result.terminated[0] or result.truncated[0])

    def disconnect(self):
        self._env.close()

    def _see(self, obs):
        # Without the simulator's state: a policy on a robot has no such thing.
        self._latest = Observation(obs.images, obs.proprio, obs.instruction)
