"""A film of an episode in the cell, drawn afterwards: while the arm moves there is no time for large pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from bascule.franka_cell.scene import finish
from envs.sim.cameras import CameraRenderer
from envs.tabletop.scene import SceneConfig
from vla.runtime.scene_pictures import Animation

_EVERY = 2
"""Control steps between two frames."""
_SIZE_PX = 320
_LONGEST_S = 60.0


class Film:
    """The cell's present episode so far, every tenth of a second of its clock."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, scene: SceneConfig) -> None:
        self._model, self._data, self._scene = model, data, scene
        self._seen: list[tuple[np.ndarray, bool, bool]] = []
        self._calls = 0

    def begin(self) -> None:
        """Another episode begins: forget the one before."""
        self._seen.clear()

    def look(self, told: Any) -> None:
        """Keep how things stand, from the arm's first motion until half a second after the verdict `told`."""
        self._calls += 1
        over = told.success or told.wrong_object
        late = over and told.seconds > told.at_s + 0.5
        long = len(self._seen) * _EVERY > _LONGEST_S * self._scene.control_hz
        if not (self._calls % _EVERY or told.seconds == 0 or late or long):
            self._seen.append((self._data.qpos.copy(), told.success, over))

    def save(self, path: Path, instruction: str) -> bool:
        """Write an animated WebP with the real arm's meshes; the cell cannot go on after it. False without frames."""
        if not self._seen:
            return False
        index = finish(self._model, self._scene, "fr3")
        renderer = CameraRenderer(self._model, index.camera_ids[:1], _SIZE_PX)
        film, picture = Animation([instruction]), np.zeros((1, _SIZE_PX, _SIZE_PX, 3), np.uint8)
        try:
            for qpos, succeeded, over in self._seen:
                self._data.qpos[:] = qpos
                mujoco.mj_kinematics(self._model, self._data)
                mujoco.mj_camlight(self._model, self._data)
                renderer.render(self._data, picture)
                film.add(picture.copy(), np.array([succeeded]), np.array([over]))
        finally:
            renderer.close()
        film.save(path, frame_ms=round(1000 * _EVERY / self._scene.control_hz))
        return True
