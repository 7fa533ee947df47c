"""Camera images on the CPU: one EGL context per process, shared by every world in it."""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np

from envs.scene import SceneIndex

_OFF_FLAGS = ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX")


class CameraRenderer:
    """Square RGB images of one model's cameras. Create it in the process that uses it (EGL contexts do not fork)."""

    def __init__(self, model: mujoco.MjModel, index: SceneIndex, image_size: int) -> None:
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, image_size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, image_size)
        self._renderer = mujoco.Renderer(model, image_size, image_size)
        for flag in _OFF_FLAGS:
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = 0
        self._option.geomgroup[0] = 1
        self._option.sitegroup[:] = 0
        self._camera_ids: Sequence[int] = index.camera_ids

    def render(self, data: mujoco.MjData, out_VHWC: np.ndarray) -> None:
        """Write one (H, W, 3) uint8 image per camera into `out_VHWC`. Kinematics must be current."""
        for view, camera in enumerate(self._camera_ids):
            self._renderer.update_scene(data, camera=camera, scene_option=self._option)
            self._renderer.render(out=out_VHWC[view])

    def close(self) -> None:
        self._renderer.close()
