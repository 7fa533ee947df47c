"""A tiny `DemoWorld` whose frames follow from (seed, step), importable by worker processes. Seeds 3, 8, 13... fail."""

import os
import signal
import time

import numpy as np

from vla.core.types import ActionSpec

SPEC = ActionSpec(("dx", "dy", "gripper"), (-0.5, -0.5, -1.0), (0.5, 0.5, 1.0), 20.0)
CAMERAS = ("front", "wrist")


def succeeds(seed):
    return seed % 5 != 3


def length(seed):
    return 4 + seed % 3


def frame(seed, step, camera, size):
    rng = np.random.default_rng([seed, step, CAMERAS.index(camera)])
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((size // 4, size // 4, 1), np.uint8))


def state(seed, step):
    return np.random.default_rng([seed, step, 7]).normal(size=4).astype(np.float32)


def wish(seed, step):
    """The expert's action, often beyond the bounds."""
    return np.random.default_rng([seed, step, 9]).normal(size=3).astype(np.float32)


class ToyWorld:
    action_spec, cameras, proprio_names, horizon = SPEC, CAMERAS, ("a", "b", "c", "d"), 50

    def __init__(self, size, pause_s=0.0, crash_at=None):
        self.size, self.pause_s, self.crash_at = size, pause_s, crash_at
        self.executed = []

    def reset(self, seed):
        if seed == self.crash_at:
            raise ZeroDivisionError("the world broke")
        self.seed, self.count, self.executed = seed, 0, []
        self.instruction = f"pick up object {seed % 2}"
        self.success = self.done = False
        self.buffer = {camera: np.zeros((self.size, self.size, 3), np.uint8) for camera in CAMERAS}

    def observe(self):
        for camera, image in self.buffer.items():  # the same memory every time, as renderers do
            image[:] = frame(self.seed, self.count, camera, self.size)
        return self.buffer, state(self.seed, self.count)

    def privileged(self):
        return np.array([self.seed, self.count], np.float32)

    def geometry(self):
        return None

    def exact_proprio(self):
        return None

    def expert_action(self):
        return wish(self.seed, self.count)

    def step(self, action):
        time.sleep(self.pause_s)
        self.executed.append(action)
        self.count += 1
        self.done = self.count == length(self.seed)
        self.success = self.done and succeeds(self.seed)

    def close(self):
        pass


def fast_world(suite, image_size):
    return ToyWorld(image_size)


def slow_world(suite, image_size):
    return ToyWorld(image_size, pause_s=0.03)


def breaking_world(suite, image_size):
    return ToyWorld(image_size, crash_at=4)


class DeadlyWorld(ToyWorld):
    """Kills its process in the middle of seed 4, as often as `deaths` allows (a file counts them)."""

    def __init__(self, size, counter, deaths):
        super().__init__(size)
        self.counter, self.deaths = counter, deaths

    def step(self, action):
        if self.seed == 4 and self.count == 2:
            with self.counter.open("a") as file:
                file.write("x")
            if self.counter.stat().st_size <= self.deaths:
                os.kill(os.getpid(), signal.SIGKILL)
        super().step(action)


def deadly_world(counter, deaths, suite, image_size):
    return DeadlyWorld(image_size, counter, deaths)


def choosy_world(suite, image_size):
    raise ValueError(f"unknown suite '{suite}'")


def hopeless_world(suite, image_size):
    world = ToyWorld(image_size)
    world.horizon = 2
    return world


class SeenInDepth(ToyWorld):
    """The same, with depth and calibration of its cameras."""

    def geometry(self):
        rng = np.random.default_rng([self.seed, self.count, 3])
        found = {}
        for camera in CAMERAS:
            depth = rng.uniform(0.2, 3.0, (self.size, self.size)).astype(np.float32)
            depth[0, 0], depth[0, 1] = np.inf, 0.0
            outer = np.eye(4, dtype=np.float32)
            outer[:3, 3] = rng.uniform(-1, 1, 3)
            found[camera] = (depth, np.diag([20.0, 21.0, 1.0]).astype(np.float32), outer)
        return found


def depth_world(suite, image_size):
    return SeenInDepth(image_size)
