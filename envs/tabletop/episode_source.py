"""The source of a backend's scene, episodes and initial states: the same on a CPU and on a device."""

from __future__ import annotations

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.tabletop.control import ControlConfig
from envs.tabletop.episodes import Episode, sample_episode
from envs.tabletop.initial_state import Start, initial_state
from envs.tabletop.language import Phrasings
from envs.tabletop.scene import SCENES, SceneIndex, build
from envs.tabletop.suites import Suite


class EpisodeSource:
    """Scene, episodes and initial states of a tabletop suite; `envs.perturb.episode_source` varies them."""

    varies_model = False
    """True if environments differ in more than the colours of their objects: see `model_fields`."""
    noisy = False
    """True if `observed_images` and `observed_proprio` differ from their argument."""
    shadows = False
    """True if the lights cast shadows."""

    def __init__(self, suite: Suite, *, phrasings: Phrasings = "train", control: ControlConfig | None = None) -> None:
        self.suite, self.scene, self.phrasings = suite, SCENES[suite.scene], phrasings
        self.control = control or ControlConfig()

    def build(self) -> tuple[mujoco.MjModel, SceneIndex]:
        """Compile the scene. One model serves every episode."""
        return build(self.scene)

    def sample(self, seed: int, task: str | None = None) -> Episode:
        """The episode that `seed` means, of `task` if one is given. ValueError for a task that the suite lacks."""
        return sample_episode(self.suite, self.scene, seed, task=task, phrasings=self.phrasings)

    def initial_state(self, episode: Episode, model: mujoco.MjModel, index: SceneIndex) -> Start:
        """The simulator's state in which the episode begins."""
        width = self.control.finger_open_m
        return initial_state(episode, self.scene, model, index, finger_open_m=width)

    def model_fields(
        self, episode: Episode, start: Start, model: mujoco.MjModel, index: SceneIndex
    ) -> dict[str, NDArray]:
        """Values of MjModel's fields with which the episode is rendered, beyond the colours in `start`. `model`: as
        it was compiled."""
        return {}

    def observed_images(self, images: NDArray[np.uint8], episode: Episode, step: int) -> NDArray[np.uint8]:
        """The images (..., uint8) of control step `step` as a policy sees them."""
        return images

    def observed_proprio(self, proprio_P: NDArray[np.float32], episode: Episode, step: int) -> NDArray[np.float32]:
        """The robot state (P,) of control step `step` as a policy reads it."""
        return proprio_P
