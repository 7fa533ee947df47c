"""Worlds of another Python environment for callers that would make worlds in their own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.adapters.adapter_worlds import AdapterEpisode
from envs.adapters.libero_env import PROPRIO_NAMES, LiberoWorlds
from envs.adapters.libero_suites import LiberoSuite, interpreter
from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.sim.render_options import RenderOptions
from envs.tabletop.language import Phrasings


class RemoteWorlds(MujocoVecEnv):
    """`num_worlds` environments in one worker process, with the attributes of `envs.sim.base_worlds.BaseWorlds` that
    its users read."""

    def __init__(
        self,
        suite: Any,
        num_worlds: int,
        *,
        worlds: Callable[..., Any],
        python: Path,
        phrasings: Phrasings = "train",
        render: RenderOptions = RenderOptions(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(suite, worlds, num_worlds, num_workers=1, phrasings=phrasings, render=render, python=python)

    @property
    def over(self) -> NDArray[np.bool_]:
        """(n,) True where no episode is being played."""
        return ~self._playing

    @property
    def images(self) -> NDArray[np.uint8]:
        """(n, V, H, W, 3) RGB of the last render."""
        return self._images

    @property
    def episodes(self) -> Sequence[AdapterEpisode | None]:
        """Each environment's episode, None before its first reset."""
        words = zip(
            self._asked, self.tasks, self.words("instruction"), self.templates, self.alternative_instructions(),
            strict=True,
        )  # fmt: skip
        return [None if asked is None else AdapterEpisode(asked[0], *rest) for asked, *rest in words]

    @property
    def render_images(self) -> bool:
        """Render at resets and after action chunks; if False, images keep the last frame."""
        return self._drawing

    @render_images.setter
    def render_images(self, on: bool) -> None:
        self.set_rendering(on)


class RemoteLibero(RemoteWorlds):
    """`num_worlds` LIBERO environments, in LIBERO's own environment."""

    proprio_names = PROPRIO_NAMES

    def __init__(
        self,
        suite: LiberoSuite,
        num_worlds: int,
        *,
        phrasings: Phrasings = "train",
        render: RenderOptions = RenderOptions(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(
            suite, num_worlds, worlds=LiberoWorlds, python=interpreter(), phrasings=phrasings, render=render
        )
