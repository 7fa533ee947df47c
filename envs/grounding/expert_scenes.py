"""Grounding scenes from rollouts of a noisy expert: states as a policy meets them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from envs.adapters.adapter_worlds import AdapterWorlds
from envs.adapters.robosuite_suites import RobosuiteSuite
from envs.experts.registry import make_expert
from envs.experts.script import NOISE_CORRELATION
from envs.grounding.scene_sampler import Question, SceneSampler
from envs.make import worlds_class
from envs.perturb.borrowed_models import BorrowedLooks
from envs.perturb.perturbation import Perturbation
from envs.perturb.sensors import observed
from envs.sim.render_options import RenderOptions
from vla.core.types import IMAGE_SIZE, ActionChunk, ActionSpec

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


class PlayedSampler(SceneSampler):
    """Moments of an expert's episodes, several of each, since control steps of other simulators are dear."""

    surfaces: tuple[str, ...]
    """Bodies that are table, floor and walls: randomised, they have other colours and patterns."""
    _NEW_EPISODE = 0.15
    _STEPS = 9

    def __init__(
        self,
        suite: Any,
        image_size: int = IMAGE_SIZE,
        perturb: Perturbation | None = None,
        *,
        worlds: Callable[..., AdapterWorlds] | None = None,
    ) -> None:
        """`perturb`: randomises every scene's look, by the scene's generator. `worlds`: makes the environments, where
        they are not those of `envs.make.worlds_class`."""
        self.suite, self.perturb = suite, perturb if perturb is not None and perturb.any() else None
        made = (worlds or worlds_class(suite))(suite, 1, render=RenderOptions(image_size, calibration=True))
        self.worlds: AdapterWorlds = made
        self.expert = make_expert(suite.name, 1)
        self._hand: NoisyExpert | None = None
        self._looks: dict[str, BorrowedLooks] = {}

    def restart(self) -> None:
        """See `SceneSampler.restart`."""
        self._hand = None

    def scene(self, rng: np.random.Generator) -> list[Question]:
        """See `SceneSampler.scene`."""
        w = self.worlds
        w.render_images = False
        if self._hand is None or w.over[0] or rng.random() < self._NEW_EPISODE:
            w.reset(seeds=[int(rng.integers(w.suite.eval_seed0))])
            self.expert.reset()
            self._hand = NoisyExpert(rng, w.action_spec)
        for _ in range(rng.integers(1, self._STEPS)):
            if not w.over[0]:
                w.step_chunk(self._hand(self.expert.act(w.observation())))
        w.render_images = True
        self._look(rng)
        return self._questions(rng)

    def _look(self, rng: np.random.Generator) -> None:
        """Take the pictures, randomised if they are to be; `rng`'s own draws stay as they are for plain ones."""
        w = self.worlds
        if self.perturb is None:
            w._render([0])
            return
        seed = int(rng.spawn(1)[0].integers(1 << 31))
        name, model, _ = w._scene(0)
        if name not in self._looks:
            self._looks[name] = BorrowedLooks(model, self.surfaces, self.centre_m[2])
        w.renew_textures(0, self._looks[name].wear(self.perturb, seed))
        w._render([0])
        w.images[0] = observed(self.perturb, w.images[0], seed, 0)

    @abstractmethod
    def _questions(self, rng: np.random.Generator) -> list[Question]:
        """Four instructions, where the thing is, whether it is held, what is, and what there is."""


class RobosuiteSampler(PlayedSampler):
    """Scenes of one robosuite task."""

    suite: RobosuiteSuite
    centre_m = (0.0, 0.0, 0.8)
    surfaces = ("world", "table", "bin1", "bin2")

    def grip(self) -> np.ndarray:
        """See `SceneSampler.grip`."""
        return self.worlds.proprio()[0, :3].astype(np.float64)

    def _questions(self, rng: np.random.Generator) -> list[Question]:
        """See `PlayedSampler._questions`."""
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
