"""Tabletop worlds under a perturbation, on one device: `envs.perturb.perturbation` draws, this puts it into the worlds.

What `envs.backends.cpu_perturbed` does on the CPU, from the same draws, but for the table's pattern: the ray caster
cannot texture a box, so a patterned table has its colour only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from envs.backends.warp_vec_env import WarpVecEnv
from envs.perturb.perturbation import model_fields, noisy_images, noisy_proprio
from envs.perturb.reset import PerturbedOpening
from envs.tabletop.episodes import Episode
from envs.tabletop.initial_state import Start


class PerturbedWarpVecEnv(PerturbedOpening, WarpVecEnv):
    """`envs.backends.warp_vec_env.WarpVecEnv` whose worlds differ from plain ones by a `Perturbation`."""

    def _paint(self, rows: torch.Tensor, episodes: Sequence[Episode], starts: Sequence[Start]) -> None:
        super()._paint(rows, episodes, starts)
        drawn = []
        for episode, start in zip(episodes, starts, strict=True):
            rgba = self.model.geom_rgba.copy()
            rgba[self.index.colored_geom] = start.rgba
            drawn.append(model_fields(self.perturb, self.model, rgba, episode.seed))
        for name in drawn[0].keys() - {"geom_matid"}:
            self._cameras.fields[name][rows] = self._float([fields[name] for fields in drawn])

    # Noise is drawn on the host, as on the CPU backend: the same numbers, at the price of a round trip.
    def render(self) -> None:
        super().render()
        if self._drawing and self.perturb.on("noise"):
            images = self._cameras.rgb.cpu().numpy()
            for i, seed, step in self._played():
                images[i] = noisy_images(self.perturb, images[i], seed, step)
            self._cameras.rgb.copy_(torch.as_tensor(images))

    def proprio(self) -> torch.Tensor:
        rows = super().proprio()
        if not self.perturb.on("noise"):
            return rows
        noisy = rows.cpu().numpy()
        for i, seed, step in self._played():
            noisy[i] = noisy_proprio(self.perturb, noisy[i], seed, step)
        return self._float(noisy)

    def _played(self) -> list[tuple[int, int, int]]:
        """(world, seed, control step) of every world that has an episode."""
        steps = self.elapsed.tolist()
        return [(i, e.seed, steps[i]) for i, e in enumerate(self.episodes) if e is not None]
