"""Samplers of grounding scenes, and the projection of their points into the images. Most scenes pose an arm and objects
anywhere, without physics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mujoco
import numpy as np

from envs.backends.cpu_worlds import TabletopWorlds
from envs.make import episode_source
from envs.perturb.perturbation import Perturbation
from envs.sim.base_worlds import BaseWorlds
from envs.sim.render_options import RenderOptions
from envs.tabletop.control import joint_targets
from envs.tabletop.suites import Suite
from vla.core.types import IMAGE_SIZE


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and the positions of what it names (world frame, m; None: nothing)."""

    prompt: str
    answer: str
    object: np.ndarray | None = None
    place: np.ndarray | None = None


class SceneSampler(ABC):
    """Samples and renders scenes of one suite, in one environment."""

    worlds: BaseWorlds
    centre_m: tuple[float, float, float]
    """Centre of the table, world frame: positions are labelled relative to it."""

    def restart(self) -> None:  # noqa: B027 - most scenes do not follow from the one before
        """Forget the scene before: the next one follows from its generator alone."""

    @abstractmethod
    def scene(self, rng: np.random.Generator) -> list[Question]:
        """Sample and render a scene; `grip`, `pictures` and `project` are about it. Returns its questions."""

    @abstractmethod
    def grip(self) -> np.ndarray:
        """(3,) grip site, world frame, m."""

    def pictures(self) -> np.ndarray:
        """(V, H, W, 3) uint8 images of the scene."""
        return self.worlds.images[0]

    def geometry(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Depth (V, H, W) in m, intrinsics (V, 3, 3) and extrinsics (V, 4, 4) of the scene's pictures."""
        w = self.worlds
        assert w.depth is not None and w.intrinsics is not None and w.extrinsics is not None, "made without depth"
        return w.depth[0], w.intrinsics[0], w.extrinsics[0]

    def project(self, point: np.ndarray) -> np.ndarray:
        """(V, 3): u right, v down in [-1, 1], and whether the point lies inside the image."""
        w, out = self.worlds, []
        assert w.intrinsics is not None and w.extrinsics is not None, "worlds to paint are made with calibration=True"
        for intrinsics, extrinsics in zip(w.intrinsics[0], w.extrinsics[0], strict=True):
            local = extrinsics[:3, :3].T @ (point - extrinsics[:3, 3])
            u, v = (intrinsics @ (local / max(float(local[2]), 1e-6)))[:2] / (w.image_size / 2) - 1
            inside = local[2] > 0 and abs(u) < 1 and abs(v) < 1
            out.append([np.clip(u, -1.5, 1.5), np.clip(v, -1.5, 1.5), float(inside)])
        return np.array(out)


class PosingSampler(SceneSampler):
    """Poses the arm and the objects of a tabletop suite; subclasses decide where."""

    worlds: TabletopWorlds
    centre_m = (0.53, 0.0, 0.0)

    def __init__(
        self,
        suite: Suite,
        image_size: int = IMAGE_SIZE,
        perturb: Perturbation | None = None,
        *,
        depth: bool = False,
    ) -> None:
        """`perturb`: randomises every scene's look, by its episode's seed. `depth`: for `geometry`."""
        source, render = episode_source(perturb), RenderOptions(image_size, depth=depth, calibration=True)
        self.worlds = TabletopWorlds(suite, 1, source=source, render=render)
        self.kinds = self.worlds.scene.objects

    def grip(self) -> np.ndarray:
        """See `SceneSampler.grip`."""
        return self.worlds.state.grip[0]

    def reach(self, goal: np.ndarray, opening_m: float) -> None:
        """Kinematic IK to a grip position (m) with the fingers opened by `opening_m` each."""
        w, data = self.worlds, self.worlds.data[0]
        jac = np.zeros((6, w.model.nv))
        for _ in range(15):
            mujoco.mj_kinematics(w.model, data)
            mujoco.mj_comPos(w.model, data)
            mujoco.mj_jacSite(w.model, data, jac[:3], jac[3:], w.index.grip_site)
            data.qpos[w.index.arm_qpos] = joint_targets(
                data.qpos[w.index.arm_qpos][None], jac[None][:, :, w.index.arm_dof],
                data.site_xpos[w.index.grip_site][None], data.site_xmat[w.index.grip_site].reshape(1, 3, 3),
                goal[None], w._hold_rotation, 1e-3,
            )[0]  # fmt: skip
        data.qpos[w.index.finger_qpos] = [opening_m, -opening_m]
        mujoco.mj_kinematics(w.model, data)

    def look(self) -> None:
        """Read the positions and take the pictures."""
        mujoco.mj_kinematics(self.worlds.model, self.worlds.data[0])
        self.worlds._read(0)
        self.worlds._render([0])
