"""A control of the experiments with depth: cameras whose calibration is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vla.core.types import ActionChunk, Observation, Policy, PolicySpec, Prefix

WRONG_DEG = 20.0


class Miscalibrated:
    """A policy in front of cameras that are said to be turned by some degrees about their own vertical.

    So a camera that was knocked points elsewhere: what it sees is misplaced by a third of its distance. Turned about
    the middle of the workspace instead, it would hardly be misled about what lies there.
    """

    def __init__(self, policy: Policy, degrees: float) -> None:
        self.policy = policy
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        self._turn = np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]], np.float32)

    @property
    def spec(self) -> PolicySpec:
        """The policy's own."""
        return self.policy.spec

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""
        self.policy.reset(env_ids)

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The policy's answer, believing the wrong calibration. ValueError for an observation without extrinsics."""
        if obs.extrinsics is None:
            raise ValueError("there is no calibration to be wrong about: the observation has no extrinsics")
        wrong = {camera: matrix @ self._turn for camera, matrix in obs.extrinsics.items()}
        return self.policy.act(replace(obs, extrinsics=wrong), prefix=prefix)
