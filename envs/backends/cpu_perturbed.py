"""Tabletop worlds under a perturbation, on the CPU: `envs.perturb.perturbation` draws, this puts it into the worlds."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.backends.cpu_worlds import Worlds
from envs.perturb.perturbation import Perturbation, model_fields, noisy_images, noisy_proprio
from envs.perturb.reset import PerturbedOpening
from envs.tabletop.episodes import Episode
from envs.tabletop.suites import Suite


class PerturbedWorlds(PerturbedOpening, Worlds):
    """`envs.backends.cpu_worlds.Worlds` that differ from them by a `Perturbation`; by nothing where every severity is
    0."""

    def __init__(self, suite: Suite, num_worlds: int, *, perturb: Perturbation, **options: Any) -> None:
        super().__init__(suite, num_worlds, perturb=perturb, **options)
        self._plain = copy.copy(self.model)
        """The model before any world wrote its own colours, lights and cameras into the shared one."""
        self._fields: list[dict[str, NDArray]] = [{} for _ in range(num_worlds)]

    def place(self, i: int, episode: Episode, *, start_noise: float = 1.0) -> None:
        super().place(i, episode, start_noise=start_noise)
        rgba = self._plain.geom_rgba.copy()
        rgba[self._geoms] = self._rgba[i]
        self._fields[i] = model_fields(self.perturb, self._plain, rgba, episode.seed)
        if "geom_rgba" in self._fields[i]:
            self._rgba[i] = self._fields[i]["geom_rgba"][self._geoms]

    def _render(self, ids: list[int]) -> None:
        for i in ids if self.render_images else ():
            for name, values in self._fields[i].items():
                if name == "headlight":
                    self.model.vis.headlight.ambient[:], self.model.vis.headlight.diffuse[:] = values
                else:
                    getattr(self.model, name)[:] = values
            super()._render([i])
            episode = self.episodes[i]
            self.images[i] = noisy_images(self.perturb, self.images[i], episode.seed, int(self.elapsed[i]))

    def proprio(self) -> NDArray[np.float32]:
        rows = super().proprio()
        for i, episode in enumerate(self.episodes):
            if episode is not None:
                rows[i] = noisy_proprio(self.perturb, rows[i], episode.seed, int(self.elapsed[i]))
        return rows
