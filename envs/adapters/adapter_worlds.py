"""The base of the adapters: other simulators' environments behind the contract of `envs.sim.base_worlds.BaseWorlds`.

An adapter defines how an episode starts, what one control step is, and what there is to read and to render. The rest is
here: tasks and seeds, chunks that end with the episode, and frames rendered once per chunk by a renderer without
what costs most of a frame in software and shows a policy nothing: shadows, mirrors and multisampling.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.sim.base_worlds import BaseWorlds, ChunkOutcome, Frames
from envs.sim.cameras import extrinsics, intrinsics
from envs.sim.divergence import diverged
from envs.sim.frustum_culling import Culling
from envs.sim.render_options import RenderOptions
from envs.tabletop.language import Phrasings, holds_nothing_back
from vla.core.config import lookup
from vla.core.types import ActionChunk, ActionSpec
from vla.runtime.rendering_backend import drawing

_NOT_DRAWN = 5
"""A geom group that no adapter shows."""
_OFF_FLAGS = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)


def require(package: str, extra: str = "") -> None:
    """ValueError naming the extra (default: of the package's name) when an adapter's package is not installed. Cheap:
    called before workers start."""
    if find_spec(package) is None:
        raise ValueError(f"this suite needs {package}: `./run setup {extra or package}`")


@contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """robosuite draws from numpy's global generator: seed it, and give it back as it was."""
    saved = np.random.get_state()
    np.random.seed(np.random.SeedSequence([seed, 61]).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(saved)


@dataclass(frozen=True)
class AdapterEpisode:
    """The part of an episode that the adapted environment does not draw itself."""

    seed: int
    task: str
    instruction: str
    template: str
    swapped_instruction: str


class AdapterWorlds(BaseWorlds):
    """`num_worlds` adapted environments in this process."""

    turned_views: tuple[int, ...] = ()
    """Views that are not shown as they are drawn, see `_turn`."""

    def __init__(
        self,
        suite: Any,
        num_worlds: int,
        *,
        action_spec: ActionSpec,
        cameras: Mapping[str, str],
        privileged_dim: int,
        show: Callable[[mujoco.MjvOption], None] = lambda option: None,
        phrasings: Phrasings,
        render: RenderOptions,
        frames_out: Frames | None,
        full_quality: bool = False,
    ) -> None:
        """`cameras`: our name -> the adapted model's; `show` chooses what of the model is rendered; `full_quality`
        draws with shadows, mirrors and multisampling as the model asks."""
        if phrasings == "novel":
            raise holds_nothing_back(suite.name)
        super().__init__(
            suite, num_worlds, action_spec=action_spec, cameras=tuple(cameras), proprio_dim=len(self.proprio_names),
            privileged_dim=privileged_dim, phrasings=phrasings, render=render, frames_out=frames_out,
        )  # fmt: skip
        self._their_names = tuple(cameras.values())
        self._low, self._high = np.asarray(action_spec.low), np.asarray(action_spec.high)
        self._proprio = np.zeros((num_worlds, self.proprio_dim), np.float32)
        self._privileged = np.zeros((num_worlds, privileged_dim), np.float32)
        self._renderer = TunedRenderer(self.image_size, show, full_quality=full_quality)

    # ------------------------------------------------------------------ for adapters to implement
    @abstractmethod
    def _start(self, i: int, seed: int, task: str | None) -> AdapterEpisode:
        """Put environment `i` into the initial state of episode `seed` (and of the task, when given)."""

    @abstractmethod
    def _step(self, i: int, action_A: NDArray[np.float64]) -> bool:
        """Run one control step of environment `i`; True if it has succeeded."""

    @abstractmethod
    def _read(self, i: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The present (proprio, privileged state) of environment `i`."""

    @abstractmethod
    def _scene(self, i: int) -> tuple[str, mujoco.MjModel, mujoco.MjData]:
        """(a name that worlds of the same looks share, model, data) to draw world `i` from."""

    def _painted(self, i: int) -> mujoco.MjModel:
        """The model that world `i`'s textures are taken from: its own, or one of the same geoms and materials."""
        return self._scene(i)[1]

    # ------------------------------------------------------------------ the contract
    def start_episodes(self, seeds: Sequence[int], tasks: Sequence[str] | None, env_ids: Sequence[int] | None) -> None:
        """See `BaseWorlds.start_episodes`."""
        ids = self._ids(seeds, env_ids)
        for task in tasks or ():
            lookup(task, dict.fromkeys(self.suite.tasks), "task")
        for k, i in enumerate(ids):
            self.episodes[i] = self._start(i, int(seeds[k]), tasks[k] if tasks else None)
            self.over[i], self.elapsed[i] = False, 0
            self._proprio[i], self._privileged[i] = self._read(i)
        self._render(ids)

    def run_chunk(self, chunk: ActionChunk) -> ChunkOutcome:
        """See `BaseWorlds.run_chunk`."""
        actions = np.clip(self._checked(chunk), self._low, self._high)
        live = np.flatnonzero(~self.over)
        n_steps = np.zeros(self.num_envs, np.int64)
        terminated, truncated, lost = (np.zeros(self.num_envs, bool) for _ in range(3))
        for i in live:
            for action in actions[i]:
                succeeded = self._step(i, action)
                lost[i] = diverged(self._scene(i)[2])
                terminated[i] = succeeded and not lost[i]
                n_steps[i] += 1
                self.elapsed[i] += 1
                truncated[i] = not terminated[i] and (self.elapsed[i] >= self.horizon or lost[i])
                if terminated[i] or truncated[i]:
                    self.over[i] = True
                    break
            if not lost[i]:
                self._proprio[i], self._privileged[i] = self._read(i)
        self._render(live[~lost[live]])
        info = {"success": terminated.copy(), "wrong_object": np.zeros(self.num_envs, bool)}
        reward = terminated.astype(np.float32)
        return ChunkOutcome(reward, terminated, truncated, n_steps, lost, info)

    def _render(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        if not self.render_images:
            return
        for i in ids:
            looks, model, data = self._scene(i)
            cameras = [model.camera(name).id for name in self._their_names]
            self._renderer.draw(
                looks, model, data, cameras, self.images[i], None if self.depth is None else self.depth[i],
                painted=partial(self._painted, i),
            )  # fmt: skip
            if self.intrinsics is not None and self.extrinsics is not None:
                self.intrinsics[i] = intrinsics(model, cameras, self.image_size)
                self.extrinsics[i] = extrinsics(data, cameras)
            for view in self.turned_views:
                self._turn(i, view)

    def renew_textures(self, i: int, textures: Sequence[int]) -> None:
        """Draw from what world `i`'s model holds now of these textures."""
        looks, model, _ = self._scene(i)
        self._renderer.upload(looks, model, textures)

    def _turn(self, i: int, view: int) -> None:
        """Show a view turned by 180 degrees about its axis, and say so in its calibration."""
        self.images[i, view] = self.images[i, view, ::-1, ::-1].copy()
        if self.depth is not None:
            self.depth[i, view] = self.depth[i, view, ::-1, ::-1].copy()
        if self.extrinsics is not None:
            self.extrinsics[i, view, :3, :2] *= -1

    def proprio(self) -> NDArray[np.float32]:
        """(n, P) robot state, see the adapter's PROPRIO_NAMES."""
        return self._proprio.copy()

    def privileged(self) -> NDArray[np.float32]:
        """(n, S) simulator state for critics and scripted experts."""
        return self._privileged.copy()

    def close(self) -> None:
        """Free the graphics context. Safe to call twice."""
        self._renderer.close()


_MAX_LOOKS, _MAX_FULL_LOOKS = 64, 12
"""Sets of meshes and textures that are kept uploaded; LIBERO's, drawn in full quality, take 200 MB each."""


def _has_mirrors(model: mujoco.MjModel) -> bool:
    """True if MuJoCo draws reflections: in planes and boxes only, of materials that reflect."""
    flat = np.isin(model.geom_type, (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX)) & (model.geom_matid >= 0)
    return bool(model.mat_reflectance[model.geom_matid[flat]].any())


class TunedRenderer:
    """Square RGB images of several models through one GL context. Create it in the process that uses it."""

    def __init__(
        self, image_size: int, show: Callable[[mujoco.MjvOption], None], *, full_quality: bool = False
    ) -> None:
        self._size, self._full = image_size, full_quality
        self._option = mujoco.MjvOption()
        show(self._option)
        self._option.geomgroup[_NOT_DRAWN] = 0
        self._culling: dict[int, Culling] = {}
        """By the model's id; each keeps its model, so that an id is not given to another."""
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._area = mujoco.MjrRect(0, 0, image_size, image_size)
        self._pixels = np.empty((image_size, image_size, 3), np.uint8)
        self._context: Any = None
        self._drawers: dict[str, tuple[mujoco.MjrContext, mujoco.MjvScene]] = {}

    def draw(
        self,
        looks: str,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        cameras: Sequence[int],
        out_VHWC: NDArray[np.uint8],
        depth_VHW: NDArray[np.float32] | None = None,
        *,
        painted: Callable[[], mujoco.MjModel] | None = None,
    ) -> None:
        """One image per camera, and metres along its axis if requested.

        Models of the same `looks` share what is uploaded: meshes and textures of the first one, or of the model that
        `painted` returns.
        """
        if self._context is None:
            with drawing():
                self._context = mujoco.GLContext(self._size, self._size)
                self._context.make_current()
        self._context.make_current()
        if looks not in self._drawers:
            source = model if painted is None else painted()
            quality, screen = source.vis.quality, source.vis.global_
            # Before the upload: this is where the 4096-pixel shadow map and four samples per pixel are allocated.
            if not self._full:
                quality.offsamples = quality.shadowsize = 0
            screen.offwidth = screen.offheight = self._size
            drawer = mujoco.MjrContext(source, mujoco.mjtFontScale.mjFONTSCALE_50), mujoco.MjvScene(model, maxgeom=5000)
            if len(self._drawers) >= (_MAX_FULL_LOOKS if self._full else _MAX_LOOKS):
                self._drawers.pop(next(iter(self._drawers)))[0].free()
            drawer[0].readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR  # reversed: far away is where floats are dense
            for flag in () if self._full else _OFF_FLAGS:
                drawer[1].flags[flag] = 0
            self._drawers[looks] = drawer
        context, scene = self._drawers[looks]
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        mujoco.mj_camlight(model, data)
        if id(model) not in self._culling:
            self._culling[id(model)] = Culling(model)
        for view, camera in enumerate(cameras):
            self._camera.fixedcamid = camera
            shown = model.geom_group.copy()
            if not (self._full and _has_mirrors(model)):  # what is out of sight may be seen in a mirror
                model.geom_group[~self._culling[id(model)].in_sight(data, camera)] = _NOT_DRAWN
            mujoco.mjv_updateScene(model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, scene)
            model.geom_group[:] = shown
            mujoco.mjr_render(self._area, scene, context)
            buffer = None if depth_VHW is None else np.empty((self._size, self._size), np.float32)
            mujoco.mjr_readPixels(self._pixels, buffer, self._area, context)
            out_VHWC[view] = self._pixels[::-1]  # OpenGL counts rows from the bottom
            if depth_VHW is not None and buffer is not None:
                near, far = (plane * model.stat.extent for plane in (model.vis.map.znear, model.vis.map.zfar))
                depth_VHW[view] = near * far / (near + buffer[::-1].astype(np.float64) * (far - near))

    def upload(self, looks: str, model: mujoco.MjModel, textures: Sequence[int]) -> None:
        """Send textures of a model again, which may have another size now. Nothing before its first picture."""
        if looks in self._drawers:
            self._context.make_current()
            for texture in textures:
                mujoco.mjr_uploadTexture(model, self._drawers[looks][0], texture)

    def close(self) -> None:
        """Free the GL context. Safe to call twice."""
        for context, _ in self._drawers.values():
            context.free()
        self._drawers.clear()
        if self._context is not None:
            self._context.free()
            self._context = None
