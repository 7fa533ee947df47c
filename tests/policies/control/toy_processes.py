"""A policy and a world for other processes to build: no torch, no simulator."""

import os
import time

import numpy as np

from vla.core.types import ActionSpec, Observation, PolicySpec, StepResult
from vla.language.talking import Said

SPEC = ActionSpec(("dx", "gripper"), (-1.0, -1.0), (1.0, 1.0), 20.0)


class Steady:
    """Says where the hand is, and which process says it; thinks for `seconds` without letting go of the lock."""

    spec = PolicySpec(SPEC, n_action_steps=4, takes_prefix=True)

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def reset(self, env_ids=None):
        pass

    def act(self, obs, *, prefix=None):
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            pass
        if obs.instruction[0] == "die":
            os._exit(3)
        if obs.instruction[0] == "fail":
            raise KeyError("camera")
        return np.full((1, 8, 2), 0.25 if prefix is None else 0.25 + prefix.delay[0], np.float32)


class Sure:
    """A policy whose grounding confidence, 0 to 1, is always `confidence`."""

    spec = PolicySpec(SPEC, grounding_threshold=0.5)

    def __init__(self, confidence):
        self._told = confidence

    def act(self, obs):
        self.confidence = np.full(1, self._told, np.float32)
        return np.zeros((1, 8, 2), np.float32)


class Plain:
    """One that cannot be told what is still to be played."""

    spec = PolicySpec(SPEC)

    def act(self, obs):
        return np.zeros((1, 8, 2), np.float32)


def broken():
    raise ValueError("no such checkpoint")


class World:
    """A hand on a line: over when it is 2.0 away from where it began, which is a success."""

    num_envs, action_spec, cameras, proprio_dim = 1, SPEC, ("front",), 3

    def __init__(self, stall_s=0.0):
        self.stall_s = stall_s

    def reset(self, *, seeds, tasks=None, env_ids=None):
        self.x, self.gripper, self.seed = 0.0, 1.0, seeds[0]
        self.told = f"scene {self.seed}" if tasks is None else f"{tasks[0]} in scene {self.seed}"
        return self._see()

    def step_chunk(self, chunk):
        time.sleep(self.stall_s)
        assert np.abs(chunk[0, 0]).max() <= 1.0 + 1e-6
        self.x, self.gripper = self.x + float(chunk[0, 0, 0]), float(chunk[0, 0, 1])
        over = np.array([abs(self.x) >= 2.0 - 1e-6])
        none = np.zeros(1, bool)
        return StepResult(self._see(), np.zeros(1, np.float32), over, none, np.ones(1, np.int64), {"success": over})

    def _see(self):
        pixels = np.full((1, 8, 8, 3), int(abs(self.x) * 100) % 256, np.uint8)
        proprio = np.array([[self.x, self.gripper, self.seed]], np.float32)
        return Observation({"front": pixels}, proprio, [self.told])

    def close(self):
        pass


class Ticking(World):
    """Counts its steps in the last component of the state."""

    def step_chunk(self, chunk):
        self.seed += 1
        return super().step_chunk(chunk)


class Talks(Steady):
    """Says what it is asked again, a letter a step, each of which takes `letter_s` seconds; fails to speak where the
    instruction is "crash"."""

    spec = PolicySpec(SPEC, n_action_steps=4, talks=True)

    def __init__(self, letter_s=0.0):
        super().__init__()
        self.letter_s = letter_s

    def speech(self, obs, questions):
        if obs.instruction[0] == "crash":
            raise RuntimeError("no voice")
        return Letters(questions[0], self.letter_s)

    def answer(self, obs, questions):
        return [Said(text, 0.5) for text in questions]


class Letters:
    def __init__(self, text, letter_s):
        self.text, self.letter_s, self.told = text, letter_s, 0

    def step(self):
        time.sleep(self.letter_s)
        self.told += 1
        return self.told == len(self.text)

    def said(self):
        return [Said(self.text[: self.told], 0.75)]


class Advised(World):
    """An environment for another process whose corrector takes over from the third step on."""

    steps = 0

    def step_chunk(self, chunk):
        self.steps += 1
        return super().step_chunk(chunk)

    def advice(self):
        return np.array([self.steps >= 3, 0.5, -1.0], np.float32)
