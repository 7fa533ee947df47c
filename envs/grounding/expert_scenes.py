"""Grounding scenes from rollouts of a noisy expert: states as a policy meets them."""

from __future__ import annotations

import numpy as np

from envs.adapters.robosuite_suites import RobosuiteSuite
from envs.demos.episode import NOISE_CORRELATION
from envs.experts.registry import make_expert
from envs.grounding.scene_sampler import Question, SceneSampler
from envs.make import worlds_class
from envs.sim.render_options import RenderOptions
from vla.core.types import ActionChunk, ActionSpec

_SHAKES = (0.0, 0.15, 0.4)
"""Standard deviations of the noise on the motions, in units of the largest motion."""
_SLIP = 0.04
"""Chance per control step that the hand does the opposite for a moment: opens, or closes on nothing."""


class NoisyExpert:
    """Adds noise to an expert's chunks of one step: displaced motions, and a gripper that slips now and then."""

    def __init__(self, rng: np.random.Generator, spec: ActionSpec) -> None:
        self._rng, self._shake, self._slipping = rng, float(rng.choice(_SHAKES)), 0
        self._disturbance = rng.standard_normal(3)
        self._low, self._high = np.asarray(spec.low), np.asarray(spec.high)

    def __call__(self, chunk: ActionChunk) -> ActionChunk:
        """(1, 1, A), the first three components a displacement, the last the gripper."""
        rng, chunk = self._rng, np.array(chunk, np.float32)
        chunk[0, 0, :3] += self._shake * self._disturbance
        self._slipping = int(rng.integers(2, 6)) if rng.random() < _SLIP else max(0, self._slipping - 1)
        if self._slipping:
            chunk[0, 0, -1] *= -1
        fresh = rng.standard_normal(3)
        self._disturbance = NOISE_CORRELATION * self._disturbance + np.sqrt(1 - NOISE_CORRELATION**2) * fresh
        return np.clip(chunk, self._low, self._high).astype(np.float32)


class RobosuiteSampler(SceneSampler):
    """Scenes of one robosuite task: moments of episodes, several of each, since its control steps are dear."""

    centre_m = (0.0, 0.0, 0.8)
    _NEW_EPISODE = 0.15
    _STEPS = 9

    def __init__(self, suite: RobosuiteSuite, image_size: int = 84) -> None:
        self.suite = suite
        self.worlds = worlds_class(suite)(suite, 1, render=RenderOptions(image_size, calibration=True))
        self.expert = make_expert(suite.name, 1)
        self._hand: NoisyExpert | None = None

    def restart(self) -> None:
        """See `SceneSampler.restart`."""
        self._hand = None

    def scene(self, rng: np.random.Generator) -> list[Question]:
        """See `SceneSampler.scene`."""
        w = self.worlds
        if self._hand is None or w.over[0] or rng.random() < self._NEW_EPISODE:
            w.render_images = False
            w.reset(seeds=[int(rng.integers(w.suite.eval_seed0))])
            self.expert.reset()
            self._hand = NoisyExpert(rng, w.action_spec)
        w.render_images = False
        for _ in range(rng.integers(1, self._STEPS)):
            if not w.over[0]:
                w.step_chunk(self._hand(self.expert.act(w.observation())))
        w.render_images = True
        w._render([0])
        return self._questions(rng)

    def grip(self) -> np.ndarray:
        """See `SceneSampler.grip`."""
        return self.worlds.proprio()[0, :3].astype(np.float64)

    def _questions(self, rng: np.random.Generator) -> list[Question]:
        """Four instructions, where the thing is, whether it is held, what is, and what there is."""
        suite, things = self.suite, self.suite.things
        at, to = suite.named(self.worlds.privileged()[0].astype(np.float64))
        told = [suite.train[k] for k in rng.integers(len(suite.train), size=4)]
        fingers = float(np.abs(self.worlds.proprio()[0, 7:9]).sum())
        held = bool(np.linalg.norm(at - self.grip()) < 0.03 and fingers < 0.075)
        return [
            *(Question(text, "", at, to) for text in told),
            Question(f"where is {things[0]}", "", at),
            Question(f"is {things[0]} in the gripper", "yes" if held else "no", at),
            Question("what is in the gripper", things[0] if held else "nothing"),
            Question("describe the table", " and ".join(things)),
        ]
