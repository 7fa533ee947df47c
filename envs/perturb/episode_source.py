"""Perturbed episodes for every backend: the other modules of `envs.perturb` draw, this hands their draws out."""

from __future__ import annotations

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.perturb.appearance import edit_spec, model_fields
from envs.perturb.perturbation import Perturbation, perturb_episode, perturb_start
from envs.perturb.sensors import noisy_proprio, observed
from envs.tabletop.control import ControlConfig
from envs.tabletop.episode_source import EpisodeSource
from envs.tabletop.episodes import Episode
from envs.tabletop.initial_state import Start
from envs.tabletop.language import Phrasings
from envs.tabletop.scene import SceneIndex, build
from envs.tabletop.suites import Suite


class PerturbedEpisodeSource(EpisodeSource):
    """An `EpisodeSource` that differs from the plain one by a `Perturbation`; by nothing where every severity is 0."""

    def __init__(
        self,
        suite: Suite,
        *,
        perturb: Perturbation,
        phrasings: Phrasings = "train",
        control: ControlConfig | None = None,
    ) -> None:
        """ValueError for a severity outside 0..1."""
        if problem := perturb.problem():
            raise ValueError(problem)
        super().__init__(suite, phrasings=phrasings, control=control)
        self.perturb = perturb
        self.varies_model = perturb.any()
        self.noisy = any(map(perturb.on, ("noise", "motion", "compression")))
        self.shadows = perturb.on("shadows")

    def build(self) -> tuple[mujoco.MjModel, SceneIndex]:
        """See `EpisodeSource.build`."""
        return build(self.scene, edit=lambda spec: edit_spec(self.perturb, spec))

    def sample(self, seed: int, task: str | None = None) -> Episode:
        """See `EpisodeSource.sample`."""
        episode = super().sample(seed, task)
        kinds = (self.scene.objects[slot] for slot in episode.slots)
        things = [f"the {color} {kind}" for color, kind in zip(episode.colors, kinds, strict=True)]
        return perturb_episode(self.perturb, episode, things)

    def initial_state(self, episode: Episode, model: mujoco.MjModel, index: SceneIndex) -> Start:
        """See `EpisodeSource.initial_state`."""
        start = super().initial_state(episode, model, index)
        return perturb_start(self.perturb, start, episode, model, index)

    def model_fields(
        self, episode: Episode, start: Start, model: mujoco.MjModel, index: SceneIndex
    ) -> dict[str, NDArray]:
        """See `EpisodeSource.model_fields`."""
        rgba = model.geom_rgba.copy()
        rgba[index.colored_geom] = start.rgba
        return model_fields(self.perturb, model, rgba, episode.seed)

    def observed_images(self, images: NDArray[np.uint8], episode: Episode, step: int) -> NDArray[np.uint8]:
        """See `EpisodeSource.observed_images`."""
        return observed(self.perturb, images, episode.seed, step)

    def observed_proprio(self, proprio_P: NDArray[np.float32], episode: Episode, step: int) -> NDArray[np.float32]:
        """See `EpisodeSource.observed_proprio`."""
        return noisy_proprio(self.perturb, proprio_P, episode.seed, step)
