"""Frustum culling: a software renderer transforms every vertex, so geoms that a camera cannot see are left out."""

from __future__ import annotations

from itertools import product

import mujoco
import numpy as np
from numpy.typing import NDArray

_SIGNS = np.array(list(product((-1.0, 1.0), repeat=3)))


class Culling:
    """The boxes around a model's geoms, against a camera's view. A geom that is left out touches no pixel."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        middle, half = model.geom_aabb[:, :3], model.geom_aabb[:, 3:]
        self._corners_G8x3 = middle[:, None] + _SIGNS * half[:, None]
        self._unbounded = model.geom_rbound <= 0  # planes

    def in_sight(self, data: mujoco.MjData, camera: int) -> NDArray[np.bool_]:
        """(ngeom,) of fixed camera `camera`, its picture square: False only for what is wholly outside the view."""
        model = self._model
        if model.cam_sensorsize[camera].any():  # its view is not that of a field-of-view angle
            return np.ones(model.ngeom, bool)
        turned_G33 = data.geom_xmat.reshape(-1, 3, 3)
        corners = self._corners_G8x3 @ turned_G33.transpose(0, 2, 1) + data.geom_xpos[:, None]
        x, y, z = ((corners - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)).transpose(2, 0, 1)
        # The camera looks along -z; a point is in sight where |x| and |y| are at most -z tan(half the angle).
        reach = -z * np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
        outside = [(x > reach).all(1), (-x > reach).all(1), (y > reach).all(1), (-y > reach).all(1), (z > 0).all(1)]
        return self._unbounded | ~np.any(outside, axis=0)
