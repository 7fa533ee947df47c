"""Camera images on the CPU, depth and calibration: one EGL context per process, shared by every world in it."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping, Sequence

import mujoco
import numpy as np
from numpy.typing import NDArray

from vla.runtime.rendering_backend import drawing

_OFF_FLAGS = ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX")
"""Shadows first: they are drawn where they are asked for."""
_OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0])
"""MuJoCo's cameras look along -z with y up; everyone who back-projects wants +z forward and y down."""


class CameraRenderer:
    """Square images of one model's cameras. Create it in the process that uses it (EGL contexts do not fork)."""

    def __init__(
        self, model: mujoco.MjModel, camera_ids: Sequence[int], image_size: int, *, shadows: bool = False
    ) -> None:
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, image_size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, image_size)
        with drawing():
            self._renderer = mujoco.Renderer(model, image_size, image_size)
        # Before mujoco ends EGL as a whole, which it registered just now: a context freed later is an error on stderr.
        atexit.register(_close, weakref.ref(self._renderer))
        for flag in _OFF_FLAGS[shadows:]:
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = 0
        self._option.geomgroup[0] = 1
        self._option.sitegroup[:] = 0
        self._camera_ids = camera_ids

    def render(
        self, data: mujoco.MjData, out_VHWC: NDArray[np.uint8], depth_VHW: NDArray[np.float32] | None = None
    ) -> None:
        """Write one (H, W, 3) uint8 image per camera into `out_VHWC` and, if given, metres along the camera's axis into
        `depth_VHW`. Kinematics must be current."""
        for view, camera in enumerate(self._camera_ids):
            self._renderer.update_scene(data, camera=camera, scene_option=self._option)
            self._renderer.render(out=out_VHWC[view])
            if depth_VHW is not None:
                self._renderer.enable_depth_rendering()
                self._renderer.render(out=depth_VHW[view])
                self._renderer.disable_depth_rendering()

    def close(self) -> None:
        """Free the graphics context."""
        self._renderer.close()


def intrinsics(model: mujoco.MjModel, camera_ids: Sequence[int], image_size: int) -> NDArray[np.float32]:
    """(V, 3, 3) pinhole matrices of square images, pixels; see `vla.core.types.Observation.intrinsics`."""
    out = np.zeros((len(camera_ids), 3, 3), np.float32)
    focal = 0.5 * image_size / np.tan(0.5 * np.deg2rad(model.cam_fovy[list(camera_ids)]))
    out[:, 0, 0] = out[:, 1, 1] = focal
    out[:, :2, 2], out[:, 2, 2] = 0.5 * image_size, 1.0
    return out


def extrinsics(data: mujoco.MjData, camera_ids: Sequence[int]) -> NDArray[np.float32]:
    """(V, 4, 4) world_from_camera now, OpenCV axes; `mj_camlight` must be current."""
    ids = list(camera_ids)
    out = np.tile(np.eye(4, dtype=np.float32), (len(ids), 1, 1))
    out[:, :3, :3] = data.cam_xmat[ids].reshape(-1, 3, 3) @ _OPENCV_FROM_OPENGL
    out[:, :3, 3] = data.cam_xpos[ids]
    return out


def _close(renderer: weakref.ref[mujoco.Renderer]) -> None:
    if (alive := renderer()) is not None:
        alive.close()


class FrameHistory:
    """Frames of the last k decisions of n environments: one `push` per decision, `restart` when an episode begins."""

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"history must be at least 0 frames, got {length}")
        self._length = length
        self._frames: dict[str, NDArray[np.uint8]] = {}
        """(n, k + 1, H, W, 3), oldest first; the last is the present one."""

    def restart(self, images: Mapping[str, NDArray[np.uint8]], worlds: Sequence[int] | NDArray[np.int64]) -> None:
        """The episodes of `worlds` begin with these frames of all worlds."""
        for name, frame in images.items():
            if name not in self._frames:
                self._frames[name] = np.repeat(frame[:, None], self._length + 1, axis=1)
            self._frames[name][worlds] = frame[worlds][:, None]

    def push(self, images: Mapping[str, NDArray[np.uint8]]) -> None:
        """Append the new frames after a decision in every environment."""
        for name, frame in images.items():
            frames = self._frames[name]
            frames[:, :-1] = frames[:, 1:]
            frames[:, -1] = frame

    def before(self) -> dict[str, NDArray[np.uint8]]:
        """Camera name -> (n, k, H, W, 3), the present frame left out. Copies."""
        return {name: frames[:, :-1].copy() for name, frames in self._frames.items()}
