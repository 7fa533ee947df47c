"""What a seed means and the state in which its episode begins: the same on every backend; and under a perturbation."""

from __future__ import annotations

from typing import Any

import mujoco

from envs.perturb.perturbation import Perturbation, edit_spec, perturb_episode, perturb_start
from envs.tabletop.control import ControlConfig
from envs.tabletop.episodes import Episode, sample_episode
from envs.tabletop.initial_state import Start, begin
from envs.tabletop.language import Phrasings
from envs.tabletop.scene import SceneConfig, SceneIndex, build
from envs.tabletop.suites import Suite


class Opening:
    """Base of the tabletop's worlds, on the CPU and on a device."""

    suite: Suite
    scene: SceneConfig
    phrasings: Phrasings
    control: ControlConfig
    model: mujoco.MjModel
    index: SceneIndex

    def _build(self) -> tuple[mujoco.MjModel, SceneIndex]:
        return build(self.scene)

    def _sample(self, seed: int, task: str | None) -> Episode:
        return sample_episode(self.suite, self.scene, seed, task=task, phrasings=self.phrasings)

    def _begin(self, episode: Episode, arm_noise: float) -> Start:
        width = self.control.finger_open_m
        return begin(episode, self.scene, self.model, self.index, finger_open_m=width, arm_noise=arm_noise)


class PerturbedOpening(Opening):
    """To be put in front of such worlds: they differ from plain ones by `perturb`, by nothing where it is 0."""

    def __init__(self, suite: Suite, num_worlds: int, *, perturb: Perturbation, **options: Any) -> None:
        if problem := perturb.problem():
            raise ValueError(problem)
        self.perturb = perturb
        super().__init__(suite, num_worlds, **options)  # type: ignore[call-arg]  # of the worlds behind

    def _build(self) -> tuple[mujoco.MjModel, SceneIndex]:
        return build(self.scene, edit=lambda spec: edit_spec(self.perturb, spec))

    def _sample(self, seed: int, task: str | None) -> Episode:
        return perturb_episode(self.perturb, super()._sample(seed, task))

    def _begin(self, episode: Episode, arm_noise: float) -> Start:
        return perturb_start(self.perturb, super()._begin(episode, arm_noise), episode, self.model, self.index)
